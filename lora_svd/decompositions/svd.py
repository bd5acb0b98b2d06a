"""Singular value decomposition in a row metric and a column metric, and truncation of what is factorized already."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import (
    Metrics,
    metric_root,
    metric_times,
    root_transpose_solve,
    root_transpose_times,
    shrink,
    symmetric_product,
)
from .factors import Factors


def _scaled(weight: Tensor, metrics: Metrics) -> tuple[Tensor, Tensor, Tensor | None]:
    """``R^T W``, its Gram matrix ``R^T W column W^T R`` and the root R of the row metric, for a float64 weight with
    out <= in."""
    root = metric_root(metrics.row)
    scaled = root_transpose_times(root, weight)
    return scaled, symmetric_product(scaled.T, metric_times(metrics.column, scaled.T)), root


def weighted_spectrum(weight: Tensor, metrics: Metrics) -> Tensor:
    """Squared singular values of ``row^(1/2) W column^(1/2)``, descending, float64, shape (min(out, in),).

    They are the eigenvalues of ``R^T W column W^T R`` with ``R R^T = row`` (or of the transposed product where that is
    smaller), so that only the metric of the smaller side needs a root and none needs an inverse. Their sum beyond k is
    the error ``tr(D^T row D column)`` of the best rank-k approximation, which Swift-SVD computes this way for a
    column metric alone.
    """
    if weight.shape[0] > weight.shape[1]:
        return weighted_spectrum(weight.T, metrics.transposed)
    _, gram, _ = _scaled(weight.double(), metrics)
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)


def weighted_svd(weight: Tensor, metrics: Metrics, rank: int) -> Factors:
    """The rank-k ``W_k`` that minimizes ``tr((W - W_k)^T row (W - W_k) column)``, as float64 factors.

    With ``R R^T = row`` and ``R^T W column W^T R = Q S^2 Q^T``: ``left = R^-T Q_k``, ``right = Q_k^T R^T W``; for
    out > in the same on the transposed weight. ``column = E[x x^T]`` alone is SVD-LLM (which whitens with a Cholesky
    factor and inverts it), a diagonal row metric alone FWSVD, both full the Kronecker-factored Fisher. Some published
    code multiplies by the lower factor itself instead of its transpose, which minimizes another norm.
    """
    if weight.shape[0] > weight.shape[1]:
        factors = weighted_svd(weight.T, metrics.transposed, rank)
        return Factors(left=factors.right.T, right=factors.left.T)
    scaled, gram, root = _scaled(weight.double(), metrics)
    _, vectors = torch.linalg.eigh(gram)
    leading = vectors[:, -rank:].flip(1)
    return Factors(left=root_transpose_solve(root, leading), right=leading.T @ scaled)


def truncate(factors: Factors, metrics: Metrics, rank: int) -> Factors:
    """:func:`weighted_svd` of ``left @ right`` without forming it: the same truncation of the identity in the metrics
    ``left^T row left`` and ``right column right^T``, whose size is the rank of the factors."""
    left, right = factors.left.cpu().double(), factors.right.cpu().double()
    # Columns of left get the norm 1, or parts of a small scale would be lost beside the others in the root.
    size = (left * metric_times(metrics.row, left)).sum(0).clamp_min(0).sqrt()
    left, right = left / size.where(size > 0, 1.0), right * size[:, None]
    row, column = left.T @ metric_times(metrics.row, left), right @ metric_times(metrics.column, right.T)
    inner = Metrics(row=shrink(row, 0.0), column=shrink(column, 0.0))  # a product that is zero leaves no metric
    kept = weighted_svd(torch.eye(factors.rank, dtype=torch.float64), inner, rank)
    return Factors(left=left @ kept.left, right=kept.right @ right)


def absorb(factors: Factors, bypass: Factors, metrics: Metrics) -> Factors:
    """The truncation of the sum of both products to the rank of ``factors``."""
    return truncate(factors.stacked(bypass), metrics, factors.rank)
