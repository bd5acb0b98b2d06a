"""Which modules of a model can be compressed, and what is said of the others."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from peft.utils import resolve_quantization_backend
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from .errors import LoraSVDError
from .layer import LoraSVDLinear


def is_plain_linear(module: nn.Module) -> bool:
    """Not a subclass that computes something else, such as a router, which factors could not take the place of."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in (nn.Linear, Conv1D))


def is_quantized_linear(module: nn.Module) -> bool:
    backend = resolve_quantization_backend(module)
    return backend is not None and backend.layer_type == "linear" and backend.supports_merge


def check_called(layers: Mapping[str, LoraSVDLinear], adapter_name: str) -> None:
    """Raise if the model computes with the weight of a targeted layer and does not call the layer, after a backward
    pass: its bypass would not be trained, and the model that is saved could not use its factors.

    Warn of layers that were neither called nor read: a pooler without a part in the loss stops the run when its warm-up
    is over, an expert without tokens may get some in a later batch.
    """
    untrained = [name for name, layer in layers.items() if layer.lora_svd_B[adapter_name].grad is None]
    bypassed = [name for name in untrained if layers[name].weight_was_read]
    unused = [name for name in untrained if name not in bypassed]
    if unused and len(untrained) < len(layers):
        warnings.warn(
            f"{_shortened(unused)} had no part in the loss of the first batch. A layer that has none in the whole "
            f"warm-up cannot be compressed: leave it out then, exclude_modules={patterns(unused, layers)}",
            stacklevel=3,
        )
    if bypassed:
        raise LoraSVDError(
            f"target_modules: the model uses the weights of {_shortened(bypassed)} and does not call these layers, so "
            f"they can be neither trained nor replaced. Leave them out: exclude_modules={patterns(bypassed, layers)}"
        )


def patterns(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """The shortest ends of ``names`` that no other of ``among`` has."""
    names = set(names)
    others = {end for name in among if name not in names for end in _ends(name)}
    return sorted({next((end for end in _ends(name) if end not in others), name) for name in names})


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]


def aliases(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The names of every module that is the child of more than one, or twice of one."""
    names: dict[nn.Module, list[str]] = {}
    for parent_name, parent in model.named_modules():
        for name, child in parent._modules.items():
            if child is not None:
                names.setdefault(child, []).append(f"{parent_name}.{name}".removeprefix("."))
    return {module: found for module, found in names.items() if len(found) > 1}


def check_modules_to_save(model: nn.Module, ends: Iterable[str]) -> None:
    """Raise if one module that PEFT would train whole is inside another: it could not load what it saves of them."""
    chosen = [name for name, _ in model.named_modules() if name.endswith(tuple(ends))]
    inside = {name: outer for outer in chosen for name in chosen if name.startswith(f"{outer}.")}
    if inside:
        inner, outer = next(iter(inside.items()))
        apart = patterns([name for name in chosen if name not in inside.values()], dict(model.named_modules()))
        raise LoraSVDError(
            f"modules_to_save: {inner} is inside {outer}, and both match; PEFT could not load what it saves of them. "
            f"Name modules that are apart, modules_to_save={apart}"
        )


def warn_of_fused_weights(model: nn.Module) -> None:
    """Say which share of the parameters is in 3-D weights, which no factorization here takes."""
    sizes = {
        f"{name}.{of}": parameter.numel()
        for name, module in model.named_modules()
        if not isinstance(module, _ConvNd)
        for of, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and len(parameter) > 1
    }
    if sizes:
        share = sum(sizes.values()) / sum(parameter.numel() for parameter in model.parameters())
        warnings.warn(
            f"{share:.1%} of the parameters are in 3-D weights (fused experts or heads), which are left as they are: "
            f"{_shortened(sizes)}. param_ratio is of the other targeted layers",
            stacklevel=2,
        )


def _shortened(names: Iterable[str]) -> str:
    first, *rest = names
    return f"{first} and {len(rest)} more" if rest else first


def check_factors(layers: Mapping[str, LoraSVDLinear], adapter_name: str) -> None:
    """Raise if all factors are zero, as they are made for those of a saved adapter."""
    factors = [found for layer in layers.values() if (found := layer.factors(adapter_name)) is not None]
    if factors and not any(bool(found.left.any()) for found in factors):
        raise LoraSVDError(
            f"compressed: got True for adapter {adapter_name}, all of whose factors are zero, expected False: its "
            "config is that of an adapter that was saved. Load that with PeftModel.from_pretrained(model, folder), or "
            "set compressed=False and compact_ranks=None"
        )
