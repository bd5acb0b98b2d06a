"""Loading of compact models through transformers' own ``from_pretrained``, and what they say about themselves.

The ranks stand in ``config.json`` as a quantization config of the method "lora_svd", whose quantizer gives the empty
model its low-rank layers before the weights are read. Afterwards the model is a plain one. A reader without this
package makes dense layers, whose ``weight`` has another shape than the marker in the checkpoint: it fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..allocation import FACTOR_FORMATS
from ..errors import LoraSVDError
from .checks import check_tensors, check_types, saved_shapes
from .quantized import empty_quantized, inner_quantizer, keep_unpacked, quantized_names
from .standalone import LowRankEmbedding, LowRankLinear, empty_low_rank, layer_features, tie_head

FORMAT_VERSION = 1


class LoraSVDCompactConfig(QuantizationConfigMixin):
    """What a compact checkpoint says about itself.

    Attributes:
        ranks: stored rank of each targeted module; one that is stored dense has ``min(out, in)``.
        splits: [m1, n1] of the modules that are sums of Kronecker products, as in ``LowRankLinear``.
        tied: the low-rank embedding by the name of the output layer that uses it.
        factor_format: "pivoted" or "factors".
        dense_parameters: numbers in the targeted weights before compression, the denominator of ``param_ratio``.
        tied_parameters: those of them that were the weight of another module as well (a head tied to the embedding).
        method: how it was made: importance, allocation, decomposition, compensation (of a bypass, if there was one).
        bitsandbytes: a ``BitsAndBytesConfig`` as a dict, if some weights are quantized.
        quantized: names of the linear layers, factors included, whose weights are.
        checksums: SHA-256 of the weights' files by name, if ``save_compact`` wrote them; checked while loading.
        format_version: of the layout of the tensors.
    """

    def __init__(
        self,
        ranks: Mapping[str, int] | None = None,
        factor_format: str = "pivoted",
        dense_parameters: int = 0,
        tied_parameters: int = 0,
        method: Mapping[str, Any] | None = None,
        bitsandbytes: Mapping[str, Any] | None = None,
        quantized: Iterable[str] = (),
        checksums: Mapping[str, str] | None = None,
        splits: Mapping[str, list[int]] | None = None,
        tied: Mapping[str, str] | None = None,
        format_version: int = FORMAT_VERSION,
        **_: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise LoraSVDError(
                f"format_version: this compact checkpoint has {format_version!r}, this package reads {FORMAT_VERSION}; "
                "upgrade lora_svd"
            )
        if factor_format not in FACTOR_FORMATS:
            raise LoraSVDError(
                f"factor_format: unknown value {factor_format!r}, expected one of {sorted(FACTOR_FORMATS)}"
            )
        check_types(
            ranks,
            quantized,
            splits,
            counts={"dense_parameters": dense_parameters, "tied_parameters": tied_parameters},
            mappings={"method": method, "bitsandbytes": bitsandbytes, "checksums": checksums, "tied": tied},
        )
        self.quant_method: Any = "lora_svd"
        self.ranks = dict(ranks or {})
        self.splits = dict(splits or {})
        self.tied = dict(tied or {})
        self.factor_format = factor_format
        self.dense_parameters = dense_parameters
        self.tied_parameters = tied_parameters
        self.method = dict(method or {})
        self.bitsandbytes = dict(bitsandbytes) if bitsandbytes else None
        self.quantized = list(quantized)
        self.checksums = dict(checksums or {})
        self.format_version = format_version


class LoraSVDCompactQuantizer(HfQuantizer):
    """Builds the low-rank layers of a compact checkpoint; loads nothing but tensors.

    Weights that are quantized are left to transformers' quantizer of bitsandbytes.
    """

    requires_calibration = True  # refuses to be asked for on a dense checkpoint
    quantization_config: LoraSVDCompactConfig

    def __init__(self, quantization_config: LoraSVDCompactConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        given = quantization_config.bitsandbytes
        self._inner = inner_quantizer(given) if given else None
        if self._inner is not None:
            self.serialized_names = self._inner.serialized_names

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self._inner is not None:
            self._inner.validate_environment(*args, **kwargs)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return self._inner is not None and self._inner.param_needs_quantization(model, param_name, **kwargs)

    @property
    def quantized_element_size(self) -> float | None:
        return None if self._inner is None else self._inner.quantized_element_size

    def get_load_operations(self) -> dict[str, Any]:
        return {} if self._inner is None else self._inner.get_load_operations()

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        config = self.quantization_config
        packed = {f"{name}.weight" for name in config.quantized}
        shapes = saved_shapes(checkpoint_files or [], model.name_or_path, config.checksums)
        prefix = model.base_model_prefix + "."
        plain = {key: shape for key, shape in shapes.items() if key not in packed}
        _check_ranks(config, plain, prefix)
        for saved_name, rank in config.ranks.items():
            name, dense = _find(model, saved_name)
            untie(model, name)
            if len(plain.get(f"{saved_name}.weight", ())) == 2:  # stored dense, maybe for a head of another size
                continue
            _replace(model, name, dense, rank, config.factor_format, config.splits.get(saved_name))
        for saved_head, saved_name in config.tied.items():
            (head, module), (name, embedding) = _find(model, saved_head), _find(model, saved_name)
            if isinstance(embedding, LowRankEmbedding) and isinstance(module, nn.Linear):
                tie_head(model, head, name)
        for saved_name in config.quantized:
            name, linear = _find(model, saved_name)
            if isinstance(linear, nn.Linear | Conv1D):
                model.set_submodule(name, empty_quantized(linear, cast(Any, self._inner).quantization_config))
        if checkpoint_files:
            check_tensors(model, shapes, packed)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        # Without quantized weights nothing is: casting, training and PEFT treat the model like any other.
        mark(model, None if self._inner is None else self)
        keep_unpacked(model)
        for module in model.modules():
            if isinstance(module, LowRankLinear):
                module.store_left_by_columns()
        model.config.quantization_config.checksums = {}  # of files that were read; the model may now change
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _check_ranks(config: LoraSVDCompactConfig, shapes: Mapping[str, list[int]], prefix: str) -> None:
    """Raise if a saved tensor contradicts ``ranks``; names that transformers changes on saving are left to it."""
    marked = {key.removesuffix(".weight") for key, shape in shapes.items() if key.endswith(".weight") and shape == [1]}
    named = {spelling: rank for name, rank in config.ranks.items() for spelling in spellings(name, prefix)}
    splits = {spelling: split for name, split in config.splits.items() for spelling in spellings(name, prefix)}
    saved = {
        name: shapes[left][1] // splits.get(name, (0, 1))[1]
        for name in marked
        if (left := f"{name}.left.weight") in shapes
    }
    saved |= {name: min(shape) for name in named if len(shape := shapes.get(f"{name}.weight", [])) == 2}
    for name, rank in saved.items():
        if named.get(name, rank) != rank:
            raise LoraSVDError(
                f"{name}: the tensors of this compact checkpoint have rank {rank}, its config.json says {named[name]}; "
                "restore the config.json that was saved with them"
            )


def spellings(name: str, prefix: str) -> tuple[str, str, str]:
    """A module's name, as saved, in the model without its head and in one with a head on top."""
    return name, name.removeprefix(prefix), prefix + name


def _find(model: PreTrainedModel, name: str) -> tuple[str, nn.Module]:
    """The module of that name, also in the model without its head (AutoModel) or with one put on top."""
    prefix = model.base_model_prefix + "."
    for candidate in spellings(name, prefix):
        try:
            return candidate, model.get_submodule(candidate)
        except AttributeError:
            continue
    if "." not in name or not name.startswith(prefix):  # a head that this class of model does not have
        return name, nn.Identity()
    raise LoraSVDError(
        f"{name}: named in this compact checkpoint's ranks, but {type(model).__name__} has no such module. Load it "
        "with the class it was saved from"
    )


def _replace(
    model: PreTrainedModel, name: str, dense: nn.Module, rank: int, factor_format: str, split: list[int] | None
) -> None:
    if isinstance(dense, nn.Identity | LowRankLinear):
        return  # stands for a head that this class of model does not have; or the code of the folder has put it there
    if not isinstance(dense, Conv1D | nn.Linear | nn.Embedding):
        raise LoraSVDError(
            f"{name}: named in this compact checkpoint's ranks, but it is {type(dense).__name__}, expected a linear "
            "layer or an embedding. Load it with the class it was saved from"
        )
    in_features, out_features = layer_features(dense)
    m1, n1 = split or (out_features, 1)
    if out_features % m1 or in_features % n1:
        raise LoraSVDError(
            f"{name}: the compact checkpoint is split by {split}, expected divisors of {out_features} and {in_features}"
        )
    full_rank = min(m1 * n1, out_features // m1 * in_features // n1)
    if rank > full_rank:
        raise LoraSVDError(f"{name}: the compact checkpoint gives rank {rank}, expected at most {full_rank}")
    if rank == full_rank:
        return
    with torch.device("meta"):
        new = empty_low_rank(dense, rank, factor_format, dense.weight.dtype, None if split is None else (m1, n1))
    model.set_submodule(name, new)


def untie(model: nn.Module, name: str) -> bool:
    """Strike a module off transformers' list of tied weights, since its weight is its own; False if it is not on it."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return tied.pop(f"{name}.weight", None) is not None


def describe_compact(model: nn.Module, config: LoraSVDCompactConfig, quantization: Any = None) -> None:
    """Make a model with low-rank layers plain and self-describing: trainable, its ranks in ``model.config``.

    Args:
        model: with low-rank layers and no tuner's.
        config: what it says about itself, with full ranks; those of low-rank layers and what is said of quantized
            weights are filled in.
        quantization: the ``BitsAndBytesConfig`` of the weights that are quantized, if some are.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    if not isinstance(model, PreTrainedModel):
        return
    if config.tied_parameters or config.tied:
        # Some configs (T5) read False as something else and tie anyway; the loader unties by the names in ranks.
        untied = {**model.config.to_dict(), "tie_word_embeddings": False}
        model.config.tie_word_embeddings = type(model.config).from_dict(untied).tie_word_embeddings
    for name in config.ranks:
        module = model.get_submodule(name)
        if isinstance(module, LowRankLinear):
            config.ranks[name] = module.rank
            if module.split is not None:
                config.splits[name] = list(module.split)
    config.quantized = quantized_names(model)
    if config.quantized:
        config.bitsandbytes = quantization if isinstance(quantization, dict) else quantization.to_dict()
    mark(model, LoraSVDCompactQuantizer(config) if config.quantized else None)
    keep_unpacked(model)
    model.config.quantization_config = config


def mark(model: PreTrainedModel, quantizer: LoraSVDCompactQuantizer | None) -> None:
    """Let transformers, Trainer and PEFT see whether the model has quantized weights; None: it has none."""
    for attribute in ("is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    marks: dict[str, Any] = {"is_quantized": quantizer is not None}
    if quantizer is not None and (given := quantizer.quantization_config.bitsandbytes):
        bits = "4bit" if given["load_in_4bit"] else "8bit"
        marks |= {"hf_quantizer": quantizer, "quantization_method": "lora_svd", f"is_loaded_in_{bits}": True}
    for attribute, value in marks.items():
        setattr(model, attribute, value)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("_is_quantized", None)
    # Saving reverses what loading did, but bitsandbytes' layers save themselves and their conversions have no reverse.
    done = getattr(model, "_weight_conversions", None) or []
    of_quantizer = [any(hasattr(op, "hf_quantizer") for op in getattr(entry, "operations", ())) for entry in done]
    kept: Any = [entry for entry, drop in zip(done, of_quantizer, strict=True) if not drop]
    if len(kept) < len(done):
        model._weight_conversions = kept
