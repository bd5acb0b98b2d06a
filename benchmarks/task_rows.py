"""The rows of ``task_model.py``: how each method makes a dense classifier smaller."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from common import PUBLISHED, ranks_alone
from kngpt2 import kronecker_products, taught_by
from lora_prune import lora_prune
from lpaf import prune, train_mixed, unwrap, wrap
from peft import LoraConfig, get_peft_model
from tensorgpt import tensor_trains
from transformers import set_seed

if TYPE_CHECKING:
    from task_model import Benchmark


def dense(bench: Benchmark, size: float, seed: int) -> Any:
    """All parameters trained on the task."""
    return bench.dense(seed)


def dense_longer(bench: Benchmark, size: float, seed: int) -> Any:
    """The same, trained for as many steps in all as the rows that train."""
    return bench.dense(seed, bench.given.dense_steps + bench.given.steps)


def dense_lora(bench: Benchmark, size: float, seed: int) -> Any:
    """The encoder with a LoRA and the head trained on the task, as PEFT does, for as many steps as the dense model."""
    given = bench.given
    set_seed(seed)  # the head and the LoRA are random
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(bench.encoder(), config)
    return bench.train(model, steps=given.dense_steps, rate=given.learning_rate, seed=seed).merge_and_unload()


def one_shot(bench: Benchmark, size: float, seed: int, **choices: Any) -> Any:
    """The dense model, observed and cut, without training."""
    model = bench.observed(seed, **choices)
    model.base_model.set_param_ratio(size)
    return model.merge_and_unload()


def retraining_rate(bench: Benchmark, size: float) -> float:
    """At which a cut model is trained again: what has lost little is trained little. Of three rates the best for
    "svd + training" on kept-out sentences."""
    return bench.given.learning_rate / 6 if size > 0.5 else bench.given.learning_rate


def retrained(bench: Benchmark, size: float, seed: int, **choices: Any) -> Any:
    """The same, with all parameters of the compact model trained."""
    model = one_shot(bench, size, seed, **choices)
    steps = bench.given.steps - bench.given.observed_steps
    return bench.train(model, steps=steps, rate=retraining_rate(bench, size), seed=seed)


def kngpt2(bench: Benchmark, size: float, seed: int, *, trained: bool) -> Any:
    """One Kronecker product a weight, without training or taught by the dense model."""
    given, model = bench.given, bench.dense(seed)
    model = kronecker_products(model, bench.block_linears(model), size)
    if trained:
        with taught_by(bench.dense(seed), model):
            bench.train(model, steps=given.steps, rate=retraining_rate(bench, size), seed=seed)
    return model


def tensorgpt(bench: Benchmark, size: float, seed: int, *, trained: bool) -> Any:
    """Every token's embedding as a tensor train, without training or with."""
    model = tensor_trains(bench.dense(seed), size)
    rate = retraining_rate(bench, size)
    return bench.train(model, steps=bench.given.steps, rate=rate, seed=seed) if trained else model


def lpaf(bench: Benchmark, size: float, seed: int, *, trained: bool) -> Any:
    """Pruned and factorized, without training (as many steps are observed as elsewhere) or with, half of it pruning."""
    given, model = bench.given, bench.dense(seed)
    layers = wrap(model, bench.block_linears(model))
    pruning, rate = (given.steps // 2, retraining_rate(bench, size)) if trained else (given.observed_steps, 0.0)
    set_seed(seed)
    prune(layers, bench.trainer(model, steps=pruning, rate=rate, seed=seed), size)
    if trained:
        train_mixed(layers, bench.trainer(model, steps=given.steps - pruning, rate=rate, seed=seed))
    return unwrap(model)


def ours(bench: Benchmark, size: float, seed: int, *, one_run: bool = False, **choices: Any) -> Any:
    """lora_svd on the dense model, which teaches it, or in one run from an encoder that knows no task."""
    given = bench.given
    set_seed(seed)  # the head is random
    start = bench.encoder() if one_run else bench.dense(seed)
    fixed = {"param_ratio": size, "importance": "kronecker", "bias": "all", "train_factors": True}
    choices = {**fixed, **choices, **json.loads(given.config)}
    steps = given.steps + given.dense_steps * one_run
    warmup = given.dense_steps if one_run else given.observed_steps
    model = bench.adapted(start, warmup=warmup, **choices)
    return bench.train(model, steps=steps, rate=given.learning_rate, seed=seed).merge_and_unload()


def pruned(bench: Benchmark, size: float, seed: int) -> Any:
    """LoRAPrune on the dense model, with the biases and whole modules trained that ours trains."""
    given, model = bench.given, bench.dense(seed)
    set_seed(seed)  # the LoRA is random
    return lora_prune(
        model,
        bench.train_set,
        bench.arguments(steps=given.steps, rate=given.learning_rate, seed=seed),
        size,
        bias="all",
        modules_to_save=given.whole,
        data_collator=bench.collator,
    )


@dataclass(frozen=True)
class Row:
    """One line of the table and how its model is made."""

    make: Callable[[Benchmark, float, int], Any]
    dense: bool = False


EMBEDDING = {"target_modules": ["word_embeddings"], "modules_to_save": ["LayerNorm", "pooler", "classifier"]}
BLOCKS_AND_EMBEDDING = {
    "target_modules": r".*\.(query|key|value|word_embeddings)|.*\.encoder\..*\.dense",
    "modules_to_save": ["position_embeddings", "token_type_embeddings", *EMBEDDING["modules_to_save"]],
}
METHODS: dict[str, dict[str, Any]] = {
    "svd": {"importance": "none", **PUBLISHED},
    "fwsvd": {"importance": "fisher", **PUBLISHED},
    "tfwsvd": {"importance": "fisher_elementwise", "decomposition": "elementwise", **PUBLISHED},
    "shapeshifter": {"importance": "none", "decomposition": "kronecker", **PUBLISHED},
    "ours, kronecker": {"importance": "kronecker"},
    "albert": {"importance": "none", **PUBLISHED, **EMBEDDING},
    "ours, embedding": {"importance": "kronecker", **EMBEDDING},
}
ROWS = {
    "dense": Row(dense, dense=True),
    "dense, LoRA": Row(dense_lora, dense=True),
    "dense, all steps": Row(dense_longer, dense=True),
    **{name: Row(partial(one_shot, **choices)) for name, choices in METHODS.items()},
    **{f"{name} + training": Row(partial(retrained, **choices)) for name, choices in METHODS.items()},
    "kngpt2": Row(partial(kngpt2, trained=False)),
    "kngpt2 + training": Row(partial(kngpt2, trained=True)),
    "tensorgpt": Row(partial(tensorgpt, trained=False)),
    "tensorgpt + training": Row(partial(tensorgpt, trained=True)),
    "lpaf": Row(partial(lpaf, trained=False)),
    "lpaf + training": Row(partial(lpaf, trained=True)),
    "loraprune + training": Row(pruned),
    "ours, one run": Row(partial(ours, one_run=True)),
    "ours, distilled": Row(partial(ours, distillation=0.5)),
    "ours, embedding, distilled": Row(partial(ours, distillation=0.5, **BLOCKS_AND_EMBEDDING)),
}
RANKS_ALONE = ranks_alone(ROWS)
