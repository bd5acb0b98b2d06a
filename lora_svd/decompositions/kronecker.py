"""Sums of Kronecker products: a weight whose rearranged matrix has a low rank (Van Loan and Pitsianis 1993).

Shapeshifter and KnGPT2 store weights as ``sum_k A_k (x) B_k``. The rearrangement of :class:`Split` makes the best sum
of k terms a truncated SVD, so spectrum, factors and their errors are those of :mod:`.svd` for another matrix.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..linalg import Metrics
from .factors import Factors, Split
from .svd import weighted_spectrum, weighted_svd

_DEARER = 1.1  # a term may cost this much more than the cheapest one


def splits(out_features: int, in_features: int) -> list[Split]:
    """All shapes of A and B for a weight of that shape: a pair of divisors each."""
    return [
        Split(m1, n1, out_features // m1, in_features // n1)
        for m1 in _divisors(out_features)
        for n1 in _divisors(in_features)
    ]


@cache
def kronecker_split(out_features: int, in_features: int) -> Split:
    """The shapes of A (m1, n1) and B (m2, n2) for a weight of that shape.

    A term costs ``m1 n1 + m2 n2`` numbers, least where both are about ``sqrt(out in)``. Of the splits within 10 % of
    the least, the one that takes the fewest multiplications to apply, ``n1 m2 (m1 + n2)`` a term: few large blocks,
    which also fit trained weights best. Low rank itself is chosen only where the sizes have no divisors for anything
    else.
    """
    possible = splits(out_features, in_features)
    least = min(sum(split.shape) for split in possible if split.is_none or split.full_rank > 1)
    cheap = [split for split in possible if sum(split.shape) <= _DEARER * least]
    return min(cheap, key=lambda split: (_is_low_rank(split), split.n1 * split.m2 * (split.m1 + split.n2), split.n1))


def split_metrics(metrics: Metrics, split: Split) -> Metrics:
    """Metrics of the rearranged matrix: ``C1 (x) X1`` of its rows and ``C2 (x) X2`` of its columns.

    ``tr(D^T C D X)`` is a metric of rows and columns of the rearranged D only if ``C = C1 (x) C2`` and ``X = X1 (x)
    X2``. Each is replaced by the product of its partial traces, ``C1 = tr_2 C`` and ``C2 = tr_1 C / tr C``: positive
    semi-definite, of the same trace, exact for a product (the identity is one) and for a factor of size 1. On trained
    weights they leave less error than the nearest products in the Frobenius norm.
    """
    C1, C2 = _partial_traces(metrics.row, split.m1, split.m2)
    X1, X2 = _partial_traces(metrics.column, split.n1, split.n2)
    return Metrics(row=_product(C1, X1, split.m1, split.n1), column=_product(C2, X2, split.m2, split.n2))


def spectrum(weight: Tensor, metrics: Metrics) -> Tensor:
    """:func:`weighted_spectrum` of the rearranged weight: what each further term removes from the error."""
    split = kronecker_split(*weight.shape)
    return weighted_spectrum(split.rearranged(weight), split_metrics(metrics, split))


def factorize(weight: Tensor, metrics: Metrics, rank: int) -> Factors:
    """The sum of ``rank`` Kronecker products that is nearest to the weight in :func:`split_metrics`, float64."""
    split = kronecker_split(*weight.shape)
    factors = weighted_svd(split.rearranged(weight), split_metrics(metrics, split), rank)
    return Factors(factors.left, factors.right, split)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _is_low_rank(split: Split) -> bool:
    return split.is_none or split.m1 == split.n2 == 1


def _partial_traces(metric: Tensor | None, first: int, second: int) -> tuple[Tensor | None, Tensor | None]:
    """Both factors of the product that replaces a metric; the second has the trace 1."""
    if metric is None:
        return None, None
    if metric.dim() == 1:
        parts = metric.view(first, second)
        return parts.sum(1), parts.sum(0) / metric.sum()
    blocks = metric.view(first, second, first, second)
    return torch.einsum("iaja->ij", blocks), torch.einsum("iaib->ab", blocks) / metric.trace()


def _product(outer: Tensor | None, inner: Tensor | None, outer_size: int, inner_size: int) -> Tensor | None:
    """The Kronecker product of two metrics."""
    if outer is None and inner is None:
        return None
    parts = [
        torch.ones(size, dtype=torch.float64) if part is None else part
        for part, size in ((outer, outer_size), (inner, inner_size))
    ]
    if all(part.dim() == 1 for part in parts):
        return torch.kron(*parts)
    return torch.kron(*(part.diag() if part.dim() == 1 else part for part in parts))
