"""What takes the place of a linear layer in a compact model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..decompositions import Factors, Split, balance, pivot
from .standalone import LowRankEmbedding, LowRankLinear, empty_low_rank, kronecker_output
from .stored import full_precision


def dense_weight(module: LowRankLinear) -> Tensor:
    """The weight (out, in) that a layer stands for, float64 on the CPU: rounded, it would have full rank."""
    left, right = (full_precision(layer).detach().cpu().double() for layer in (module.left, module.right))
    right = right.T if isinstance(module, LowRankEmbedding) else right
    return stored_weight(left, right, module.order.cpu() if module.factor_format == "pivoted" else None, module.split)


def stored_weight(left: Tensor, right: Tensor, order: Tensor | None, split: Sequence[int] | None) -> Tensor:
    """The weight (out, in) that the tensors of a :class:`LowRankLinear` stand for.

    Args:
        left, right: weights of its two layers, (k, in) of an embedding as well.
        order: its index, if it is pivoted.
        split: (m1, n1), if it is a sum of Kronecker products.
    """
    if split is not None:
        m1, n1 = split
        rank = left.shape[1] // n1
        whole = Split(m1, n1, right.shape[0] // rank, right.shape[1])
        rows = right.reshape(whole.m2, rank, whole.n2).transpose(0, 1)
        return Factors(left.reshape(-1, rank), rows.reshape(rank, -1), whole).product()
    product = left @ right
    return product if order is None else torch.cat([right, product])[order]


def factored_output(x: Tensor, factors: Factors, bias: Tensor | None, scale: float) -> Tensor:
    """``scale * W x + bias`` for a weight in factors, which is not formed. x: (..., in), all of one dtype."""
    left, right = _stored(factors)
    # one scaling of the few hidden features, not of both factors
    if (split := factors.split) is None or split.is_none:
        return F.linear(F.linear(x, right) * scale, left, bias)
    result = kronecker_output(
        x, lambda rows: F.linear(rows, right) * scale, lambda hidden: F.linear(hidden, left), split.n1, split.m2
    )
    return result if bias is None else result + bias


def _stored(factors: Factors) -> tuple[Tensor, Tensor]:
    """Weights of the two layers of a :class:`LowRankLinear`: (m1, n1 k) and (m2 k, n2); the factors if not split."""
    split = factors.split
    if split is None or split.is_none:
        return factors.left, factors.right
    rows = factors.right.reshape(factors.rank, split.m2, split.n2).transpose(0, 1)
    return factors.left.reshape(split.m1, -1), rows.reshape(-1, split.n2)


def compact_module(result: Factors | Tensor, base: nn.Module, dense: Tensor, factor_format: str) -> nn.Module:
    """A module with the weight ``result``, dtype, device and bias of ``base``, independent of it.

    Args:
        result: factors, or a dense weight (out, in).
        base: the linear layer or embedding that is replaced; its bias is copied.
        dense: its weight, (out, in), for dtype and device.
    """
    given = getattr(base, "bias", None)
    bias = given.detach() if isinstance(given, Tensor) else None
    if isinstance(result, Tensor):
        return dense_module(result.to(dense.device, dense.dtype), base, bias)
    with torch.device("meta"):
        module = empty_low_rank(base, result.rank, factor_format, dense.dtype, result.split and result.split.stored)
    module.to_empty(device=dense.device)
    with torch.no_grad():
        module.weight.zero_()
        if factor_format == "pivoted":
            pivoted = pivot(result)
            left, right = pivoted.coefficients, pivoted.rows
            module.order.copy_(pivoted.order.argsort())
        else:
            left, right = _stored(balance(result))
        module.left.weight.copy_(left)
        module.right.weight.copy_(right.T if isinstance(module, LowRankEmbedding) else right)
        if bias is not None:
            (module.left.bias if module.bias is None else module.bias).copy_(bias)
    module.store_left_by_columns()
    return module


def dense_module(weight: Tensor, like: nn.Module, bias: Tensor | None) -> nn.Module:
    """A Conv1D or embedding if ``like`` is one, else an ``nn.Linear``, of a weight (out, in) and a copy of the bias."""
    out_features, in_features = weight.shape
    with torch.device("meta"):
        if isinstance(like, Conv1D):
            module: nn.Module = Conv1D(out_features, in_features)
        elif isinstance(like, nn.Embedding):
            module = nn.Embedding(in_features, out_features, padding_idx=like.padding_idx)
        else:
            module = nn.Linear(in_features, out_features, bias=bias is not None)
    stored = weight.T if isinstance(like, Conv1D | nn.Embedding) else weight
    module.weight = nn.Parameter(stored.contiguous())
    if bias is not None:
        module.bias = nn.Parameter(bias.clone())
    return module
