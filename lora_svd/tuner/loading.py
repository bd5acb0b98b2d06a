"""Tensors of an adapter: their names on disk and in the model, and what a model makes of those that it is given.

On disk ``LAYER.lora_svd_adapters.PART``, in the model ``LAYER.lora_svd_adapters.ADAPTER.PART``, with PART one of ``A``,
``B``, ``factors.left``, ``factors.right``, ``observer.STATISTIC``: PEFT's convention, by which transformers loads and
TRL copies. Files of before version 0.1 have ``LAYER.lora_svd_NAME`` instead, with NAME the end of PART.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..config import PREFIX
from ..statistics import STATISTICS
from .adapter import ADAPTERS, part_of
from .layer import LoraSVDLinear


def key_on_disk(key: str, adapter_name: str) -> str | None:
    """The name on disk of a tensor in the model; None for one that is not of the adapter."""
    layer, mark, part = key.rpartition(f".{ADAPTERS}.{adapter_name}.")
    return f"{layer}.{ADAPTERS}.{part}" if mark else None


def key_in_model(key: str, adapter_name: str) -> str | None:
    """The inverse of :func:`key_on_disk`, for files of before version 0.1 as well."""
    layer, part = _layer_and_part(key)
    return None if layer is None else f"{layer}.{ADAPTERS}.{adapter_name}.{part}"


def _layer_and_part(key: str) -> tuple[str | None, str]:
    renamed = {statistic.formerly: present for present, statistic in STATISTICS.items()}
    layer, mark, part = key.rpartition(f".{ADAPTERS}.")
    if mark:
        parent, dot, name = part.rpartition(".")
        return layer, f"{parent}{dot}{renamed.get(name, name)}"
    layer, mark, name = key.rpartition(f".{PREFIX}")
    if not mark or "." in name:
        return None, ""
    return layer, part_of(renamed.get(name, name))


def check_saved(model: nn.Module, adapter_name: str, saved: Mapping[str, Tensor]) -> None:
    """Raise if a layer's tensors in a checkpoint are not all there, or of another shape; before any is loaded."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in saved.items():
        layer, part = _layer_and_part(key)
        if layer is not None:
            by_layer.setdefault(layer.removeprefix("base_model.model."), {})[part.rpartition(".")[2]] = tensor
    for key, module in model.named_modules():
        if isinstance(module, LoraSVDLinear) and module.has_adapter(adapter_name):
            module.adapter(adapter_name).check_saved(key, by_layer.get(key.removeprefix("base_model.model."), {}))


def after_loading(tuner: Any, _incompatible: object) -> None:
    """Let the configs of a tuner follow what was loaded into its layers."""
    for name in tuner.peft_config:
        run = tuner.run(name)
        adapters = run.adapters().values()
        if any(adapter.was_loaded for adapter in adapters):
            run.follow_loaded()
            for adapter in adapters:
                adapter.was_loaded = False
