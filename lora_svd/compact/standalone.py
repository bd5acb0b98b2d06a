"""All that loads a compact checkpoint where lora_svd is not installed: shipped as it stands, see ``self_contained.py``.

The low-rank layer, and how a dense model gets it. Imports nothing of lora_svd.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


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

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"factor_format={self.factor_format!r}"
        )


def put_low_rank_layers(model: Any, description: Mapping[str, Any]) -> None:
    """Give an empty dense model the low-rank layers of ``description``, a ``LoraSVDCompactConfig`` as a dict."""
    for name, rank in description["ranks"].items():
        dense = model.get_submodule(name)
        # transformers' Conv1D says nx and nf
        in_features, out_features = getattr(dense, "nx", None) or dense.in_features, getattr(dense, "nf", None)
        out_features = out_features or dense.out_features
        model.all_tied_weights_keys.pop(f"{name}.weight", None)
        if rank < min(in_features, out_features):
            has_bias, dtype = dense.bias is not None, dense.weight.dtype
            form = description["factor_format"]
            new = LowRankLinear(in_features, out_features, rank, bias=has_bias, factor_format=form, dtype=dtype)
            model.set_submodule(name, new)
