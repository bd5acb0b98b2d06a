"""Self-distillation: the compressed model learns from the same model with its adapters switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.loss.loss_utils import ForCausalLMLoss

from ..errors import LoraSVDError
from ..evaluation import evaluation_mode
from .layer import LoraSVDLinear
from .reading import OWN_LOSS

_SLICE = 1 << 20  # logits in float32 at a time: 4 MiB, which caches hold


def distillation_loss(student: Tensor, teacher: Tensor, mask: Tensor, num_items: Any = None) -> Tensor:
    """``KL(teacher || student)`` in nats, averaged over the positions that the mask selects.

    Args:
        student: logits, (..., classes).
        teacher: logits of the same shape, without gradient.
        mask: (...), True where the position counts.
        num_items: what to divide the sum by instead of the number of positions: the labelled tokens of all
            micro-batches of a step, as Trainer counts them for the label loss.
    """
    positions = mask.flatten().nonzero().flatten()
    total: Any = _Divergence.apply(student.flatten(0, -2), teacher.flatten(0, -2), positions)
    return total / max(len(positions) if num_items is None else num_items, 1)  # a batch may have no label at all


class _Divergence(torch.autograd.Function):
    """``sum KL(teacher || student)`` over positions. Value and gradient, ``softmax(student) - softmax(teacher)``, come
    from one pass over slices of positions: no float32 copy of all logits, which are the largest tensors of a step."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, positions: Tensor) -> Tensor:
        gradient = torch.zeros_like(student)
        total = torch.zeros((), device=student.device)
        for chosen in positions.split(max(1, _SLICE // student.shape[-1])):
            s, t = student[chosen].float(), teacher[chosen].float()
            s -= s.logsumexp(-1, keepdim=True)
            t -= t.logsumexp(-1, keepdim=True)
            probability = t.exp()
            total += (probability * t.sub_(s)).sum()
            gradient[chosen] = s.exp_().sub_(probability).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None


def label_positions(
    logits: Tensor, labels: Tensor | None, *, shifted: bool = False, ignore_index: int = -100
) -> Tensor:
    """Where logits (..., classes) answer a label that counts: everywhere if the labels have another shape.

    shifted: the logits of a position answer the label of the next one, and the last ones none.
    """
    if labels is None or labels.shape != logits.shape[:-1] or labels.is_floating_point():
        return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    counts = labels.to(logits.device) != ignore_index
    return F.pad(counts[..., 1:], (0, 1)) if shifted and counts.dim() > 1 else counts


def mixed_loss(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any, share: float) -> Tensor:
    """``(1 - share) loss + share KL(teacher || student)`` of a forward pass; the teacher is :func:`as_it_was`.

    A causal language model's loss compares the logits of a position with the label of the next one, and so does this.
    An encoder-decoder makes the inputs of its decoder of the labels, which the teacher is given as well.
    """
    encodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    shifted = getattr(model, "loss_function", None) is ForCausalLMLoss and not encodes
    given = {name: value for name, value in kwargs.items() if encodes or name != "labels"}
    with torch.no_grad(), as_it_was(model):
        teacher = model.forward(*args, **given).logits
    mask = label_positions(outputs.logits, kwargs.get("labels"), shifted=shifted)
    distance = distillation_loss(outputs.logits, teacher, mask, kwargs.get("num_items_in_batch"))
    return (1 - share) * outputs.loss + share * distance


def check_output(model: nn.Module, outputs: Any) -> None:
    """Raise if a model's output has no loss that could be mixed, or no logits that choose among classes."""
    if getattr(outputs, "logits", None) is None:
        raise LoraSVDError(
            "distillation: got an output without logits, expected some, since they are compared with the teacher's; "
            f"TRL's trainers go without. Either {OWN_LOSS}, or set distillation=0"
        )
    if getattr(outputs, "loss", None) is None:
        raise LoraSVDError(
            "distillation: got an output without loss, expected one to mix with. Give the model its labels (Trainer "
            "does not with label_smoothing_factor or compute_loss_func), or set distillation=0"
        )
    problem, classes = getattr(getattr(model, "config", None), "problem_type", None), outputs.logits.shape[-1]
    if problem in {"regression", "multi_label_classification"} or classes < 2:
        raise LoraSVDError(
            f"distillation: got problem_type={problem!r} and logits of {classes} classes, expected a model that "
            "chooses one of several, since probabilities of classes are compared. Set distillation=0"
        )


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """The base model with its own head and without dropout; which parameters are trained is not touched."""
    adapted = [module for module in model.modules() if isinstance(module, LoraSVDLinear | ModulesToSaveWrapper)]
    before = [module._disable_adapters for module in adapted]
    try:
        for module in adapted:
            module._disable_adapters = True
        with evaluation_mode(model):
            yield
    finally:
        for module, disabled in zip(adapted, before, strict=True):
            module._disable_adapters = disabled
