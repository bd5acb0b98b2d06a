"""A low-rank weight as some of its own rows, and the others as their combinations (PIFA, ICML 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import warn_numerical
from .factors import Factors

_TINY = 1e-12  # what is left of 1 - b^T G b for a row that cannot be left out


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


def pivot(factors: Factors, *, growth: float = 2.0, exchanges: int | None = None) -> PivotedFactors:
    """Rank-k factors as k pivot rows and coefficients, in float64: for storage in float32, whose rounding is small.

    Pivots come from LU with partial pivoting of an orthonormal basis of ``left``; then rows are exchanged while a
    coefficient exceeds ``growth`` in magnitude, each exchange multiplying the volume of the pivot block by at least
    that much (strong rank-revealing factorization). Rounding of the rows comes back in the other rows, multiplied by
    the coefficients, so it is amplified, within bounds; where it matters, see :func:`spread_rows`.

    Args:
        exchanges: the most that are made; what is left when they are used up is said in a warning. None: 4 k.
    """
    out_features, rank = factors.left.shape
    basis, upper = torch.linalg.qr(factors.left.double())
    permutation = torch.linalg.lu_factor(basis)[1]
    order = torch.arange(out_features)
    for i, j in enumerate((permutation - 1).tolist()):
        order[[i, j]] = order[[j, i]]
    coefficients = coefficients_of(basis, order, rank)
    for _ in range(4 * rank if exchanges is None else exchanges):
        if not coefficients.numel() or float(coefficients.abs().max()) <= growth:
            break
        row, column = divmod(int(coefficients.abs().argmax()), rank)
        order[[rank + row, column]] = order[[column, rank + row]]
        coefficients = _exchange(coefficients, row, column)
    coefficients = coefficients_of(basis, order, rank)  # exchanging a large one leaves its rounding in the others
    if coefficients.numel() and (largest := float(coefficients.abs().max())) > 1.01 * growth:
        warn_numerical(
            f"pivoted factors of rank {rank} have a coefficient of {largest:.3g}, expected none above {growth:g}: "
            "rounding of their rows is amplified by as much. Set factor_format='factors' if it matters"
        )
    rows = basis[order[:rank]] @ (upper @ factors.right.double())
    return PivotedFactors(rows=rows, coefficients=coefficients, order=order)


def coefficients_of(basis: Tensor, order: Tensor, rank: int) -> Tensor:
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


# Rows that are left out between two products with all of them, and those among which they are chosen.
_TOGETHER, _CANDIDATES = 16, 64


def spread_rows(basis: Tensor) -> Tensor:
    """Row indices of B (m, k), of full rank k: first k rows p with a small ``tr((B_p^T B_p)^-1)``, then the others.

    For an orthonormal basis it is k + the sum of the squared coefficients, which is what rounding of the pivot rows is
    multiplied by in the other rows. Rows are left out one by one, each time the one that raises the trace least (Avron
    and Boutsidis 2013): with ``G = (B^T B)^-1``, without row b it is ``tr(G + G b b^T G / (1 - b^T G b))``. Several are
    chosen among the cheapest, as if one by one, before the costs of all rows are brought up to date. (m,), int64.
    """
    B, rows = basis.double(), torch.arange(len(basis))
    left_out, surplus = torch.zeros(len(B), dtype=torch.bool), len(B) - B.shape[1]
    G = torch.linalg.inv(B.T @ B)
    leverage, raised = ((B @ G) * B).sum(1), (B @ G).square().sum(1)  # b^T G b and b^T G^2 b
    while surplus:
        cost = raised / (1 - leverage).clamp_min(_TINY)
        candidates = cost.topk(min(_CANDIDATES, len(B)), largest=False).indices
        chosen = candidates[_cheapest(B[candidates], G, min(_TOGETHER, surplus, len(candidates)))]
        left_out[rows[chosen]] = True
        surplus -= len(chosen)
        Y = G @ B[chosen].T
        K = torch.linalg.inv(torch.eye(len(chosen), dtype=torch.float64) - B[chosen] @ Y)
        stay = ~left_out[rows]
        B, rows, leverage, raised = B[stay], rows[stay], leverage[stay], raised[stay]
        across, twice = (B @ torch.cat([Y, G @ Y], dim=1)).chunk(2, dim=1)
        step = across @ K
        leverage += (step * across).sum(1)
        raised += 2 * (step * twice).sum(1) + ((step @ (Y.T @ Y)) * step).sum(1)
        G += Y @ K @ Y.T
    return left_out.to(torch.uint8).argsort(stable=True)


def _cheapest(rows: Tensor, G: Tensor, count: int) -> list[int]:
    """Indices of the rows (q, k) that are left out first, ``count`` of them, given G before."""
    through = rows @ G
    P, R = through @ rows.T, through @ through.T  # b^T G b' and b^T G^2 b'
    chosen: list[int] = []
    for _ in range(count):
        cost = R.diagonal() / (1 - P.diagonal()).clamp_min(_TINY)
        cost[chosen] = torch.inf
        i = int(cost.argmin())
        chosen.append(i)
        p, r, kept = P[:, i].clone(), R[:, i].clone(), (1 - P[i, i]).clamp_min(_TINY)
        R = R + (torch.outer(r, p) + torch.outer(p, r)) / kept + torch.outer(p, p) * R[i, i] / kept**2
        P = P + torch.outer(p, p) / kept
    return chosen
