"""What takes the place of a linear layer in a compact model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..decompositions import Factors, Split, balance, pivot
from ..linalg import Metrics
from .bnb import full_precision
from .layers import LowRankEmbedding, LowRankLinear, empty_low_rank, kronecker_output
from .rounding import in_range, round_pivots


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


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes ``W x + b``, so that factors can take its place; a router does not.

    Of a class with a forward of its own (Falcon's) that is seen by trying it, with a small weight and no other tensors.
    """
    kind = nn.Linear if isinstance(module, nn.Linear) else Conv1D
    if not isinstance(module, kind):
        return False
    return type(module).forward is kind.forward or _multiplies(module, kind)


def _multiplies(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module's own forward computes what that of ``kind`` does, in training and evaluation."""
    if {*module._parameters, *module._buffers, *module._modules} != {"weight", "bias"}:
        return False
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):  # draws no random numbers, which a caller may have seeded
        plain = kind(5, 3) if kind is nn.Linear else kind(3, 5)
    probe = copy.copy(module)
    values = {
        name: nn.Parameter(
            torch.randn(of.shape, dtype=torch.float64, device="cpu", generator=generator), requires_grad=False
        )
        for name, of in plain.named_parameters()
        if module._parameters[name] is not None
    }
    probe.__dict__ |= {name: getattr(plain, name) for name in vars(plain) if not name.startswith("_")}
    probe._parameters = {"bias": None, **values}
    plain._parameters = dict(probe._parameters)
    try:
        for shape, training in (((5,), False), ((2, 5), True), ((2, 3, 5), False)):
            x = torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator)
            probe.training = training
            answer = type(module).forward(probe, x)
            torch.testing.assert_close(answer, plain(x))
    except Exception:  # noqa: BLE001 - whatever the unknown code does, it is no product then
        return False
    return True


def compact_module(
    result: Factors | Tensor,
    base: nn.Module,
    like: Tensor,
    factor_format: str,
    metrics: Callable[[], Metrics] = Metrics,
    rows: Tensor | None = None,
) -> nn.Module:
    """A module with the weight ``result`` and the bias of ``base``, independent of it.

    Args:
        result: factors, or a dense weight (out, in).
        base: the linear layer or embedding that is replaced; its bias is copied.
        like: a tensor of the type that the module gets, on its device.
        metrics: what an error costs, for pivoted factors in half precision, whose rounding has a choice.
        rows: the output features of ``base`` that are left; None: all.

    Raises:
        NumericalError: a factor has numbers that its dtype cannot hold.
    """
    given = getattr(base, "bias", None)
    bias = given.detach() if isinstance(given, Tensor) else None
    if bias is not None and rows is not None:
        bias = bias[rows.to(bias.device)]
    if isinstance(result, Tensor):
        return dense_module(result.to(like.device, like.dtype), base, bias).train(base.training)
    with torch.device("meta"):
        split = result.split and result.split.stored
        kept = None if split else (result.left.shape[0], result.right.shape[1])
        module = empty_low_rank(base, result.rank, factor_format, like.dtype, split, kept)
    module.to_empty(device=like.device)
    with torch.no_grad():
        module.weight.zero_()
        if factor_format == "pivoted":
            is_half = torch.finfo(like.dtype).bits < 32
            pivoted = round_pivots(result, like.dtype, metrics()) if is_half else pivot(result)
            left, right = pivoted.coefficients, pivoted.rows
            module.order.copy_(pivoted.order.argsort())
        else:
            left, right = _stored(balance(result))
        module.left.weight.copy_(in_range(left, like.dtype))
        right = in_range(right, like.dtype)
        module.right.weight.copy_(right.T if isinstance(module, LowRankEmbedding) else right)
        if bias is not None:
            cast(Tensor, module.bias).copy_(bias)
    return module.train(base.training)


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
