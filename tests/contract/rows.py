"""The configurations of ``LoraSVDConfig`` that PEFT's contract is run with.

A row with a ``param_ratio`` below 1 is observed while PEFT's tests train it; a row that keeps the whole budget is not.
In the tests of the former, ``merge_and_unload`` gets ``compact=False``, which is what PEFT means by it (see the
plugin): the compact model differs from the adapter on purpose.
"""

from __future__ import annotations

from typing import Any

import pytest

from lora_svd import LoraSVDConfig

Kwargs = dict[str, Any]
WHOLE: Kwargs = {"param_ratio": 1.0}
BOTH_LAYERS: Kwargs = {"target_modules": ["lin0", "lin1"]}

# An adapter as it is built from the config of a compressed one: with factors, which are zero without a checkpoint. So
# it does not start as the identity, which these tests are about.
COMPRESSED: Kwargs = WHOLE | BOTH_LAYERS | {"compact_ranks": {"lin0": 4, "lin1": 1}, "compressed": True}
IDENTITY_TESTS = ("test_disable_adapters", "test_disable_adapters_with_merging")

# What is adapted, on PEFT's smallest models.
SELECTIONS: dict[str, tuple[str, Kwargs]] = {
    "name": ("MLP", {"target_modules": "lin0"}),
    "regex": ("MLP", {"target_modules": r"^lin\d$"}),
    "list": ("MLP", {"target_modules": ["lin0"]}),
    "two modules": ("MLP", BOTH_LAYERS),
    "default targets": ("MLP", {}),
    "excluded module": ("MLP", {**BOTH_LAYERS, "exclude_modules": ["lin1"]}),
    "excluded regex": ("MLP", {"exclude_modules": r".*1$"}),
    "modules to save": ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "wide layer": ("MLP2", {**BOTH_LAYERS, "r": 4}),
    "Conv1D": ("EmbConv1D", {"target_modules": ["conv1d"]}),
    "Conv1D and Linear": ("EmbConv1D", {"target_modules": ["conv1d", "lin0"]}),
}

# How it is adapted, with the weights whole and unobserved.
VARIANTS: dict[str, Kwargs] = {
    "rank and alpha": {"r": 2, "lora_alpha": 32},
    "patterns": {"r": 2, "rank_pattern": {"lin1": 4}, "alpha_pattern": {"lin0": 3}},
    "dropout": {"lora_dropout": 0.1},
    "ranks given": {"compact_ranks": {"lin0": 5, "lin1": 1}},
}

# How it is adapted, observed while it trains: every importance, every storage of the factors.
OBSERVED: dict[str, Kwargs] = {
    "lora": {"importance": "lora", "allocation": "uniform"},
    "lora_minnorm": {"importance": "lora_minnorm", "compensation": "keep"},
    "fisher": {"importance": "fisher"},
    "activation_scale": {"importance": "activation_scale", "factor_format": "factors"},
    "activation": {"importance": "activation", "factor_format": "factors", "allocation": "uniform"},
    "lora_activation": {"importance": "lora_activation", "factor_format": "pivoted", "lora_dropout": 0.1},
    "gradient_activation": {"importance": "gradient_activation"},
    "kronecker": {"importance": "kronecker"},
    "none": {"importance": "none"},
    "fisher_elementwise": {"importance": "fisher_elementwise", "decomposition": "elementwise"},
    "Kronecker products": {"decomposition": "kronecker", "factor_format": "factors"},
}


def _custom_models() -> list[tuple[str, str, type[LoraSVDConfig], Kwargs]]:
    rows = [(name, model, WHOLE | kwargs) for name, (model, kwargs) in SELECTIONS.items()]
    rows += [(name, "MLP", WHOLE | BOTH_LAYERS | kwargs) for name, kwargs in VARIANTS.items()]
    rows += [(name, "MLP", BOTH_LAYERS | kwargs) for name, kwargs in OBSERVED.items()]
    rows.append(("compressed", "MLP", COMPRESSED))
    rows.append(("observed Conv1D", "EmbConv1D", {"target_modules": ["conv1d", "lin0"]}))
    return [(f"LoraSVD {name}", model, LoraSVDConfig, kwargs) for name, model, kwargs in rows]


CUSTOM_MODELS = _custom_models()

ADAPTER_PAIRS: dict[str, tuple[Kwargs, Kwargs]] = {
    "Same": ({"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    "Different": ({"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    "Overlapping": ({"target_modules": ["lin0"]}, BOTH_LAYERS),
    "Ranks": ({"target_modules": ["lin0"], "r": 2}, {"target_modules": ["lin0"], "r": 4, "lora_alpha": 32}),
    "Methods": (
        {"target_modules": ["lin0"], "importance": "activation", "factor_format": "factors"},
        {"target_modules": ["lin0"], "importance": "lora_activation", "factor_format": "pivoted"},
    ),
}


def _multiple_adapters() -> list[tuple[str, str, type[LoraSVDConfig], Kwargs, Kwargs]]:
    random = {"init_weights": False}
    whole = {name: (WHOLE | first, WHOLE | second) for name, (first, second) in ADAPTER_PAIRS.items()}
    observed = {f"observed {name}": pair for name, pair in ADAPTER_PAIRS.items()}
    compressed = {
        "Compressed": (COMPRESSED, COMPRESSED),
        "Compressed and whole": (COMPRESSED, WHOLE | BOTH_LAYERS),
    }
    return [
        (f"LoraSVD {name}", "lora_svd", LoraSVDConfig, first | random, second | random)
        for name, (first, second) in (whole | observed | compressed).items()
    ]


MULTIPLE_ADAPTERS = _multiple_adapters()

# On real architectures: our defaults but for the rank, which PEFT's tests of the conversion to LoRA want small; PEFT's
# default modules of each architecture, with the weights whole; two-sided statistics and no other default.
ARCHITECTURES: dict[str, Kwargs] = {
    "default": {"r": 4},
    "mapped": WHOLE | {"target_modules": None, "r": 4, "lora_alpha": 8, "lora_dropout": 0.05},
    "two_sided": {
        "target_modules": None,
        "importance": "kronecker",
        "allocation": "uniform",
        "factor_format": "factors",
        "compensation": "keep",
    },
}


# 'all-linear' takes more than a task can use: a layer without gradients, or a head that PEFT itself trains and saves.
UNUSED = {"FEATURE_EXTRACTION": r".*pooler.*", "TOKEN_CLS": "classifier", "QUESTION_ANS": "qa_outputs"}


def architecture_rows(task_type: str) -> list[Any]:
    """One row per entry of ``ARCHITECTURES`` for the test matrix of a task."""
    common: Kwargs = {"task_type": task_type}
    if task_type in UNUSED:
        common["exclude_modules"] = UNUSED[task_type]
    return [
        pytest.param(LoraSVDConfig, common | kwargs, id=f"LoraSVDConfig-{name}")
        for name, kwargs in ARCHITECTURES.items()
    ]


# PEFT's loaders expect 24 quantized layers, which is every linear layer of the local model: each row targets them all.
QUANTIZATION: list[tuple[type[LoraSVDConfig], Kwargs]] = [
    (LoraSVDConfig, WHOLE | {"r": 2, "lora_alpha": 2}),
    (LoraSVDConfig, {"r": 8, "target_modules": r".*layers.*(proj|fc1|fc2)$"}),
    (LoraSVDConfig, {"r": 4, "lora_alpha": 4, "importance": "kronecker", "factor_format": "factors"}),
]

CONFIGS: tuple[tuple[type[LoraSVDConfig], Kwargs], ...] = ((LoraSVDConfig, {}),)
