"""Singular value decomposition in a row metric and a column metric, truncation, and the pivoted storage of factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import Metrics, metric_root, metric_times, root_transpose_solve, root_transpose_times, shrink


@dataclass(frozen=True)
class Factors:
    """A rank-k weight ``left @ right``. left: (out, k), right: (k, in)."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    def stacked(self, other: Factors) -> Factors:
        """The sum of both products, as factors of the summed rank."""
        return Factors(torch.cat([self.left, other.left], dim=1), torch.cat([self.right, other.right], dim=0))

    def product(self) -> Tensor:
        """The dense weight (out, in)."""
        return self.left @ self.right


@dataclass(frozen=True)
class PivotedFactors:
    """A rank-k weight in ``k (out + in) - k^2`` numbers: k of its own rows, and the other rows as their combinations.

    ``W[order] = [rows; coefficients @ rows]``.

    Attributes:
        rows: (k, in), the pivot rows of W.
        coefficients: (out - k, k).
        order: (out,) int64, row indices of W: pivots first.
    """

    rows: Tensor
    coefficients: Tensor
    order: Tensor


def _scaled(weight: Tensor, metrics: Metrics) -> tuple[Tensor, Tensor | None, Tensor]:
    """``M = R^T W``, the root R of the row metric and ``M column M^T``, for a weight with out <= in."""
    root = metric_root(metrics.row)
    scaled = root_transpose_times(root, weight.double())
    return scaled, root, scaled @ metric_times(metrics.column, scaled.T)


def weighted_spectrum(weight: Tensor, metrics: Metrics) -> Tensor:
    """Squared singular values of ``row^(1/2) W column^(1/2)``, descending, float64, shape (min(out, in),).

    They are the eigenvalues of ``R^T W column W^T R`` with ``R R^T = row`` (or of the transposed product where that is
    smaller), so that only the metric of the smaller side needs a root and none needs an inverse. Their sum beyond k is
    the error ``tr(D^T row D column)`` of the best rank-k approximation, which Swift-SVD computes this way for a
    column metric alone.
    """
    if weight.shape[0] > weight.shape[1]:
        return weighted_spectrum(weight.T, metrics.transposed)
    _, _, gram = _scaled(weight, metrics)
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
    scaled, root, gram = _scaled(weight, metrics)
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


def balance(factors: Factors) -> Factors:
    """The same product with equal norms of ``left[:, i]`` and ``right[i]``, so that neither factor loses precision."""
    left_norm, right_norm = factors.left.norm(dim=0), factors.right.norm(dim=1)
    scale = (right_norm / left_norm.clamp_min(1e-300)).sqrt()
    scale = torch.where((scale > 0) & torch.isfinite(scale), scale, torch.ones_like(scale))
    return Factors(left=factors.left * scale, right=factors.right / scale[:, None])


def pivot(factors: Factors, *, growth: float = 2.0) -> PivotedFactors:
    """Rank-k factors as k pivot rows and coefficients (PIFA, ICML 2025), in float64.

    Pivots come from LU with partial pivoting of an orthonormal basis of ``left``; then rows are exchanged while a
    coefficient exceeds ``growth`` in magnitude, each exchange multiplying the volume of the pivot block by at least
    that much (strong rank-revealing factorization), so that rounding of the stored numbers is never amplified.
    """
    out_features, rank = factors.left.shape
    basis, upper = torch.linalg.qr(factors.left.double())
    permutation = torch.linalg.lu_factor(basis)[1]
    order = torch.arange(out_features)
    for i, j in enumerate((permutation - 1).tolist()):
        order[[i, j]] = order[[j, i]]
    coefficients = _coefficients(basis, order, rank)
    for _ in range(4 * rank):
        if not coefficients.numel() or float(coefficients.abs().max()) <= growth:
            break
        row, column = divmod(int(coefficients.abs().argmax()), rank)
        order[[rank + row, column]] = order[[column, rank + row]]
        coefficients = _exchange(coefficients, row, column)
    coefficients = _coefficients(basis, order, rank)  # exchanging a large one leaves its rounding in the others
    rows = basis[order[:rank]] @ (upper @ factors.right.double())
    return PivotedFactors(rows=rows, coefficients=coefficients, order=order)


def _coefficients(basis: Tensor, order: Tensor, rank: int) -> Tensor:
    """``basis[rest] @ basis[pivots]^-1``: (out - k, k)."""
    return torch.linalg.solve(basis[order[:rank]], basis[order[rank:]], left=False)


def _exchange(coefficients: Tensor, row: int, column: int) -> Tensor:
    """The coefficients after rest row ``row`` and pivot ``column`` have changed places: a rank-one update."""
    entry = coefficients[row, column]
    new_row = -coefficients[row] / entry
    new_row[column] = 1 / entry
    new_column = coefficients[:, column] / entry
    updated = coefficients + torch.outer(coefficients[:, column], new_row)
    updated[:, column] = new_column
    updated[row] = new_row
    return updated
