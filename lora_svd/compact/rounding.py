"""Rounding of factors, with the error made so far taken up by what is rounded next. Pure, float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..decompositions import Factors, PivotedFactors
from ..decompositions.pivots import spread_rows
from ..errors import NumericalError
from ..linalg import Metrics, metric_times, shrink

BLOCK = 128  # columns whose errors are passed on to the rest by one matrix product
# Of X: with less, feedback to few levels trusts correlations that other text does not have.
_SHRINKAGE = 0.1
_HALF_SHRINKAGE = 1e-2  # rounding to half precision is so small that there is little to lose
_SPAN = torch.linspace(0.75, 1.15, 9, dtype=torch.float64)  # scales to try, in units of a block's largest magnitude


def in_range(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in another dtype.

    Raises:
        NumericalError: it cannot hold one of them.
    """
    rounded = values.to(dtype)
    if not bool(rounded.isfinite().all()):
        raise NumericalError(f"its factors have numbers that {dtype} cannot hold; load the base in bfloat16 or float32")
    return rounded


def nearest_levels(values: Tensor, levels: Tensor) -> Tensor:
    """Index of the level next to each value. levels: (n,) in any order; int64 of the shape of ``values``."""
    ascending, indices = levels.sort()
    midpoints = (ascending[1:] + ascending[:-1]) / 2
    return indices[torch.bucketize(values.contiguous(), midpoints)]


def fit_scales(weight: Tensor, levels: Tensor, block: int) -> Tensor:
    """The scale of every ``block`` consecutive numbers with the least squared error once they are rounded to nearest.

    The usual scale, the largest magnitude, spends the outermost level on one number; multiples of it, from 0.75 to
    1.15, are tried.

    Args:
        weight: of any shape, row after row; the last block may be shorter.
        levels: (n,), of a unit scale, the largest magnitude 1.

    Returns:
        (blocks,), float64; 0 where all numbers are.
    """
    numbers = weight.double().flatten()
    blocks = torch.nn.functional.pad(numbers, (0, -len(numbers) % block)).view(-1, block)
    largest = blocks.abs().amax(1)
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    for share in _SPAN:
        scale = (share * largest)[:, None]
        rounded = scale * levels.double()[nearest_levels(blocks / scale.where(scale > 0, 1.0), levels.double())]
        error = (blocks - rounded).square().sum(1)
        best, least = best.where(error >= least, share * largest), least.minimum(error)
    return best


def round_weight(weight: Tensor, scale: Tensor, levels: Tensor, metric: Tensor | None = None) -> Tensor:
    """Codes c, (out, in) int64, whose weight ``Q = scale * levels[c]`` has a small ``tr((W - Q) X (W - Q)^T)``.

    Args:
        weight: W, (out, in).
        scale: (out, in), positive where W is not zero; fixed beforehand, so that any layout of blocks will do.
        levels: (n,), of a unit scale.
        metric: X = E[x x^T] of what the weight is multiplied with, as in :mod:`lora_svd.linalg`; of any size.
    """
    levels, scale = levels.double(), scale.double().where(scale > 0, 1.0)

    def nearest(values: Tensor, columns: Tensor) -> Tensor:
        return scale[:, columns] * levels[nearest_levels(values / scale[:, columns], levels)]

    return nearest_levels(round_with_feedback(weight, nearest, metric) / scale, levels)


def round_with_feedback(
    weight: Tensor,
    nearest: Callable[[Tensor, Tensor], Tensor],
    metric: Tensor | None,
    shrinkage: float = _SHRINKAGE,
) -> Tensor:
    """Q, (out, in) float64, of numbers that ``nearest`` returns, with a small ``tr((W - Q) X (W - Q)^T)``.

    Without a full metric every number is rounded to the nearest one. With X the columns are rounded one after the
    other, those of the largest X_jj first, and each one's error is subtracted, in proportion to what is correlated with
    it, from the columns that are still to come: GPTQ (Frantar et al. 2023), here on a grid that need not be uniform.

    Args:
        nearest: ``(values, columns) -> rounded``, of the columns (int64) of the weight that are given.
        shrinkage: of X towards its mean.
    """
    weight, metric = weight.double(), shrink(metric, shrinkage)
    if metric is None or metric.dim() == 1 or not bool(metric.any()):
        return nearest(weight, torch.arange(weight.shape[1]))
    order = metric.diagonal().argsort(descending=True)
    inverse = torch.linalg.inv(metric[order][:, order])
    upper = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)
    rest, rounded = weight[:, order].clone(), torch.empty_like(weight)
    for start in range(0, len(order), BLOCK):
        block = slice(start, min(start + BLOCK, len(order)))
        errors = torch.empty_like(rest[:, block])
        for column in range(block.start, block.stop):
            values = nearest(rest[:, column : column + 1], order[column : column + 1])[:, 0]
            error = (rest[:, column] - values) / upper[column, column]
            rest[:, column + 1 : block.stop] -= torch.outer(error, upper[column, column + 1 : block.stop])
            errors[:, column - start] = error
            rounded[:, order[column]] = values
        rest[:, block.stop :] -= errors @ upper[block, block.stop :]
    return rounded


def round_pivots(factors: Factors, dtype: torch.dtype, metrics: Metrics) -> PivotedFactors:
    """Factors as pivot rows and coefficients that ``dtype`` holds exactly, with a small error in the metrics.

    Rounding of the pivot rows comes back in all others, multiplied by the coefficients. So the pivots are those for
    which, in the metrics, coefficients are small (:func:`~lora_svd.decompositions.pivots.spread_rows`); coefficients
    are refitted to the rounded rows, and rounded with feedback.
    """
    left, right = factors.left.cpu().double(), factors.right.cpu().double()
    weighted = metric_times(metrics.column, right.T)
    cost = torch.ones(len(left), dtype=torch.float64) if metrics.row is None else _diagonal(metrics.row)
    size = ((left @ (right @ weighted)) * left).sum(1).clamp_min(0)
    # An orthonormal basis in the row metric, of rows of one size; in bounds, or the elimination would lose precision.
    cost, size = (part.clamp_min(1e-6 * float(part.max())).clamp_min(1e-300).sqrt() for part in (cost, size))
    order = spread_rows(torch.linalg.qr(cost[:, None] * left).Q / (cost * size)[:, None])
    pivots, others = left[order[: factors.rank]], left[order[factors.rank :]]

    def nearest(values: Tensor, _: Tensor | None = None) -> Tensor:
        return in_range(values, dtype).double()

    rows = nearest(pivots @ right)
    gram = rows @ metric_times(metrics.column, rows.T)
    coefficients = refit_left(others, right, rows, metrics.column, shrinkage=0.0)
    return PivotedFactors(rows, round_with_feedback(coefficients, nearest, gram, _HALF_SHRINKAGE), order)


def _diagonal(metric: Tensor) -> Tensor:
    return metric if metric.dim() == 1 else metric.diagonal()


def refit_left(
    left: Tensor, right: Tensor, rounded: Tensor, metric: Tensor | None = None, shrinkage: float = _SHRINKAGE
) -> Tensor:
    """The L' that minimizes ``tr((left right - L' rounded) X (left right - L' rounded)^T)``, (out, k), float64.

    ``L' = left (right X rounded^T) (rounded X rounded^T)^-1``: it makes good what rounding ``right`` (k, in) did, and
    is the minimum in every row metric. On transposed factors it refits ``right`` to a rounded ``left``.

    Args:
        metric: X, a metric as in :mod:`lora_svd.linalg`.
        shrinkage: of X towards its mean.
    """
    left, right, rounded = left.double(), right.double(), rounded.double()
    weighted = metric_times(shrink(metric, shrinkage), rounded.T)
    inner = shrink(rounded @ weighted, 1e-9)  # rows that rounding has made zero leave no direction
    if not bool(inner.any()):  # of a weight that is zero
        return torch.zeros_like(left)
    return torch.linalg.solve(inner, left @ (right @ weighted), left=False)


def mix(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with the ranks mixed: columns of ``left`` of norm 1, times a fixed random orthogonal matrix.

    The ranks of an SVD are uncorrelated, so that :func:`round_weight` could pass no error of ``left`` on. Once they are
    mixed it can, and what remains is near the geometric mean of the squared singular values instead of their mean. The
    rotations that others put around whole weights to tame outliers (QuIP#, QuaRot) have to be undone when the model
    runs; this one is inside of the product.
    """
    rank = left.shape[1]
    norms = left.norm(dim=0)
    norms = norms.where(norms > 0, 1.0)
    random = torch.randn(rank, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(random).Q
    return (left / norms) @ rotation, rotation.T @ (right * norms[:, None])
