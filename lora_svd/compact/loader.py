"""Saving and loading of compact models through transformers' own ``save_pretrained`` and ``from_pretrained``.

The ranks stand in ``config.json`` as a quantization config of the method "lora_svd", whose quantizer gives the empty
model its low-rank layers before the weights are read. Afterwards the model is a plain one. A reader without this
package makes dense layers, whose ``weight`` has another shape than the marker in the checkpoint: it fails.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..allocation import FACTOR_FORMATS
from ..errors import LoraSVDError
from .low_rank import LowRankLinear

FORMAT_VERSION = 1


class LoraSVDCompactConfig(QuantizationConfigMixin):
    """What a compact checkpoint says about itself.

    Attributes:
        ranks: stored rank of each targeted module; one that is stored dense has ``min(out, in)``.
        factor_format: "pivoted" or "factors".
        dense_parameters: numbers in the targeted weights before compression, the denominator of ``param_ratio``.
        method: how it was made: importance, allocation, compensation.
        format_version: of the layout of the tensors.
    """

    def __init__(
        self,
        ranks: Mapping[str, int] | None = None,
        factor_format: str = "pivoted",
        dense_parameters: int = 0,
        method: Mapping[str, Any] | None = None,
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
        self.quant_method: Any = "lora_svd"
        self.ranks = dict(ranks or {})
        self.factor_format = factor_format
        self.dense_parameters = dense_parameters
        self.method = dict(method or {})
        self.format_version = format_version


class LoraSVDCompactQuantizer(HfQuantizer):
    """Builds the low-rank layers of a compact checkpoint; loads nothing but tensors."""

    requires_calibration = True  # refuses to be asked for on a dense checkpoint
    quantization_config: LoraSVDCompactConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config = self.quantization_config
        for name, rank in config.ranks.items():
            _replace(model, *_find(model, name), rank, config.factor_format)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        # Nothing is quantized: without the marks, casting, training and PEFT treat the model like any other.
        setattr(model, "is_quantized", False)  # noqa: B010 - for the type checker
        for attribute in ("hf_quantizer", "quantization_method"):
            if hasattr(model, attribute):
                delattr(model, attribute)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _find(model: PreTrainedModel, name: str) -> tuple[str, nn.Module]:
    """The module of that name, also in the model without its head (AutoModel) or with one put on top."""
    prefix = model.base_model_prefix + "."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
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


def _replace(model: PreTrainedModel, name: str, dense: nn.Module, rank: int, factor_format: str) -> None:
    if isinstance(dense, Conv1D):
        in_features, out_features = dense.nx, dense.nf
    elif isinstance(dense, nn.Linear):
        in_features, out_features = dense.in_features, dense.out_features
    else:
        return
    if not isinstance(rank, int) or rank < 1:
        raise LoraSVDError(f"{name}: the compact checkpoint gives rank {rank!r}, expected a positive integer")
    if rank >= min(in_features, out_features):
        return
    with torch.device("meta"):
        new = LowRankLinear(
            in_features,
            out_features,
            rank,
            bias=dense.bias is not None,
            factor_format=factor_format,
            dtype=dense.weight.dtype,
        )
    model.set_submodule(name, new)


def describe_compact(model: nn.Module, config: LoraSVDCompactConfig) -> None:
    """Make a model with low-rank layers plain and self-describing: trainable, untied where a tied layer was factorized,
    its ranks in ``model.config``."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    if not isinstance(model, PreTrainedModel):
        return
    head = model.get_output_embeddings()
    if isinstance(head, LowRankLinear):
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    model.config.quantization_config = config


def save_compact(model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """``save_pretrained`` into a new folder that takes the place of an old one only when it is complete.

    A full disk or a killed process leaves the previous checkpoint whole. Reload with
    ``import lora_svd; AutoModelForCausalLM.from_pretrained(folder)``.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        staging.chmod(0o755)
        old = folder.with_name(f".{folder.name}-old")
        if folder.exists():
            folder.rename(old)
        staging.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
