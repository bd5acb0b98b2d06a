"""``LoraSVDConfig``: every choice of a run. JSON-plain values only."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import UnionType
from typing import Any

from peft.config import PeftConfig

from .allocation import ALLOCATIONS, FACTOR_FORMATS
from .decompositions import DECOMPOSITIONS
from .errors import LoraSVDError
from .importance import IMPORTANCES
from .peft_type import LORA_SVD

COMPENSATIONS = ("absorb", "keep")
STATISTICS_DEVICES = (None, "cpu")


@dataclass(frozen=True)
class _Number:
    """A kind of number: neither a bool nor infinite, and accepted by ``accept``."""

    type: type | UnionType
    accept: Callable[[Any], bool]
    expected: str

    def check(self, name: str, value: Any) -> None:
        """Raise unless ``value`` is one; ``name`` says of what it is the value."""
        is_number = isinstance(value, self.type) and not isinstance(value, bool)
        if not (is_number and abs(value) < math.inf and self.accept(value)):
            raise LoraSVDError(f"{name}: got {value!r}, expected {self.expected}")


_REAL = int | float
_COUNT = _Number(int, lambda x: x >= 1, "a positive integer")
_POSITIVE = _Number(_REAL, lambda x: x > 0, "a positive number")
_SHARE = _Number(_REAL, lambda x: 0 <= x <= 1, "a number in [0, 1]")
_PHASE = _Number(_REAL, lambda x: x >= 0, "a fraction of the run or steps, >= 0")
_RATIO = _Number(_REAL, lambda x: 0 < x <= 1, "a number in (0, 1], the share of the targeted parameters that is kept")
_NUMBERS = {
    "param_ratio": _RATIO,
    "observed_tokens": _Number(_REAL, lambda x: 0 < x <= 1, "a number in (0, 1], the share of tokens that is observed"),
    "lora_alpha": _POSITIVE,
    **dict.fromkeys(("r", "compression_interval", "rank_multiple"), _COUNT),
    **dict.fromkeys(("warmup", "compression"), _PHASE),
    **dict.fromkeys(("row_shrinkage", "column_shrinkage", "correlation_shrinkage"), _SHARE),
    **dict.fromkeys(("lora_dropout", "distillation"), _SHARE),
}


def check_param_ratio(value: Any) -> None:
    """Raise unless ``value`` is a share of parameters to keep."""
    _RATIO.check("param_ratio", value)


def option(default: Any, help: str) -> Any:
    """A dataclass field with the help text that HfArgumentParser shows."""
    return field(default=default, metadata={"help": help})


@dataclass
class LoraSVDConfig(PeftConfig):
    """How a model is made smaller while a LoRA is trained on it.

    ``param_ratio`` = parameters kept / original parameters, over the weights of the *targeted* linear layers and
    embeddings, bias excluded. It is not the share removed, and not the share of the whole model: ``parameter_report``
    states that one as ``model_param_ratio``.

    LoRA's own fields have LoRA's names and meanings. A run has three phases: *warm-up* (the model is full size and is
    observed), *compression* (its budget falls to the target; 0 = at once) and *recovery* (the rest: the bypass
    compensates for what was cut). ``warmup`` and ``compression`` are fractions of the run below 1, steps from 1 on.

    Measured (SmolLM2-135M, 60 steps of 2,048 tokens of WikiText-2, param_ratio 0.6, one seed or three; perplexity in
    multiples of the dense model's on WikiText-2 / on C4, which nothing saw): the defaults 1.25 / 2.96;
    ``train_factors=True, distillation=0.5, observed_tokens=1.0`` 1.20 / 2.41 (at 0.8: 0.85 / 1.23), for more memory and
    time, and not for a model whose head is new: its teacher is the model without adapters. Those with
    ``importance="kronecker"`` besides 1.19 / 2.39 (0.85 / 1.21), with ``"lora_diagonal"``, for a third of the
    statistics, 1.28 / 2.51 (0.87 / 1.25). See ``recipes/benchmarks/README.md``.

    Raises:
        LoraSVDError: a value that is out of range or unknown, with the field, the value and what is valid.
    """

    param_ratio: float = option(0.8, "Parameters kept / original parameters of the targeted linear layers, in (0, 1].")
    importance: str = option("lora_activation", f"What an error costs: {', '.join(IMPORTANCES)}.")
    allocation: str = option("global", "'global': one budget for all layers; 'uniform': the same share of each layer.")
    decomposition: str = option(
        "svd",
        f"Form of the compact weight: {', '.join(DECOMPOSITIONS)}. 'kronecker': a sum of Kronecker products of "
        "matrices, with factor_format='factors'; 'elementwise': low rank, with importance='fisher_elementwise'.",
    )
    factor_format: str = option(
        "pivoted", "How rank k is stored: 'pivoted' in k(m+n)-k^2 numbers, 'factors' as two matrices in k(m+n), faster."
    )
    compensation: str = option(
        "absorb", "At merge the bypass is folded into the rank-k factors ('absorb') or stored as r more ranks ('keep')."
    )
    compact_ranks: dict[str, int] | None = option(
        None,
        "Rank by module name; the full one = dense. Filled by the tuner when it compresses; given, it is used as is.",
    )
    compressed: bool = option(
        False, "Whether this adapter holds factors at compact_ranks. Set by the tuner together with compact_ranks."
    )
    warmup: float = option(0.4, "Full-size, observed part of the run: a fraction below 1, else steps.")
    compression: float = option(0.0, "Part of the run over which the budget falls on a cubic; 0 = in one step.")
    compression_interval: int = option(10, "Steps between two factorizations while the budget falls.")
    total_steps: int | None = option(None, "Optimizer steps of the run, for hand-written loops. Trainer knows it.")
    distillation: float = option(
        0.0, "Share of KL(model with adapters off || compressed model) in the loss of the recovery, in [0, 1]."
    )
    train_factors: bool = option(
        False, "Train the factors as well in the recovery: better, at the optimizer memory of the kept parameters."
    )
    rank_multiple: int = option(8, "Kept ranks are multiples of this, which is what fast kernels want.")
    row_shrinkage: float = option(
        1e-2, "Shrinkage of the row metric, or of weights of elements, towards its mean, relative, in [0, 1]."
    )
    correlation_shrinkage: float = option(0.3, "Shrinkage of a full row metric towards its diagonal, in [0, 1].")
    column_shrinkage: float = option(1e-2, "Shrinkage of the column metric towards its mean, relative, in [0, 1].")

    observed_tokens: float = option(
        0.5, "Share of the tokens of a batch whose Gram matrices are taken, in (0, 1]; at least 512, or all."
    )
    statistics_limit: int | None = option(
        None,
        "Bytes that the statistics of all layers may take in one process; where Gram matrices do not fit, the widest "
        "layers keep sketches of them, named in a warning. None: no limit.",
    )
    statistics_device: str | None = option(None, "Where statistics are kept: 'cpu', or None for where the layer is.")

    r: int = option(16, "Rank of the LoRA bypass.")
    lora_alpha: int = option(16, "The bypass is scaled by lora_alpha / r.")
    lora_dropout: float = option(0.0, "Dropout in front of the bypass.")
    target_modules: list[str] | str | None = option(
        "all-linear",
        "Names, or a regular expression, of the linear layers and embeddings to compress; 'all-linear' = all linear "
        "layers but the output layer.",
    )
    exclude_modules: list[str] | str | None = option(None, "Names, or a regular expression, of modules to leave alone.")
    rank_pattern: dict[str, int] | None = option(None, "r by module name or regular expression, instead of r.")
    alpha_pattern: dict[str, int] | None = option(None, "lora_alpha by module name or regular expression.")
    layers_to_transform: list[int] | int | None = option(None, "Indices of the layers to transform.")
    layers_pattern: list[str] | str | None = option(None, "Name of the layer list layers_to_transform indexes.")
    modules_to_save: list[str] | None = option(None, "Further modules to train and save, such as a task head.")
    bias: str = option("none", "Biases to train: 'none', 'all' or 'lora_svd_only'.")
    init_weights: bool = option(True, "True: the bypass starts at zero (B = 0). False: B is random, for tests.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LORA_SVD
        self._check_choices()
        self._check_combination()
        self._check_numbers()
        self._check_names()
        self._check_layers()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(given := getattr(self, name), list | tuple):
                setattr(self, name, set(given))  # as PEFT does
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}

    @property
    def trains_factors(self) -> bool:
        """Whether factors are trained: asked for, and the adapter is not loaded for inference."""
        return self.train_factors and not self.inference_mode

    def _check_choices(self) -> None:
        for name, valid in (
            ("importance", IMPORTANCES),
            ("allocation", ALLOCATIONS),
            ("decomposition", DECOMPOSITIONS),
            ("factor_format", FACTOR_FORMATS),
            ("compensation", COMPENSATIONS),
            ("bias", ("none", "all", "lora_svd_only")),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in valid:
                raise LoraSVDError(f"{name}: unknown value {value!r}, expected one of {sorted(valid)}")
        if self.statistics_device not in STATISTICS_DEVICES:
            raise LoraSVDError(f"statistics_device: got {self.statistics_device!r}, expected 'cpu' or None")
        for name in ("compressed", "train_factors", "init_weights"):
            if not isinstance(getattr(self, name), bool):
                raise LoraSVDError(f"{name}: got {getattr(self, name)!r}, expected True or False")

    def _check_combination(self) -> None:
        """Raise if the form of the weight does not go with the importance, or with what else is stored of it."""
        decomposition = DECOMPOSITIONS[self.decomposition]
        if decomposition.elementwise != IMPORTANCES[self.importance].elementwise:
            fits = [name for name, other in IMPORTANCES.items() if other.elementwise == decomposition.elementwise]
            weighs = "every element on its own" if decomposition.elementwise else "rows and columns"
            raise LoraSVDError(
                f"importance: got {self.importance!r} with decomposition={self.decomposition!r}, which weighs "
                f"{weighs}: expected one of {sorted(fits)}; or set another decomposition"
            )
        if decomposition.is_low_rank:
            return
        for name, valid, reason in (
            ("factor_format", "factors", "a sum of Kronecker products has no rows of its weight to store"),
            ("compensation", "absorb", "a bypass of rank r is no sum of r Kronecker products"),
        ):
            if getattr(self, name) != valid:
                raise LoraSVDError(
                    f"{name}: got {getattr(self, name)!r} with decomposition={self.decomposition!r}, expected "
                    f"{valid!r}: {reason}"
                )

    def _check_numbers(self) -> None:
        for name, number in _NUMBERS.items():
            number.check(name, getattr(self, name))
        for name in ("total_steps", "statistics_limit"):
            if getattr(self, name) is not None:
                _COUNT.check(name, getattr(self, name))
        by_module = {"rank_pattern": _COUNT, "alpha_pattern": _POSITIVE, "compact_ranks": _COUNT}
        for name, number in by_module.items():
            given = {} if getattr(self, name) is None else getattr(self, name)
            if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
                raise LoraSVDError(f"{name}: got {given!r}, expected a dictionary with names of modules as keys")
            for key, value in given.items():
                number.check(f"{name}: {key}", value)

    def _check_names(self) -> None:
        """Fields that name modules: their types, and whether what PEFT reads as regular expressions are some."""
        for name, may_be_text in (
            ("target_modules", True),
            ("exclude_modules", True),
            ("layers_pattern", True),
            ("modules_to_save", False),
        ):
            given = getattr(self, name)
            is_list = isinstance(given, list | tuple | set) and all(isinstance(entry, str) for entry in given)
            if not (given is None or is_list or (may_be_text and isinstance(given, str))):
                names = "names in a list or a regular expression" if may_be_text else "names in a list"
                raise LoraSVDError(f"{name}: got {given!r}, expected {names}")
            if isinstance(given, str):
                _check_regex(name, given)
        for name in ("layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern"):
            for entry in getattr(self, name) or ():
                _check_regex(name, entry)

    def _check_layers(self) -> None:
        indices = self.layers_to_transform if isinstance(self.layers_to_transform, list) else [self.layers_to_transform]
        if indices != [None] and not all(type(index) is int and index >= 0 for index in indices):
            raise LoraSVDError(
                f"layers_to_transform: got {self.layers_to_transform!r}, expected an index >= 0 or a list of them"
            )
        # "all-linear" stands for a list of names and is no regular expression.
        is_regex = isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear"
        if is_regex and self.layers_to_transform is not None:
            raise LoraSVDError(
                "`layers_to_transform` cannot be used when `target_modules` is a str: name them in a list"
            )
        if is_regex and self.layers_pattern is not None:
            raise LoraSVDError("`layers_pattern` cannot be used when `target_modules` is a str: name them in a list")
        if self.layers_pattern and self.layers_to_transform is None:
            raise LoraSVDError("When `layers_pattern` is specified, `layers_to_transform` must also be specified")


def _check_regex(name: str, text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise LoraSVDError(f"{name}: got {text!r}, expected a regular expression: {error}") from error
