"""What lora_svd costs beside PEFT's LoRA, and how fast what it leaves is: paired, interleaved measurements.

Every row compares two things in one process, a repetition of each in turn, and reports medians of wall and of CPU time;
``run`` trains both at the same time, in two processes of one thread. Ratios mean something on a busy machine, seconds
do not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import CostArguments, Results
from cost_growth import growth
from cost_inference import inference, inference_of
from cost_training import factorization, search, training_step, whole_run
from transformers import HfArgumentParser

SIZE = {"param_ratio": 0.8}
TWO_SIDED = {**SIZE, "importance": "kronecker"}
ROWS: dict[str, Callable[[CostArguments], dict[str, Any]]] = {
    "step, observing": partial(training_step, config=SIZE, observing=True),
    "step, observing, lora_diagonal": partial(
        training_step, config={**SIZE, "importance": "lora_diagonal"}, observing=True
    ),
    "step, observing, kronecker": partial(training_step, config=TWO_SIDED, observing=True),
    "step, observing, all tokens": partial(training_step, config={**SIZE, "observed_tokens": 1.0}, observing=True),
    "step, recovering": partial(training_step, config=SIZE, observing=False),
    "step, recovering, 0.6": partial(training_step, config={"param_ratio": 0.6}, observing=False),
    "step, recovering, 0.4": partial(training_step, config={"param_ratio": 0.4}, observing=False),
    "step, recovering, distilled": partial(training_step, config={**SIZE, "distillation": 0.5}, observing=False),
    "factorization, kronecker": partial(factorization, config=TWO_SIDED),
    "search for neurons, heads and ranks, kronecker": partial(search, config={**TWO_SIDED, "param_ratio": 0.6}),
    "inference, pivoted": partial(inference, factor_format="pivoted", dtype="float32"),
    "inference, pivoted, bfloat16": partial(inference, factor_format="pivoted", dtype="bfloat16"),
    "inference, factors": partial(inference, factor_format="factors", dtype="float32"),
    "inference of compact models": partial(inference_of, dtype="float32"),
    "run": partial(whole_run, config=SIZE),
    "run, distilled": partial(whole_run, config={**SIZE, "distillation": 0.5}),
    **{f"growth, {hidden}": partial(growth, hidden=hidden) for hidden in (512, 1024, 2048, 4096)},
}


def main() -> None:
    (given,) = HfArgumentParser((CostArguments,)).parse_args_into_dataclasses()  # pyright: ignore[reportArgumentType]
    results = Results(Path(given.results))
    for name in given.rows or ROWS:
        if not results.has(row=name):
            results.add({"row": name, "threads": torch.get_num_threads(), **ROWS[name](given)})


if __name__ == "__main__":
    main()
