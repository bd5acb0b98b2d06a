"""``LowRankLinear``: what takes the place of a linear layer in a compact model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..decompositions import Factors, balance, pivot
from .stored import full_precision


class LowRankLinear(nn.Module):
    """``y = left(right(x)) + bias`` with a weight of rank k.

    ``factor_format="factors"``: right is Linear(in, k), left is Linear(k, out) and has the bias.
    ``factor_format="pivoted"``: right holds k rows of the weight, left the coefficients of the other rows,
    Linear(k, out - k), and ``order`` (out,) says where each output is found; ``k (in + out) - k^2`` parameters.

    Both are exact ``nn.Linear``, so that quantizers and LoRA find them. ``weight`` is one number and no weight: its
    shape contradicts the dense layer's, so that a loader that does not know this class fails instead of keeping the
    random weights it made.
    """

    bias: nn.Parameter | None
    order: Tensor
    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool,
        factor_format: str,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.factor_format = factor_format
        self.right = nn.Linear(in_features, rank, bias=False, dtype=dtype)
        if factor_format == "pivoted":
            self.left = nn.Linear(rank, out_features - rank, bias=False, dtype=dtype)
            self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None)
            self.register_buffer("order", torch.arange(out_features, dtype=torch.int32))
        else:
            self.left = nn.Linear(rank, out_features, bias=bias, dtype=dtype)
            self.register_parameter("bias", None)
        self.register_buffer("weight", torch.zeros(1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.right(x)
        if self.factor_format == "factors":
            return self.left(hidden)
        result = torch.cat([hidden, self.left(hidden)], dim=-1).index_select(-1, self.order)
        return result if self.bias is None else result + self.bias

    def dense_weight(self) -> Tensor:
        """The weight (out, in) that this layer stands for, float64 on the CPU: rounded, it would have full rank."""
        left, right = (full_precision(layer).detach().cpu().double() for layer in (self.left, self.right))
        return stored_weight(left, right, self.order.cpu() if self.factor_format == "pivoted" else None)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"factor_format={self.factor_format!r}"
        )


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
