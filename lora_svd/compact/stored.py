"""What the weight of a linear layer is stored as, quantized or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.bitsandbytes import dequantize_bnb_weight


def is_quantized(weight: object) -> bool:
    """Whether a parameter is one of bitsandbytes'."""
    return type(weight).__name__ in ("Params4bit", "Int8Params")


def full_precision(linear: nn.Module) -> Tensor:
    """The weight of a linear layer, (out, in), dequantized if need be."""
    given: Any = linear
    if not is_quantized(given.weight):
        return given.weight
    return dequantize_bnb_weight(given.weight, getattr(given, "state", None))


def num_parameters(weight: Tensor) -> int:
    """Numbers that a weight stands for; a 4-bit one holds two in a byte."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else torch.Size(state.shape).numel()


def num_bytes(weight: Tensor) -> int:
    """Bytes of a weight, with the scales of a quantized one."""
    state = getattr(weight, "quant_state", None)
    parts = [weight, *([] if state is None else state.as_dict(packed=True).values())]
    scales = (
        4 * len(weight) if type(weight).__name__ == "Int8Params" else 0
    )  # one a row; their attribute comes and goes
    return scales + sum(part.numel() * part.element_size() for part in parts)
