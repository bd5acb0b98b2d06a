"""Quality against size: published methods and lora_svd on one model, one text and one budget of training tokens.

    python benchmarks/language_model.py --model MODEL --train wiki.valid.raw \
        --test wikitext2=wiki.test.raw c4=c4_docs.jsonl --results benchmarks/language_model.jsonl

A result is one row of the table at one size and seed. Results are appended as they come and never run again, so the
command can be stopped and repeated, and several can fill one file. ``figure.py`` makes tables and figures of it.

One-shot rows share one observation: an adapter trained with learning rate 0, so that it stays zero, while every
statistic is collected. The row of LoRA's sensitivities has one of its own, in which the LoRA trains: while B = 0 two
of the three terms of their gradient vanish. Rows that train have ``--steps`` optimizer steps, observation included.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accuracy import task_accuracies
from common import (
    CACHE,
    PUBLISHED,
    PeakMemory,
    Results,
    TextArguments,
    Texts,
    cache_folder,
    load,
    phases_of,
    ranks_alone,
    train,
    training_arguments,
)
from lora_prune import lora_prune
from neuron_selection import select_neurons
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import HfArgumentParser, set_seed

from lora_svd import LoraSVDConfig, own_text
from lora_svd.compact import parameter_report
from lora_svd.importance import IMPORTANCES, Importance, plain
from lora_svd.statistics import STATISTICS


@dataclass
class Arguments(TextArguments):
    """What to run."""

    tasks: str | None = field(default=None, metadata={"help": "Folder of ARC-Easy, HellaSwag and LAMBADA; none: skip."})
    task_limit: int | None = field(default=None, metadata={"help": "Documents of each task; none: all."})
    sizes: list[float] = field(default_factory=lambda: [0.8, 0.6, 0.4, 0.2], metadata={"help": "param_ratio."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of the rows that train."})
    steps: int = field(default=100, metadata={"help": "Optimizer steps of a run, observation included."})
    observed_steps: int = field(default=24, metadata={"help": "Steps observed by the rows that do not train."})
    observed: str | None = field(
        default=None, metadata={"help": "Preset whose statistics alone the shared observation collects; none: all."}
    )
    config: str = field(default="{}", metadata={"help": "JSON of LoraSVDConfig fields for 'ours', for ablations."})
    label: str = field(default="", metadata={"help": "Put behind the row's name, for ablations."})
    start: str | None = field(default=None, metadata={"help": "Token the model's own text begins with; none: bos."})


EVERYTHING = "every statistic that the rows need"


def everything() -> Importance:
    """A preset that is only observed, never used."""
    needed = {name for preset in IMPORTANCES.values() if not preset.elementwise for name in preset.statistics}
    # in the order of the registry, so that a statistic finds the ones it is built on
    return Importance(tuple(name for name in STATISTICS if name in needed), plain)


class Benchmark:
    """Texts, training data and the observation that the one-shot rows share."""

    def __init__(self, given: Arguments) -> None:
        self.given, self.results, self.texts = given, Results(Path(given.results)), Texts(given)
        self.earlier_seconds = 0.0  # of what a row uses and was made before
        IMPORTANCES[EVERYTHING] = everything()

    def run(self, name: str, row: Row) -> None:
        """All sizes and seeds of a row that have no result yet."""
        label = name + self.given.label
        for size in [1.0] if row.dense else self.given.sizes:
            for seed in self.given.seeds if row.trains else [0]:
                key = {"row": label, "param_ratio": size, "seed": seed}
                if self.results.has(**key):
                    continue
                self.earlier_seconds, memory, start = 0.0, PeakMemory(), time.perf_counter()
                set_seed(seed)  # also of the adapter's first values, which are drawn before any training
                with memory.watch():
                    model = row.make(self, size, seed)
                seconds = time.perf_counter() - start + self.earlier_seconds
                cost = {"seconds": round(seconds, 1), "peak_mebibytes": memory.mebibytes}
                self.results.add(key | cost | self.measure(model))

    def measure(self, model: Any) -> dict[str, Any]:
        """Size, perplexities and accuracies of a finished model."""
        given, size = self.given, parameter_report(model)
        measured: dict[str, Any] = {"parameters": size.parameters, "bytes": size.bytes}
        with torch.autocast(device_type=model.device.type, dtype=torch.bfloat16):
            measured |= self.texts.perplexities(model)
            if given.tasks:
                asked = {"limit": given.task_limit, "bos": given.bos}
                accuracies = task_accuracies(model, self.texts.tokenizer, Path(given.tasks), **asked)
                measured |= {name: round(value, 4) for name, value in accuracies.items()}
        return measured

    def train(self, model: Any, steps: int, seed: int, learning_rate: float | None = None, examples: Any = None) -> Any:
        """Train a PEFT model in place; a LoraSVD adapter goes through its phases."""
        rate = self.given.learning_rate if learning_rate is None else learning_rate
        arguments = training_arguments(CACHE, steps=steps, batch=self.given.batch, learning_rate=rate, seed=seed)
        return train(model, self.texts.examples if examples is None else examples, arguments, *phases_of(model))

    def with_own_text(self, seed: int) -> list[Any]:
        """What one run reads, half of it drawn from the examples, half of it written by the dense model."""
        given, half = self.given, self.given.steps * self.given.batch // 2

        def write(folder: Path) -> None:
            model = load(given.model).to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
            set_seed(0)
            with torch.autocast(device_type=model.device.type, dtype=torch.bfloat16):
                chosen = {"start": given.start, "bos": given.bos}
                blocks = own_text(model, self.texts.tokenizer, half, given.window, **chosen)
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"blocks": blocks}, folder / "blocks.safetensors")

        folder = self.once(self.folder("own_text", windows=half, start=given.start), write)
        blocks = load_file(folder / "blocks.safetensors")["blocks"]
        own = [{"input_ids": block, "labels": block} for block in blocks]
        return random.Random(seed).sample(self.texts.examples, half) + own

    def once(self, folder: Path, make: Callable[[Path], None]) -> Path:
        """The folder that ``make`` fills, the first time; later its seconds count as the row's."""
        seconds = folder / "seconds.json"
        if seconds.exists():
            self.earlier_seconds = json.loads(seconds.read_text())
        else:
            start = time.perf_counter()
            with torch.random.fork_rng():  # a row draws the same whether this is there or not
                make(folder)
            seconds.write_text(json.dumps(time.perf_counter() - start))
        return folder

    def folder(self, kind: str, **settings: Any) -> Path:
        """Where something is kept that these settings, the model and the training text determine."""
        given = self.given
        known = [given.model, given.train, given.batch, given.window, settings, *self.texts.leading]
        return cache_folder(kind, known)

    def observed(self, learning: str | None = None) -> Any:
        """The dense model with an adapter that has seen ``observed_steps`` steps and is still zero; or, with the name
        of a preset, has learned in them while that was observed."""
        importance, rate = self.given.observed or EVERYTHING, 0.0
        if learning:
            importance, rate = learning, self.given.learning_rate

        def observe(folder: Path) -> None:
            config = LoraSVDConfig(
                param_ratio=0.99, importance=importance, warmup=self.given.observed_steps, observed_tokens=1.0
            )
            model = get_peft_model(load(self.given.model), config)
            self.train(model, self.given.observed_steps, seed=0, learning_rate=rate).save_pretrained(str(folder))

        known = {"learning": learning} if learning else {"observed": importance} if self.given.observed else {}
        folder = self.once(self.folder("observation", observed_steps=self.given.observed_steps, **known), observe)
        return PeftModel.from_pretrained(load(self.given.model), str(folder), is_trainable=True)


def dense(bench: Benchmark, size: float, seed: int) -> Any:
    """The model as it is."""
    return load(bench.given.model)


def dense_lora(bench: Benchmark, size: float, seed: int) -> Any:
    """Plain LoRA of PEFT on the same tokens, merged: what the domain alone gives."""
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return bench.train(get_peft_model(load(bench.given.model), config), bench.given.steps, seed).merge_and_unload()


def one_shot(bench: Benchmark, size: float, seed: int, *, learning: bool = False, **choices: Any) -> Any:
    """The observed model in other metrics and ranks, without training, but for that of a LoRA that is observed while it
    learns, and absorbed."""
    model = bench.observed(choices["importance"] if learning else None)
    for name, value in choices.items():
        setattr(model.peft_config["default"], name, value)
    model.base_model.set_param_ratio(size)
    return model.merge_and_unload()


def modegpt(bench: Benchmark, size: float, seed: int, *, stronger: bool = False) -> Any:
    """MoDeGPT, from the same observation: one ratio in all modules and CR, as published, or what is better."""
    layers = bench.observed().base_model.run().inputs()
    grams = {name: layer.statistics().mean("input_gram") for name, layer in layers.items()}
    choices: dict[str, Any] = {} if stronger else {"attention_ratio": size, "query_key": "cr"}
    return select_neurons(load(bench.given.model), grams, size, **choices)


def svd_llm_lora(bench: Benchmark, size: float, seed: int) -> Any:
    """SVD-LLM and its sequential LoRA: half of the steps on the left factors, half on the right ones."""
    model = one_shot(bench, size, seed, importance="activation", **PUBLISHED)
    for factor in ("left", "right"):
        steps = (bench.given.steps - bench.given.observed_steps) // 2
        config = LoraConfig(r=16, lora_alpha=16, target_modules=rf".*\.{factor}", task_type="CAUSAL_LM")
        model = bench.train(get_peft_model(model, config), steps, seed).merge_and_unload()
    return model


def pruned(bench: Benchmark, size: float, seed: int) -> Any:
    """LoRAPrune: structured pruning by LoRA's sensitivities while it trains."""
    given = bench.given
    arguments = training_arguments(
        CACHE, steps=given.steps, batch=given.batch, learning_rate=given.learning_rate, seed=seed
    )
    return lora_prune(load(given.model), bench.texts.examples, arguments, size)


def ours(bench: Benchmark, size: float, seed: int, *, with_own_text: bool = False, **choices: Any) -> Any:
    """One run of lora_svd: observe, factorize, recover, absorb."""
    config = LoraSVDConfig(**{**choices, **json.loads(bench.given.config), "param_ratio": size})
    examples = bench.with_own_text(seed) if with_own_text else None
    model = get_peft_model(load(bench.given.model), config)
    return bench.train(model, bench.given.steps, seed, examples=examples).merge_and_unload()


def any_size(bench: Benchmark, size: float, seed: int, **choices: Any) -> Any:
    """Every size from the one run that was trained for the smallest of ``--sizes``."""
    given, smallest = bench.given, min(bench.given.sizes)
    choices |= {**json.loads(given.config), "param_ratio": smallest}
    folder = bench.folder("trained", steps=given.steps, learning_rate=given.learning_rate, seed=seed, **choices)
    if not (folder / "adapter_model.safetensors").exists():
        tuned = get_peft_model(load(given.model), LoraSVDConfig(**choices))
        bench.train(tuned, given.steps, seed).save_pretrained(folder)
    model: Any = PeftModel.from_pretrained(load(bench.given.model), str(folder), is_trainable=True)
    model.base_model.set_param_ratio(size)
    return model.merge_and_unload()


@dataclass(frozen=True)
class Row:
    """One line of the table: how its model is made, and whether it depends on the seed and on the size."""

    make: Callable[[Benchmark, float, int], Any]
    trains: bool = False
    dense: bool = False


BEST: dict[str, Any] = {"observed_tokens": 1.0, "train_factors": True, "distillation": 0.5}
ROWS = {
    "dense": Row(dense, dense=True),
    "dense + LoRA": Row(dense_lora, trains=True, dense=True),
    "svd": Row(partial(one_shot, importance="none", **PUBLISHED)),
    "fwsvd": Row(partial(one_shot, importance="fisher", **PUBLISHED)),
    "asvd": Row(partial(one_shot, importance="activation_scale", **PUBLISHED)),
    "svd_llm": Row(partial(one_shot, importance="activation", **PUBLISHED)),
    "kfac_svd": Row(partial(one_shot, importance="kronecker", **PUBLISHED)),
    "lora, as published": Row(partial(one_shot, importance="lora", learning=True, **PUBLISHED)),
    "modegpt": Row(modegpt),
    "modegpt, stronger": Row(partial(modegpt, stronger=True)),
    "ours, lora_diagonal": Row(partial(one_shot, importance="lora_diagonal")),
    "ours, gradient_activation": Row(partial(one_shot, importance="gradient_activation")),
    "ours, lora_activation": Row(partial(one_shot, importance="lora_activation")),
    "ours, kronecker": Row(partial(one_shot, importance="kronecker")),
    "svd_llm + LoRA": Row(svd_llm_lora, trains=True),
    "loraprune": Row(pruned, trains=True),
    "ours + recovery, defaults": Row(ours, trains=True),
    "ours + recovery": Row(partial(ours, **BEST), trains=True),
    "ours + recovery, own text": Row(partial(ours, with_own_text=True, **BEST), trains=True),
    "ours, lora_diagonal + recovery": Row(partial(ours, importance="lora_diagonal", **BEST), trains=True),
    "ours, kronecker + recovery": Row(partial(ours, importance="kronecker", **BEST), trains=True),
    "ours + recovery, any size from one run": Row(partial(any_size, **BEST), trains=True),
}
RANKS_ALONE = ranks_alone(ROWS)


def main() -> None:
    parser: Any = HfArgumentParser(Arguments)  # pyright: ignore[reportArgumentType]
    (given,) = parser.parse_args_into_dataclasses()
    bench = Benchmark(given)
    for name in given.rows or ROWS:
        bench.run(name, (ROWS | RANKS_ALONE)[name])


if __name__ == "__main__":
    main()
