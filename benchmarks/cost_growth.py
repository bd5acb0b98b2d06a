"""How cost grows with hidden size: one Llama decoder block with random weights, and what follows for whole models.

    python benchmarks/cost_growth.py benchmarks/cost.jsonl

prints what the "growth" rows of :mod:`cost` measured, and the costs of models of 7 and 70 billion parameters.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import CostArguments, Results, paired, timed
from cost_inference import PROMPT, linear_layers, linear_layers_of_one_token, loaded
from cost_training import Stepper, whole_svd
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_svd.allocation import FACTOR_FORMATS, LayerShape, candidate_ranks, stored_parameters
from lora_svd.analysis.tables import markdown_table
from lora_svd.compact.bnb import num_bytes
from lora_svd.compact.convert import compact_module
from lora_svd.decompositions import Factors
from lora_svd.inputs import layer_metrics

SIZE = {"param_ratio": 0.8, "importance": "lora_diagonal", "allocation": "uniform"}  # uniform: no layer is left dense
INFERENCE_SIZE = 0.4
LARGEST_WHOLE_SVD = 1024  # hidden size; beyond it takes too long
WORK = {"factorization": "factorization", "whole_svds": "whole SVDs and roots", "export": "export"}
MODELS = {"7B": (32, 4096), "70B": (80, 8192)}  # blocks, hidden size
BEYOND = 8192  # hidden size that is not measured


def growth(given: CostArguments, hidden: int) -> dict[str, Any]:
    """All costs of one block in Llama-7B's proportions, with next to no vocabulary."""
    width, heads = 8 * round(hidden * 11008 / 4096 / 8), max(1, hidden // 128)
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=width, num_hidden_layers=1, num_attention_heads=heads
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        block = replace(given, model=folder)
        return {"hidden": hidden, **training(block, hidden), "inference": inference(block)}


def training(given: CostArguments, hidden: int) -> dict[str, Any]:
    """Steps: ratios of seconds, ours / LoRA's; the others: CPU seconds and bytes."""
    ours, theirs = Stepper(given, SIZE), Stepper(given, None)
    found: dict[str, Any] = {"observing": paired(ours, theirs, given.repetitions)}
    run = ours.tuner.run()
    inputs, settings = run.inputs(), run.settings
    sums = {total.data_ptr(): total for layer in inputs.values() for total in layer.statistics().sums.values()}
    found["weight_bytes"] = 4 * sum(layer.shape.parameters for layer in inputs.values())
    found["statistics_bytes"] = sum(map(num_bytes, sums.values()))  # layers may share a Gram matrix
    if hidden <= LARGEST_WHOLE_SVD:
        found["whole_svds"] = cpu_seconds(
            lambda: [whole_svd(layer, layer_metrics(name, layer, settings)) for name, layer in inputs.items()], 1
        )
    found["factorization"] = cpu_seconds(lambda: ours.tuner.set_param_ratio(SIZE["param_ratio"]), given.repetitions)
    found["recovering"] = paired(ours, theirs, given.repetitions)
    return found | {"export": cpu_seconds(ours.tuner.merge_and_unload, 1)}


def cpu_seconds(work: Callable[[], Any], repetitions: int) -> float:
    return round(median(timed(work)[1] for _ in range(repetitions)), 3)


@torch.inference_mode()
def inference(given: CostArguments) -> dict[str, Any]:
    """Ratios of seconds of all linear layers, compact / dense, float32, batch 1. Speed does not ask what they hold."""
    dense, tokens, found = loaded(given.model, "float32"), torch.zeros(1, PROMPT), {}
    for factor_format in FACTOR_FORMATS:
        compact = random_compact(given.model, factor_format)
        for name, work in (("prefill", linear_layers), ("one token", linear_layers_of_one_token)):
            found[f"{name}, {factor_format}"] = paired(work(compact, tokens), work(dense, tokens), given.repetitions)
    return found


def random_compact(folder: str, factor_format: str) -> Any:
    """The block with random factors of uniform rank."""
    model = loaded(folder, "float32")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            shape = LayerShape(*layer.weight.shape)
            ranks, budget = candidate_ranks(shape, factor_format, 8), INFERENCE_SIZE * shape.parameters
            rank = max(rank for rank in ranks if stored_parameters(shape, rank, factor_format) <= budget)
            rows = torch.cat([torch.eye(rank), 0.01 * torch.randn(shape.out_features - rank, rank)])  # pivots: the eye
            factors = Factors(rows[torch.randperm(len(rows))].double(), torch.randn(rank, shape.in_features).double())
            model.set_submodule(name, compact_module(factors, layer, layer.weight, factor_format))
    return model


def exponent(by_size: Mapping[int, float]) -> float:
    """p of ``cost ~ hidden^p`` through the costs at the two largest hidden sizes."""
    small, large = sorted(by_size)[-2:]
    return math.log(by_size[large] / by_size[small]) / math.log(large / small)


def extrapolated(by_size: Mapping[int, float], hidden: int) -> float:
    """The cost at a hidden size, by the power law of :func:`exponent`."""
    largest = max(by_size)
    return by_size[largest] * (hidden / largest) ** exponent(by_size)


def costs(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """What was measured of one block, by name and hidden size."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        values = {f"{label}, seconds": row[name] for name, label in WORK.items() if name in row}
        values |= {f"{name}, GB": row[f"{name}_bytes"] / 1e9 for name in ("statistics", "weight")}
        values |= {f"step, {phase} / LoRA": row[phase]["cpu_ratio"] for phase in ("observing", "recovering")}
        values |= {f"speed at {INFERENCE_SIZE}, {n} / dense": 1 / p["cpu_ratio"] for n, p in row["inference"].items()}
        for name, value in values.items():
            found.setdefault(name, {})[row["hidden"]] = value
    return found


def tables(found: Mapping[str, Mapping[int, float]]) -> str:
    """Costs of one block by hidden size with their exponents, and the sums over the blocks of whole models."""
    sizes = sorted({size for by_size in found.values() for size in by_size})
    block = [["one block, hidden size", *map(str, sizes), "exponent", f"{BEYOND}, extrapolated"]]
    models = [["whole model", *(f"{name}, {blocks} x {hidden}" for name, (blocks, hidden) in MODELS.items())]]
    for name, by_size in found.items():
        known = [number(by_size[size]) if size in by_size else "-" for size in sizes]
        law = [f"{round(exponent(by_size), 2) + 0.0:.2f}", number(extrapolated(by_size, BEYOND))]
        # speed is bounded by 1 / param_ratio and follows no power law
        block.append([name, *known, *(["-", "-"] if name.startswith("speed") else law)])
        if name.endswith(("seconds", "GB")):
            unit = 3600 if name.endswith("seconds") else 1
            sums = [blocks * extrapolated(by_size, hidden) / unit for blocks, hidden in MODELS.values()]
            models.append([name.replace("seconds", "core-hours"), *map(number, sums)])
    return f"{markdown_table(block)}\n\n{markdown_table(models)}"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def main() -> None:
    print(tables(costs(row for row in Results(Path(sys.argv[1])).read() if row["row"].startswith("growth"))))


if __name__ == "__main__":
    main()
