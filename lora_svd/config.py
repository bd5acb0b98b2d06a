"""``LoraSVDConfig``: every choice of a run. JSON-plain values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from peft.config import PeftConfig

from .allocation import ALLOCATIONS, FACTOR_FORMATS
from .decompositions import DECOMPOSITIONS
from .errors import LoraSVDError
from .importance import IMPORTANCES
from .peft_type import LORA_SVD

COMPENSATIONS = ("absorb", "keep")


def option(default: Any, help: str) -> Any:
    """A dataclass field with the help text that HfArgumentParser shows."""
    return field(default=default, metadata={"help": help})


@dataclass
class LoraSVDConfig(PeftConfig):
    """How a model is made smaller while a LoRA is trained on it.

    ``param_ratio`` = parameters kept / original parameters, over the weights of the *targeted* linear layers, bias
    excluded. It is not the share removed, and not the share of the whole model: ``parameter_report`` states that one as
    ``model_param_ratio``.

    LoRA's own fields have LoRA's names and meanings. A run has three phases: *warm-up* (the model is full size and is
    observed), *compression* (its budget falls to the target; 0 = at once) and *recovery* (the rest: the bypass
    compensates for what was cut). ``warmup`` and ``compression`` are fractions of the run below 1, steps from 1 on.

    Measured (SmolLM2-135M, 60 steps of 2,048 tokens of WikiText-2, param_ratio 0.6, one seed; perplexity in multiples
    of the dense model's on WikiText-2 / on C4, which nothing saw): the defaults 1.33 / 3.04; ``train_factors=True,
    distillation=0.5`` 1.28 / 2.51 (at 0.8: 0.87 / 1.25), for more memory and time, and not for a model whose head is
    new: its teacher is the model without adapters. See ``recipes/benchmarks/README.md``.

    Raises:
        LoraSVDError: a value that is out of range or unknown, with the field, the value and what is valid.
    """

    param_ratio: float = option(0.8, "Parameters kept / original parameters of the targeted linear layers, in (0, 1].")
    importance: str = option("lora_activation", f"What an error costs: {', '.join(IMPORTANCES)}.")
    allocation: str = option("global", "'global': one budget for all layers; 'uniform': the same share of each layer.")
    decomposition: str = option("svd", f"Form of the compact weight: {', '.join(DECOMPOSITIONS)}.")
    factor_format: str = option(
        "pivoted", "How rank k is stored: 'pivoted' in k(m+n)-k^2 numbers, 'factors' as two matrices in k(m+n)."
    )
    compensation: str = option(
        "absorb", "At merge the bypass is folded into the rank-k factors ('absorb') or stored as r more ranks ('keep')."
    )
    compact_ranks: dict[str, int] | None = option(
        None,
        "Rank by module name; min(out, in) = dense. Filled by the tuner when it compresses; given, it is used as is.",
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
    row_shrinkage: float = option(1e-2, "Shrinkage of the row metric towards its mean, relative, in [0, 1].")
    correlation_shrinkage: float = option(0.3, "Shrinkage of a full row metric towards its diagonal, in [0, 1].")
    column_shrinkage: float = option(1e-2, "Shrinkage of the column metric towards its mean, relative, in [0, 1].")

    r: int = option(16, "Rank of the LoRA bypass.")
    lora_alpha: int = option(16, "The bypass is scaled by lora_alpha / r.")
    lora_dropout: float = option(0.0, "Dropout in front of the bypass.")
    target_modules: list[str] | str | None = option(
        "all-linear",
        "Names, or a regular expression, of the modules to compress; 'all-linear' = all but the output layer.",
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
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # pyright: ignore[reportAttributeAccessIssue] - as PEFT does
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # pyright: ignore[reportAttributeAccessIssue]
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        self._check_choices()
        self._check_numbers()
        self._check_layers()

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
            if value not in valid:
                raise LoraSVDError(f"{name}: unknown value {value!r}, expected one of {sorted(valid)}")

    def _check_numbers(self) -> None:
        for kind, word, names in (
            (Integral, "an integer", ("r", "compression_interval", "rank_multiple")),
            (Real, "a number", ("param_ratio", "warmup", "compression", "lora_alpha", "lora_dropout")),
            (Real, "a number", ("row_shrinkage", "column_shrinkage", "correlation_shrinkage")),
        ):
            for name in names:
                if not isinstance(getattr(self, name), kind):
                    raise LoraSVDError(f"{name}: got {getattr(self, name)!r}, expected {word}")
        if not 0 < self.param_ratio <= 1:
            raise LoraSVDError(
                f"param_ratio: got {self.param_ratio}, expected a number in (0, 1], the share of the targeted "
                "parameters that is kept"
            )
        for name, least in (("warmup", 0), ("compression", 0)):
            if getattr(self, name) < least:
                raise LoraSVDError(f"{name}: got {getattr(self, name)}, expected a fraction of the run or steps, >= 0")
        for name in ("r", "compression_interval", "rank_multiple"):
            if getattr(self, name) < 1:
                raise LoraSVDError(f"{name}: got {getattr(self, name)}, expected a positive integer")
        for name in ("row_shrinkage", "column_shrinkage", "correlation_shrinkage", "lora_dropout", "distillation"):
            if not 0 <= getattr(self, name) <= 1:
                raise LoraSVDError(f"{name}: got {getattr(self, name)}, expected a number in [0, 1]")
        for name, rank in (self.compact_ranks or {}).items():
            if not isinstance(rank, int) or rank < 1:
                raise LoraSVDError(f"compact_ranks: {name} has rank {rank!r}, expected a positive integer")

    def _check_layers(self) -> None:
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
