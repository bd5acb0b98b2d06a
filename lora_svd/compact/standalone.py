"""All that loads a compact checkpoint where lora_svd is not installed: shipped as it stands, see ``self_contained.py``.

The low-rank layer, and how a dense model gets it. Imports nothing of lora_svd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """``y = left(right(x)) + bias`` with a weight of rank k.

    ``factor_format="factors"``: right is Linear(in, k), left is Linear(k, out) and has the bias.
    ``factor_format="pivoted"``: right holds k rows of the weight, left the coefficients of the other rows,
    Linear(k, out - k), and ``order`` (out,) says where each output is found; ``k (in + out) - k^2`` parameters.
    ``split=(m1, n1)``: the weight is a sum of k Kronecker products of A (m1, n1) and B (out / m1, in / n1); right,
    Linear(in / n1, out / m1 k), holds every B, left, Linear(n1 k, m1), every A. See :func:`kronecker_output`.

    All are exact ``nn.Linear``, so that quantizers and LoRA find them. ``weight`` is one number and no weight: its
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
        split: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.factor_format, self.split = factor_format, split
        m1, n1 = split or (out_features, 1)
        self.right = nn.Linear(in_features // n1, rank * (out_features // m1), bias=False, dtype=dtype)
        if split is not None:
            self.left = nn.Linear(n1 * rank, m1, bias=False, dtype=dtype)
            self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None)
        elif factor_format == "pivoted":
            self.left = nn.Linear(rank, out_features - rank, bias=False, dtype=dtype)
            self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None)
            self.register_buffer("order", torch.arange(out_features, dtype=torch.int32))
        else:
            self.left = nn.Linear(rank, out_features, bias=bias, dtype=dtype)
            self.register_parameter("bias", None)
        self.register_buffer("weight", torch.zeros(1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.split is not None:
            m1, n1 = self.split
            result = kronecker_output(x, self.right, self.left, n1, self.out_features // m1)
        else:
            hidden = self.right(x)
            if self.factor_format == "factors":
                return self.left(hidden)
            result = torch.cat([hidden, self.left(hidden)], dim=-1)
            # of a matrix: several times faster than along the last of three dimensions
            result = result.view(-1, self.out_features).index_select(1, self.order).view(result.shape)
        return result if self.bias is None else result + self.bias

    def store_left_by_columns(self) -> None:
        """Lay out the weight of left in memory column by column; nothing else changes.

        Its rows are short, k numbers, and in products with few tokens, as in decoding, the start of a row costs as much
        as the row: on a CPU they take half of the time this way.
        """
        weight = self.left.weight
        if self.split is None and type(self.left) is nn.Linear and weight.is_floating_point():
            weight.data = weight.data.T.contiguous().T

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"factor_format={self.factor_format!r}{'' if self.split is None else f', split={self.split}'}"
        )


def kronecker_output(
    x: Tensor, right: Callable[[Tensor], Tensor], left: Callable[[Tensor], Tensor], n1: int, m2: int
) -> Tensor:
    """``y = sum_k A_k X B_k^T``, row after row, where X (n1, n2) are the rows that x (..., in) is cut into.

    Args:
        right: all B (m2, n2) at once, (..., n2) -> (..., m2 k).
        left: all A (m1, n1) at once, summed, (..., n1 k) -> (..., m1).
    """
    hidden = right(x.unflatten(-1, (n1, -1))).unflatten(-1, (m2, -1))  # (..., n1, m2, k)
    return left(hidden.transpose(-3, -2).flatten(-2)).mT.flatten(-2)


def put_low_rank_layers(model: Any, description: Mapping[str, Any]) -> None:
    """Give an empty dense model the low-rank layers of ``description``, a ``LoraSVDCompactConfig`` as a dict."""
    for name, rank in description["ranks"].items():
        dense = model.get_submodule(name)
        # transformers' Conv1D says nx and nf
        in_features, out_features = getattr(dense, "nx", None) or dense.in_features, getattr(dense, "nf", None)
        out_features = out_features or dense.out_features
        model.all_tied_weights_keys.pop(f"{name}.weight", None)
        split = description.get("splits", {}).get(name)
        if split is not None or rank < min(in_features, out_features):
            has_bias, dtype = dense.bias is not None, dense.weight.dtype
            form = description["factor_format"]
            new = LowRankLinear(
                in_features,
                out_features,
                rank,
                bias=has_bias,
                factor_format=form,
                dtype=dtype,
                split=None if split is None else tuple(split),
            )
            model.set_submodule(name, new)
