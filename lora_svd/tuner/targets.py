"""Which modules of a model can be compressed, and what is said of the others."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping

from peft.utils import resolve_quantization_backend
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..errors import LoraSVDError
from . import distributed
from .layer import LoraSVDLinear

_MOST_PATTERNS = 6  # that a message lists


def is_quantized_linear(module: nn.Module) -> bool:
    backend = resolve_quantization_backend(module)
    return backend is not None and backend.layer_type == "linear" and backend.supports_merge


def check_called(layers: Mapping[str, LoraSVDLinear], adapter_name: str, *, measured: bool) -> None:
    """Raise, after the first backward pass, if a targeted layer could not be trained, measured or replaced.

    The model computes with the weight of a layer that it does not call. Or the loss cannot depend on the layer: nothing
    uses what it gives, or neither it nor another one of its list is called. What only this batch leaves out, such as an
    expert without tokens or a block that is dropped at random, is named in a warning.

    Args:
        measured: whether there is an importance to measure; if not, a layer without a part in the loss is only named.
    """
    read = [name for name, layer in layers.items() if layer.weight_was_used]
    if read:
        raise LoraSVDError(
            f"target_modules: the model uses the weights of {_shortened(read)} and does not call these layers, so "
            f"they can be neither trained nor replaced. Leave them out: exclude_modules={exclusion(read, layers)!r}"
        )
    unused = [name for name, layer in layers.items() if layer.adapter(adapter_name).B.grad is None]
    if not unused or len(unused) == len(layers):
        return
    used = {form for name in layers.keys() - set(unused) for form in _forms(name)}
    for_good = [name for name in unused if layers[name].was_fed or used.isdisjoint(_forms(name))]
    if for_good and measured:
        raise _without_a_part(for_good, layers)
    warnings.warn(
        f"{_shortened(unused)} had no part in the loss of the first batch. A layer that has none in the whole "
        f"warm-up cannot be compressed: leave it out then, exclude_modules={exclusion(unused, layers)!r}",
        stacklevel=3,
    )


def check_gradients(layers: Mapping[str, LoraSVDLinear], adapter_name: str) -> None:
    """Raise, after the second step, if no token of a layer that was called has had a gradient, but some of others had.

    Not after the first: behind a weight that starts at zero there is none in that.
    """
    adapters = {name: layer.adapter(adapter_name) for name, layer in layers.items()}
    unseen = [name for name, adapter in adapters.items() if not bool(adapter.observer.num_tokens(adapter.A.device))]
    still = [
        name
        for name in unseen
        if layers[name].was_fed
        and not any(bool(distributed.gathered(gradient).any()) for gradient in adapters[name].gradients)
    ]
    if still and len(unseen) < len(layers):
        raise _without_a_part(still, layers)


def _without_a_part(names: list[str], layers: Mapping[str, LoraSVDLinear]) -> LoraSVDError:
    return LoraSVDError(
        f"target_modules: {_shortened(names)} had no part in the loss of the first steps (a pooler that nothing uses, "
        "a tower without its inputs), so that their importance cannot be measured. Leave them out: "
        f"exclude_modules={exclusion(names, layers)!r}; or let the first batches use them"
    )


def _forms(name: str) -> set[str]:
    """The name with one of its indices left open: what the entries of a list have in common."""
    parts = name.split(".")
    return {".".join([*parts[:i], "*", *parts[i + 1 :]]) for i, part in enumerate(parts) if part.isdigit()}


def patterns(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """The shortest ends of ``names`` that no other of ``among`` has."""
    names = set(names)
    others = {end for name in among if name not in names for end in _ends(name)}
    return sorted({next((end for end in _ends(name) if end not in others), name) for name in names})


def exclusion(names: Collection[str], among: Iterable[str]) -> list[str] | str:
    """A value of ``exclude_modules`` that leaves out these names and no other of ``among``.

    :func:`patterns`, or a regular expression for what the names are inside of, such as a tower, if those are many.
    """
    ends = patterns(names, among := list(among))
    if len(ends) <= _MOST_PATTERNS:
        return ends
    others = [f"{name}." for name in among if name not in names]
    starts = (next(s for s in _starts(name) if not any(o.startswith(f"{s}.") for o in others)) for name in names)
    return "|".join(rf"{re.escape(start)}(\..*)?" for start in dict.fromkeys(starts))


def _starts(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


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
