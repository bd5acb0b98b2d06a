"""``LoraSVDConfig``: every choice of a run, and the checks of its values. JSON-plain values only."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from peft.config import PeftConfig

from .allocation import ALLOCATIONS, FACTOR_FORMATS
from .decompositions import DECOMPOSITIONS
from .errors import LoraSVDError
from .importance import IMPORTANCES
from .options import (
    COUNT,
    POSITIVE,
    REAL,
    SHARE,
    by_module,
    check_options,
    flag,
    layer_indices,
    module_names,
    number,
    one_of,
    option,
    optional,
)

COMPENSATIONS = ("absorb", "keep")
PREFIX = "lora_svd_"


class LoraSVDPeftType(enum.StrEnum):
    """The name under which PEFT knows this tuner.

    PEFT's own enum cannot be extended from outside. A string enum whose name equals its value hashes and compares like
    the string, so that the raw JSON value finds it, has the ``.value`` that transformers reads, and pickles by
    reference to this package, which registers the tuner when it is unpickled.
    """

    LORA_SVD = "LORA_SVD"


LORA_SVD = LoraSVDPeftType.LORA_SVD


RATIO = number(REAL, lambda x: 0 < x <= 1, "a number in (0, 1], the share of the targeted parameters that is kept")
_PHASE = number(REAL, lambda x: x >= 0, "a fraction of the run or steps, >= 0")
_TOKENS = number(REAL, lambda x: 0 < x <= 1, "a number in (0, 1], the share of tokens that is observed")


def check_param_ratio(value: Any) -> None:
    """Raise unless ``value`` is a share of parameters to keep."""
    RATIO("param_ratio", value)


def _device(name: str, value: Any) -> None:
    if value not in (None, "cpu"):
        raise LoraSVDError(f"{name}: got {value!r}, expected 'cpu' or None")


@dataclass
class LoraSVDConfig(PeftConfig):
    """How a model is made smaller while a LoRA is trained on it.

    ``param_ratio`` = parameters kept / original parameters, over the weights of the *targeted* linear layers and
    embeddings, bias excluded. It is not the share removed, and not the share of the whole model: ``parameter_report``
    states that one as ``model_param_ratio``.

    LoRA's own fields have LoRA's names and meanings. A run has three phases: *warm-up* (the model is full size and is
    observed), *compression* (its budget falls to the target; 0 = at once) and *recovery* (the rest: the bypass
    compensates for what was cut). ``warmup`` and ``compression`` are fractions of the run below 1, steps from 1 on.

    Quality, time and memory of the choices are measured in ``benchmarks/README.md``: ``train_factors=True,
    distillation=0.5, observed_tokens=1.0`` is better than the defaults, for more memory and time, but not for a model
    whose head is new, since the teacher is the model without adapters; ``importance="kronecker"`` is a little better
    still, ``"lora_diagonal"`` needs a third of the statistics.

    Raises:
        LoraSVDError: a value that is out of range or unknown, with the field, the value and what is valid.
    """

    param_ratio: float = option(
        0.8, "Parameters kept / original parameters of the targeted linear layers, in (0, 1].", check=RATIO
    )
    importance: str = option(
        "lora_activation", f"What an error costs: {', '.join(IMPORTANCES)}.", check=one_of(IMPORTANCES)
    )
    allocation: str = option(
        "global",
        "'global': one budget for all layers; 'uniform': the same share of each layer.",
        check=one_of(ALLOCATIONS),
    )
    decomposition: str = option(
        "svd",
        f"Form of the compact weight: {', '.join(DECOMPOSITIONS)}. 'kronecker': a sum of Kronecker products of "
        "matrices, with factor_format='factors'; 'elementwise': low rank, with importance='fisher_elementwise'.",
        check=one_of(DECOMPOSITIONS),
    )
    factor_format: str = option(
        "pivoted",
        "How rank k is stored: 'pivoted' in k(m+n)-k^2 numbers, 'factors' as two matrices in k(m+n), faster.",
        check=one_of(FACTOR_FORMATS),
    )
    compensation: str = option(
        "absorb",
        "At merge the bypass is folded into the rank-k factors ('absorb') or stored as r more ranks ('keep').",
        check=one_of(COMPENSATIONS),
    )
    compact_ranks: dict[str, int] | None = option(
        None,
        "Rank by module name; the full one = dense. Filled by the tuner when it compresses; if set, it is used as is.",
        check=optional(by_module(COUNT)),
    )
    neurons: bool = option(
        True,
        "Whether neurons of MLPs may go as well, priced by the same loss as ranks; with allocation='global'.",
        check=flag,
    )
    heads: bool = option(
        True,
        "Whether key-value heads of attentions may go as well, with their queries; with neurons.",
        check=flag,
    )
    compact_widths: dict[str, int] | None = option(
        None,
        "Kept neurons, or key-value heads, by the name of the layer that takes them. Filled by the tuner; if set "
        "beside compact_ranks, used as is.",
        check=optional(by_module(COUNT)),
    )
    neuron_groups: dict[str, list[str]] | None = option(
        None,
        "The layers that make the neurons, or heads, of the layer that takes them, by its name. Filled by the tuner in "
        "the first step.",
        check=optional(by_module(module_names(text=False))),
    )
    group_heads: dict[str, int] | None = option(
        None,
        "Number of key-value heads by the name of the layer that takes them. Filled by the tuner in the first step.",
        check=optional(by_module(COUNT)),
    )
    compressed: bool = option(
        False,
        "Whether this adapter holds factors at compact_ranks. Set by the tuner together with compact_ranks.",
        check=flag,
    )
    warmup: float = option(0.4, "Full-size, observed part of the run: a fraction below 1, else steps.", check=_PHASE)
    compression: float = option(
        0.0, "Part of the run over which the budget falls on a cubic; 0 = in one step.", check=_PHASE
    )
    compression_interval: int = option(10, "Steps between two factorizations while the budget falls.", check=COUNT)
    total_steps: int | None = option(
        None, "Optimizer steps of the run, for hand-written loops. Trainer knows it.", check=optional(COUNT)
    )
    distillation: float = option(
        0.0,
        "Share of KL(model with adapters off || compressed model) in the loss of the recovery, in [0, 1].",
        check=SHARE,
    )
    train_factors: bool = option(
        False,
        "Train the factors as well in the recovery: better, at the optimizer memory of the kept parameters.",
        check=flag,
    )
    rank_multiple: int = option(8, "Kept ranks are multiples of this, which is what fast kernels want.", check=COUNT)
    row_shrinkage: float = option(
        1e-2,
        "Shrinkage of the row metric, or of weights of elements, towards its mean, relative, in [0, 1].",
        check=SHARE,
    )
    correlation_shrinkage: float = option(
        0.3, "Shrinkage of a full row metric towards its diagonal, in [0, 1].", check=SHARE
    )
    column_shrinkage: float = option(
        1e-2, "Shrinkage of the column metric towards its mean, relative, in [0, 1].", check=SHARE
    )

    observed_tokens: float = option(
        0.5,
        "Share of the tokens of a batch whose Gram matrices are taken, in (0, 1]; at least 512, or all.",
        check=_TOKENS,
    )
    statistics_limit: int | None = option(
        None,
        "Bytes that the statistics of all layers may take in one process; where Gram matrices do not fit, the widest "
        "layers keep sketches of them, named in a warning. None: no limit.",
        check=optional(COUNT),
    )
    statistics_device: str | None = option(
        None, "Where statistics are kept: 'cpu', or None for where the layer is.", check=_device
    )

    r: int = option(16, "Rank of the LoRA bypass.", check=COUNT)
    lora_alpha: int = option(16, "The bypass is scaled by lora_alpha / r.", check=POSITIVE)
    lora_dropout: float = option(0.0, "Dropout in front of the bypass.", check=SHARE)
    target_modules: list[str] | str | None = option(
        "all-linear",
        "Names, or a regular expression, of the linear layers and embeddings to compress; 'all-linear' = all linear "
        "layers but the output layer.",
        check=optional(module_names()),
    )
    exclude_modules: list[str] | str | None = option(
        None, "Names, or a regular expression, of modules to leave alone.", check=optional(module_names())
    )
    rank_pattern: dict[str, int] | None = option(
        None, "r by module name or regular expression, instead of r.", check=optional(by_module(COUNT, patterns=True))
    )
    alpha_pattern: dict[str, int] | None = option(
        None, "lora_alpha by module name or regular expression.", check=optional(by_module(POSITIVE, patterns=True))
    )
    layers_to_transform: list[int] | int | None = option(
        None, "Indices of the layers to transform.", check=optional(layer_indices)
    )
    layers_pattern: list[str] | str | None = option(
        None, "Name of the layer list layers_to_transform indexes.", check=optional(module_names(patterns=True))
    )
    modules_to_save: list[str] | None = option(
        None,
        "Further modules to train and save, such as a task head.",
        check=optional(module_names(text=False, patterns=True)),
    )
    bias: str = option(
        "none", "Biases to train: 'none', 'all' or 'lora_svd_only'.", check=one_of(("none", "all", "lora_svd_only"))
    )
    init_weights: bool = option(
        True, "True: the bypass starts at zero (B = 0). False: B is random, for tests.", check=flag
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LORA_SVD
        check_options(self)
        self._check_combination()
        self._check_layers()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(names := getattr(self, name), list | tuple):
                setattr(self, name, set(names))  # as PEFT does
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}

    @property
    def prices_neurons(self) -> bool:
        """Whether neurons compete with ranks: of low-rank weights, for which one budget is spent."""
        decomposition = DECOMPOSITIONS[self.decomposition]
        return (
            self.neurons
            and self.allocation == "global"
            and decomposition.is_low_rank
            and not decomposition.elementwise
            and bool(IMPORTANCES[self.importance].statistics)
        )

    @property
    def trains_factors(self) -> bool:
        """Whether factors are trained: asked for, and the adapter is not loaded for inference."""
        return self.train_factors and not self.inference_mode

    def _check_combination(self) -> None:
        """Raise if the form of the weight does not go with the importance, or with what else is stored of it."""
        if self.compact_widths and not self.compact_ranks:
            raise LoraSVDError(
                f"compact_widths: got {self.compact_widths} without compact_ranks, expected both: say which ranks the "
                "layers keep beside, or neither"
            )
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

    def _check_layers(self) -> None:
        """Raise if the fields that choose layers do not go together; PEFT's own messages."""
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
