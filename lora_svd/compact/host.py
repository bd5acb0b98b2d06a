"""All that compact models touch of transformers beyond its public interface; its version 5.23 has every line of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def untie(model: nn.Module, name: str) -> bool:
    """Strike a module off transformers' list of tied weights, since its weight is its own; False if it is not on it."""
    tied = getattr(model, "all_tied_weights_keys", {})  # name of a tensor -> name of the one it is tied to
    return tied.pop(f"{name}.weight", None) is not None


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """The tensors that are tied, by name, in both directions."""
    tied = model.all_tied_weights_keys
    return {**tied, **{source: target for target, source in tied.items()}}


def is_left_out(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor of the model is not expected in its files."""
    patterns = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
    return any(re.search(pattern, name) for pattern in patterns)


def names_in_model(
    model: PreTrainedModel, keys: Iterable[str], known: dict[str, Tensor] | None = None
) -> dict[str, tuple[str, bool]]:
    """Name in the model of each saved tensor, and whether it is put together from several while it is loaded.

    With ``known``, the model's state dict, a model with a head is found in the files of one without, and the reverse.
    """
    changes = get_model_conversion_mapping(model)
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    prefix = None if known is None else model.base_model_prefix
    renamed = {key: rename_source_key(key, renamings, converters, prefix, known) for key in keys}
    return {key: (name, pattern is not None) for key, (name, pattern) in renamed.items()}


def mark_quantized(model: PreTrainedModel, quantizer: Any) -> None:
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
