"""Low rank with a weight for every element (TFWSVD, Hua et al. 2022), by alternating least squares.

``min sum_ij F_ij (w_ij - a_i . b_j)^2 + lambda (sum_i |a_i|^2 + sum_j |b_j|^2)`` has no closed form. With b fixed every
a_i is the solution of a ridge regression of its own, and the reverse, so that the objective never rises.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import NumericalError, warn_numerical
from ..linalg import Metrics
from .factors import Factors, balance
from .svd import weighted_spectrum, weighted_svd

RIDGE = 1e-3  # lambda, in units of the mean F times the mean kept singular value
TOLERANCE = 3e-3  # of the objective, relative, from one sweep to the next
SWEEPS = 30
_ENTRIES = 2**24  # of the k x k matrices that are solved at once


def spectrum(weight: Tensor, metrics: Metrics) -> Tensor:
    """The spectrum in :func:`row_metric`, FWSVD's: what a rank is worth if errors do not follow F within a row.

    The ranks of this problem are not nested; solving it at each of them would take hours.
    """
    return weighted_spectrum(weight, row_metric(metrics))


def factorize(weight: Tensor, metrics: Metrics, rank: int) -> Factors:
    """Factors of the rank at a local minimum, started at FWSVD's solution; float64.

    Stops when the objective falls by less than ``TOLERANCE`` of itself. A sweep takes ``2 k^2 out in`` multiplications.

    Raises:
        NumericalError: F has negative entries.
    """
    if metrics.elements is not None and (smallest := float(metrics.elements.min())) < 0:
        raise NumericalError(f"weights of the elements: got a smallest one of {smallest:.3g}, expected none below 0")
    start = balance(weighted_svd(weight, row_metric(metrics), rank))
    if metrics.elements is None or not bool(weight.any()):
        return start
    factors, before = start, float("inf")
    for factors, objective in sweeps(weight, metrics.elements, start):
        if before - objective <= TOLERANCE * objective:
            return balance(factors)
        before = objective
    warn_numerical(
        f"alternating least squares of a weight of {tuple(weight.shape)} at rank {rank} still gained more than "
        f"{TOLERANCE:g} in the last of {SWEEPS} sweeps; its factors are better than where it started, but not the best"
    )
    return balance(factors)


def sweeps(weight: Tensor, elements: Tensor, start: Factors) -> Iterator[tuple[Factors, float]]:
    """Factors and objective after each sweep over rows and columns, ``SWEEPS`` times.

    The objective is in units of the mean F, with lambda fixed by the start.
    """
    weight, F = weight.double(), elements.double() / elements.double().mean()
    ridge = RIDGE * float(start.left.norm() * start.right.norm()) / start.rank
    left, right = start.left, start.right.T
    for _ in range(SWEEPS):
        left = _solve_rows(weight, F, right, ridge)
        right = _solve_rows(weight.T, F.T, left, ridge)
        objective = (F * (weight - left @ right.T).square()).sum() + ridge * (
            left.square().sum() + right.square().sum()
        )
        yield Factors(left, right.T), float(objective)


def row_metric(metrics: Metrics) -> Metrics:
    """The mean of F over each row: FWSVD's assumption, in the same units."""
    return metrics if metrics.elements is None else Metrics(row=metrics.elements.mean(1))


def _solve_rows(weight: Tensor, F: Tensor, right: Tensor, ridge: float) -> Tensor:
    """``a_i = (sum_j F_ij b_j b_j^T + ridge I)^-1 sum_j F_ij w_ij b_j``, (m, k). weight, F: (m, n), right: (n, k)."""
    rank = right.shape[1]
    step = max(1, _ENTRIES // rank**2)
    solved = []
    for rows, importance in zip(weight.split(step), F.split(step), strict=True):
        grams = right.new_zeros(len(rows), rank, rank)
        for p in range(rank):  # one matrix product for all rows; the lower half is all that a root needs
            grams[:, p:, p] = importance @ (right[:, p:] * right[:, p : p + 1])
        grams.diagonal(dim1=1, dim2=2).add_(ridge)
        roots = torch.linalg.cholesky(grams)
        solved.append(torch.cholesky_solve(((importance * rows) @ right)[..., None], roots)[..., 0])
    return torch.cat(solved)
