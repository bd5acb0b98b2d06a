"""Singular value decomposition in a row metric and a column metric, and truncation of what is factorized already."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import (
    Metrics,
    check_semidefinite,
    eigen,
    eigenvalues,
    metric_root,
    metric_times,
    raised_root,
    root_transpose_solve,
    root_transpose_times,
    symmetric_product,
)
from .factors import Factors


def weighted_spectrum(weight: Tensor, metrics: Metrics) -> Tensor:
    """Squared singular values of ``row^(1/2) W column^(1/2)``, descending, float64, shape (min(out, in),).

    They are the eigenvalues of ``R^T W column W^T R`` with ``R R^T = row`` (or of the transposed product where that is
    smaller), so that only the metric of the smaller side needs a root and none needs an inverse. Their sum beyond k is
    the error ``tr(D^T row D column)`` of the best rank-k approximation, which Swift-SVD computes this way for a
    column metric alone.
    """
    if weight.shape[0] > weight.shape[1]:
        return weighted_spectrum(weight.T, metrics.transposed)
    scaled = root_transpose_times(metric_root(metrics.row), weight.double())
    return _checked(eigenvalues(_column_gram(scaled, metrics))).flip(0).clamp_min(0)


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
    return _svd_with_root(weight.double(), metrics, metric_root(metrics.row), rank)


def _svd_with_root(weight: Tensor, metrics: Metrics, root: Tensor | None, rank: int) -> Factors:
    """:func:`weighted_svd` of a weight with out <= in, given the root of the row metric."""
    scaled = root_transpose_times(root, weight)
    values, vectors = eigen(_column_gram(scaled, metrics))
    _checked(values)
    leading = vectors[:, -rank:].flip(1)
    return Factors(left=root_transpose_solve(root, leading), right=leading.T @ scaled)


def _column_gram(scaled: Tensor, metrics: Metrics) -> Tensor:
    """``S column S^T`` of the rows of S."""
    return symmetric_product(scaled.T, metric_times(metrics.column, scaled.T))


def _checked(values: Tensor) -> Tensor:
    """Ascending eigenvalues, which a column metric that is not one would make negative."""
    if float(values[-1]) > 0 or float(values[0]) < 0:
        check_semidefinite(float(values[0]), float(values[-1]))
    return values


def truncate(factors: Factors, metrics: Metrics, rank: int) -> Factors:
    """:func:`weighted_svd` of ``left @ right`` without forming it: the same truncation of the identity in the metrics
    ``left^T row left`` and ``right column right^T``, whose size is the rank of the factors."""
    left, right = factors.left.cpu().double(), factors.right.cpu().double()
    # Columns of left get the norm 1, or parts of a small scale would be lost beside the others in the root.
    size = (left * metric_times(metrics.row, left)).sum(0).clamp_min(0).sqrt()
    left, right = left / size.where(size > 0, 1.0), right * size[:, None]
    row, column = left.T @ metric_times(metrics.row, left), right @ metric_times(metrics.column, right.T)
    inner = Metrics(row=row, column=column).definite  # a product that is zero leaves no metric
    # Columns of left may depend on each other, as those of a bypass within the weight do. A direction of theirs that is
    # raised from zero is none of the product, which it leaves as it is: no fallback to warn of.
    root, _ = raised_root(inner.row)
    kept = _svd_with_root(torch.eye(factors.rank, dtype=torch.float64), inner, root, rank)
    return Factors(left=left @ kept.left, right=kept.right @ right)


def absorb(factors: Factors, bypass: Factors, metrics: Metrics) -> Factors:
    """The truncation of the sum of both products to the rank of ``factors``."""
    return truncate(factors.stacked(bypass), metrics, factors.rank)
