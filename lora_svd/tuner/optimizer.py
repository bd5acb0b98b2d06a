"""What an adapter has to do with the optimizer: gradients that it may use, and factors that it is to train."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from ..errors import LoraSVDError, NumericalError
from . import distributed
from .adapter import LayerAdapter


def trained_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The factors of all adapters that an optimizer may change."""
    factors = [m.factors for m in model.modules() if isinstance(m, LayerAdapter) and m.factors is not None]
    return {parameter for part in factors for parameter in part.parameters() if parameter.requires_grad}


def has_all_factors(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    """Whether an optimizer trains all factors that it may."""
    return trained_parameters(model) <= {parameter for group in optimizer.param_groups for parameter in group["params"]}


def hand_over(optimizer: torch.optim.Optimizer | None, model: nn.Module, replaced: set[nn.Parameter]) -> None:
    """Give the factors that now exist to the optimizer, in the order a new one would have them, so that its saved state
    fits when a run is resumed. replaced: the factors before, which a cubic schedule leaves behind."""
    if optimizer is None:
        raise LoraSVDError("train_factors: got no optimizer; call update_and_allocate(step, optimizer=optimizer)")
    group, factors = optimizer.param_groups[0], trained_parameters(model)
    for parameter in replaced - factors:
        optimizer.state.pop(parameter, None)
    before = set(group["params"])
    ours = [parameter for parameter in model.parameters() if parameter in before | factors]
    others = before - set(ours) - replaced  # of modules around this one
    first = next((i for i, parameter in enumerate(group["params"]) if parameter not in others), len(before))
    behind = [parameter for parameter in group["params"][first:] if parameter in others]
    group["params"] = [*group["params"][:first], *ours, *behind]


def gradients_are_finite(adapters: Mapping[str, LayerAdapter], global_step: int, *, scaled: bool) -> bool:
    """Raise, or warn if ``scaled``, if a gradient of the bypass is not finite; one transfer for all layers."""
    sums = {
        name: distributed.gathered(gradient.float().sum())
        for name, adapter in adapters.items()
        for parameter in (adapter.A, adapter.B)
        if (gradient := parameter.grad) is not None
    }
    if not sums:
        raise LoraSVDError(
            f"update_and_allocate({global_step}): no bypass has a gradient. Call it after loss.backward() and before "
            "optimizer.step() and zero_grad(), with the adapter active and trainable"
        )
    finite = torch.stack([value.to("cpu", non_blocking=True) for value in sums.values()]).isfinite()
    if not bool(finite.all()):
        name = next(name for name, ok in zip(sums, finite.tolist(), strict=True) if not ok)
        found = f"{name}: the gradient of the LoRA bypass is not finite at step {global_step}"
        if not scaled:
            raise NumericalError(
                f"{found}; a batch gave a non-finite loss. Lower the learning rate, look at the data, or train in "
                "float32 or bfloat16"
            )
        warnings.warn(f"{found}, which the gradient scaler skips; the step is not observed", stacklevel=4)
        return False
    return True
