"""What takes the place of a linear layer in a compact model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..decompositions import Factors, balance, pivot
from .standalone import LowRankLinear
from .stored import full_precision


def dense_weight(module: LowRankLinear) -> Tensor:
    """The weight (out, in) that a layer stands for, float64 on the CPU: rounded, it would have full rank."""
    left, right = (full_precision(layer).detach().cpu().double() for layer in (module.left, module.right))
    return stored_weight(left, right, module.order.cpu() if module.factor_format == "pivoted" else None)


def stored_weight(left: Tensor, right: Tensor, order: Tensor | None) -> Tensor:
    """The weight (out, in) that the tensors of a :class:`LowRankLinear` stand for; ``order`` if it is pivoted."""
    product = left @ right
    return product if order is None else torch.cat([right, product])[order]


def compact_module(result: Factors | Tensor, base: nn.Module, dense: Tensor, factor_format: str) -> nn.Module:
    """A module with the weight ``result``, dtype, device and bias of ``base``, independent of it.

    Args:
        result: factors, or a dense weight (out, in).
        base: the linear layer that is replaced; its bias is copied.
        dense: its weight, (out, in), for dtype and device.
    """
    bias = base.bias.detach() if isinstance(base.bias, Tensor) else None
    if isinstance(result, Tensor):
        return dense_module(result.to(dense.device, dense.dtype), base, bias)
    out_features, in_features = dense.shape
    with torch.device("meta"):
        module = LowRankLinear(
            in_features,
            out_features,
            result.rank,
            bias=bias is not None,
            factor_format=factor_format,
            dtype=dense.dtype,
        )
    module.to_empty(device=dense.device)
    with torch.no_grad():
        module.weight.zero_()
        if factor_format == "pivoted":
            pivoted = pivot(result)
            module.right.weight.copy_(pivoted.rows)
            module.left.weight.copy_(pivoted.coefficients)
            module.order.copy_(pivoted.order.argsort())
        else:
            balanced = balance(result)
            module.right.weight.copy_(balanced.right)
            module.left.weight.copy_(balanced.left)
        if bias is not None:
            (module.left.bias if module.bias is None else module.bias).copy_(bias)
    return module


def dense_module(weight: Tensor, like: nn.Module, bias: Tensor | None) -> nn.Module:
    """A Conv1D if ``like`` is one, else an ``nn.Linear``, of a weight (out, in) and a copy of the bias."""
    out_features, in_features = weight.shape
    with torch.device("meta"):
        if isinstance(like, Conv1D):
            module: nn.Module = Conv1D(out_features, in_features)
        else:
            module = nn.Linear(in_features, out_features, bias=bias is not None)
    stored = weight.T if isinstance(like, Conv1D) else weight
    module.weight = nn.Parameter(stored.contiguous())
    if bias is not None:
        module.bias = nn.Parameter(bias.clone())
    return module
