"""Self-distillation: the compressed model learns from the same model with its adapters switched off."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student: Tensor, teacher: Tensor, mask: Tensor, num_items: Any = None) -> Tensor:
    """``KL(teacher || student)`` in nats, averaged over the positions that the mask selects.

    Args:
        student: logits, (..., classes).
        teacher: logits of the same shape, without gradient.
        mask: (...), True where the position counts.
        num_items: what to divide the sum by instead of the number of positions: the labelled tokens of all
            micro-batches of a step, as Trainer counts them for the label loss.
    """
    with torch.autocast(device_type=student.device.type, enabled=False):
        log_student = F.log_softmax(student[mask].float(), dim=-1)
        log_teacher = F.log_softmax(teacher[mask].float(), dim=-1)
        total = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return total / (mask.sum() if num_items is None else num_items)


def label_positions(logits: Tensor, labels: Tensor | None, ignore_index: int = -100) -> Tensor:
    """Where logits (..., classes) answer a label that counts: everywhere if the labels have another shape."""
    if labels is None or labels.shape != logits.shape[:-1] or labels.is_floating_point():
        return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    return labels.to(logits.device) != ignore_index
