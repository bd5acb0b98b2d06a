"""Perplexity against bytes: dense and compact models in bfloat16 and in 4 bits, and dense ones at 8, 4, 3 and 2 bits.

    python benchmarks/four_bit.py --model MODEL --train wiki.valid.raw \
        --test wikitext2=wiki.test.raw c4=c4_docs.jsonl --results benchmarks/four_bit.jsonl

All compact rows come from one run that is trained for the smallest of ``--sizes``; ``+ LoRA`` rows train a LoRA, which
is stored beside the quantized weights, on the same tokens. The two memory rows measure a few steps over an NF4 base;
run each in a process of its own: ``--rows "memory, QLoRA"`` and ``--rows "memory, lora_svd"``. HQQ comes with the
extra ``bench``. Results are appended as they come and never run again; the table of all of them comes last.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import PeakMemory, Results, TextArguments, Texts, load, train, training_arguments
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, HfArgumentParser

from lora_svd import LoraSVDCallback, LoraSVDConfig
from lora_svd.analysis.plots import line_figure, save_png
from lora_svd.analysis.tables import markdown_table
from lora_svd.compact.bnb import num_bytes
from lora_svd.compact.quantized import quantize_modules
from lora_svd.tuner.layer import LoraSVDLinear

SIZED = "compact, "  # rows that have every size


@dataclass
class Arguments(TextArguments):
    """What to run."""

    sizes: list[float] = field(default_factory=lambda: [0.8, 0.6, 0.4], metadata={"help": "param_ratio."})
    seed: int = field(default=0, metadata={"help": "Of the rows that train."})
    steps: int = field(default=60, metadata={"help": "Optimizer steps of a run, observation included."})
    memory_steps: int = field(default=4, metadata={"help": "Steps of the memory rows; half of them observe."})


class Benchmark:
    """Texts, training data and the trained adapter that the compact rows share."""

    def __init__(self, given: Arguments) -> None:
        self.given, self.results, self.texts = given, Results(Path(given.results)), Texts(given)

    def run(self, name: str) -> None:
        """All sizes of a row that have no result yet."""
        for size in self.given.sizes if name.startswith(SIZED) else [1.0]:
            key = {"row": name, "param_ratio": size}
            if not self.results.has(**key):
                memory = PeakMemory()
                with memory.watch():
                    model = ROWS[name](self, size)
                measured = model if isinstance(model, dict) else self.measure(model)
                self.results.add(key | measured | {"peak_mebibytes": memory.mebibytes})

    def measure(self, model: Any) -> dict[str, Any]:
        """Bytes of the decoder's blocks, which hold all linear layers but the head, and perplexities."""
        with torch.autocast(device_type=model.device.type, dtype=torch.bfloat16):
            return {"block_bytes": block_bytes(model), **self.texts.perplexities(model)}

    def train(self, model: Any, steps: int, *callbacks: Any) -> Any:
        arguments = training_arguments(
            Path(".cache/benchmarks"),
            steps=steps,
            batch=self.given.batch,
            learning_rate=self.given.learning_rate,
            seed=self.given.seed,
        )
        return train(model, self.texts.examples, arguments, *callbacks)

    def trained(self) -> Any:
        """The adapter, trained once for the smallest size, in the factors that 4-bit kernels take."""
        given = self.given
        folder = Path(given.results).with_suffix("")
        if not (folder / "adapter_model.safetensors").exists():
            config = LoraSVDConfig(
                param_ratio=min(given.sizes),
                importance="lora_diagonal",  # the fewest statistics
                neurons=False,
                factor_format="factors",
                rank_multiple=64,
                train_factors=True,
                distillation=0.5,
            )
            tuned = get_peft_model(load(given.model), config)
            self.train(tuned, given.steps, LoraSVDCallback()).save_pretrained(str(folder))
        return PeftModel.from_pretrained(load(given.model), str(folder), is_trainable=True)


def block_bytes(model: Any) -> int:
    """Bytes of all weights and buffers below the list of decoder blocks."""
    (blocks,) = (module for name, module in model.named_modules() if name.endswith("layers"))
    total = 0
    for module in blocks.modules():
        if isinstance(module, HQQLinear):
            meta: Any = module.meta
            stored = [module.W_q, *(value for value in meta.values() if isinstance(value, torch.Tensor))]
        else:
            stored = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        total += sum(num_bytes(tensor) for tensor in stored)
    return total


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def dense(bench: Benchmark, size: float) -> Any:
    return load(bench.given.model).to(torch.bfloat16)


def dense_nf4(bench: Benchmark, size: float) -> Any:
    return AutoModelForCausalLM.from_pretrained(bench.given.model, dtype=torch.float32, quantization_config=nf4())


def dense_hqq(bench: Benchmark, size: float, *, bits: int) -> Any:
    """HQQ (Badri and Shaji 2023), groups of 64, without calibration, as its authors recommend."""
    model = load(bench.given.model)
    for name, module in list(model.model.layers.named_modules()):
        if type(module) is nn.Linear:
            config = BaseQuantizeConfig(nbits=bits, group_size=64)
            device, dtype = str(module.weight.device), torch.bfloat16
            new = HQQLinear(module.to(dtype), config, compute_dtype=dtype, device=device)
            model.model.layers.set_submodule(name, new)
    return model


def with_lora(bench: Benchmark, size: float, *, make: Callable[[Benchmark, float], Any]) -> Any:
    """A quantized model and a LoRA in bfloat16 beside it."""
    model = prepare_model_for_kbit_training(make(bench, size), use_gradient_checkpointing=False)
    tuned: Any = bench.train(get_peft_model(model, lora(model)), bench.given.steps)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    return tuned


def lora(model: Any) -> LoraConfig:
    """PEFT's LoRA of the rank of ours; its "all-linear" does not find HQQ's layers."""
    blocks = model.model.layers.named_modules()
    names = {name.rpartition(".")[2] for name, module in blocks if isinstance(module, nn.Linear | HQQLinear)}
    return LoraConfig(r=16, lora_alpha=16, target_modules=sorted(names), task_type="CAUSAL_LM")


def compact(bench: Benchmark, size: float, **choices: Any) -> Any:
    """The trained adapter at a size, in bfloat16 or, with a quantization, rounded on what it has observed."""
    model = bench.trained()
    model.base_model.set_param_ratio(size)
    merged = model.merge_and_unload(**choices)
    return merged if choices else merged.to(torch.bfloat16)


def compact_to_nearest(bench: Benchmark, size: float) -> Any:
    """What the observed inputs are worth: the same rounded without them."""
    model = bench.trained()
    model.base_model.set_param_ratio(size)
    merged = model.merge_and_unload()
    quantize_modules(merged, nf4())
    return merged


def memory(bench: Benchmark, size: float, *, ours: bool) -> dict[str, Any]:
    """A few steps over an NF4 base; the statistics that only ours collects are stated apart."""
    model = prepare_model_for_kbit_training(dense_nf4(bench, size), use_gradient_checkpointing=False)
    steps = bench.given.memory_steps
    if not ours:
        bench.train(get_peft_model(model, lora(model)), steps)
        return {}
    config = LoraSVDConfig(param_ratio=0.6, importance="lora_diagonal", warmup=steps // 2, factor_format="factors")
    tuned = get_peft_model(model, config)
    bench.train(tuned, steps, LoraSVDCallback())
    layers = [layer for layer in tuned.modules() if isinstance(layer, LoraSVDLinear)]
    sums = [tensor for layer in layers for tensor in layer.statistics("default").sums.values()]
    return {"statistics_mebibytes": sum(tensor.numel() * tensor.element_size() for tensor in sums) >> 20}


ROWS: dict[str, Callable[[Benchmark, float], Any]] = {
    "dense, bfloat16": dense,
    "dense, NF4": dense_nf4,
    **{f"dense, HQQ {bits} bits": partial(dense_hqq, bits=bits) for bits in (8, 4, 3, 2)},
    "dense, NF4 + LoRA": partial(with_lora, make=dense_nf4),
    **{f"dense, HQQ {bits} bits + LoRA": partial(with_lora, make=partial(dense_hqq, bits=bits)) for bits in (3, 2)},
    "compact, bfloat16": compact,
    "compact, NF4": partial(compact, quantization_config=nf4()),
    "compact, NF4 without statistics": compact_to_nearest,
    "memory, QLoRA": partial(memory, ours=False),
    "memory, lora_svd": partial(memory, ours=True),
}


def table(results: list[dict[str, Any]], texts: Iterable[str]) -> str:
    """All results as Markdown, the largest model first. MB: of the decoder's blocks. MiB: peak, of which statistics."""
    sized = sorted((row for row in results if "block_bytes" in row), key=lambda row: -row["block_bytes"])
    rows = [["row", "param_ratio", "MB", *texts]]
    for row in sized:
        perplexities = [f"{row[text]:,.2f}" for text in texts]
        rows.append([row["row"], f"{row['param_ratio']:g}", f"{row['block_bytes'] / 1e6:.1f}", *perplexities])
    memory = [["row", "MiB", "statistics"]]
    for row in results:
        if row["row"].startswith("memory, "):
            memory.append([row["row"], f"{row['peak_mebibytes']:,}", f"{row.get('statistics_mebibytes', 0):,}"])
    return f"{markdown_table(rows)}\n\n{markdown_table(memory)}"


def figure(results: list[dict[str, Any]], text: str) -> Any:
    """Perplexity of one text against the bytes of the decoder's blocks; a line for every kind of model."""
    kinds = {
        "dense, bfloat16 and HQQ": r"dense, (bfloat16|HQQ \d bits)",
        "dense, NF4": "dense, NF4",
        "dense, quantized, and LoRA": r"dense, .* \+ LoRA",
        "compact, bfloat16": "compact, bfloat16",
        "compact, NF4": "compact, NF4",
    }
    series = {}
    for kind, rows in kinds.items():
        points = sorted((row["block_bytes"] / 1e6, row[text]) for row in results if re.fullmatch(rows, row["row"]))
        if points:
            series[kind] = tuple(zip(*points, strict=True))
    labels: dict[str, Any] = {
        "title": f"Perplexity on {text}",
        "x_label": "decoder blocks (MB)",
        "y_label": "perplexity",
    }
    return line_figure(series, log_y=True, **labels)


def main() -> None:
    parser: Any = HfArgumentParser(Arguments)  # pyright: ignore[reportArgumentType]
    (given,) = parser.parse_args_into_dataclasses()
    bench = Benchmark(given)
    for name in given.rows or ROWS:
        bench.run(name)
    print(table(bench.results.read(), bench.texts.held_out))
    for text in bench.texts.held_out:
        save_png(figure(bench.results.read(), text), Path(f"{Path(given.results).with_suffix('')}-{text}.png"))


if __name__ == "__main__":
    main()
