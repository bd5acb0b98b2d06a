"""Rounding of factors to few levels, with the error made so far taken up by what is rounded next. Pure, float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .linalg import metric_times, shrink

BLOCK = 128  # columns whose errors are passed on to the rest by one matrix product
_SHRINKAGE = 0.1  # of X: with less, feedback trusts correlations that other text does not have
_SPAN = torch.linspace(0.75, 1.15, 9, dtype=torch.float64)  # scales to try, in units of a block's largest magnitude


def nearest_levels(values: Tensor, levels: Tensor) -> Tensor:
    """Index of the level next to each value. levels: (n,) in any order; int64 of the shape of ``values``."""
    ascending, indices = levels.sort()
    midpoints = (ascending[1:] + ascending[:-1]) / 2
    return indices[torch.bucketize(values.contiguous(), midpoints)]


def fit_scales(weight: Tensor, levels: Tensor, block: int) -> Tensor:
    """The scale of every ``block`` consecutive numbers with the least squared error once they are rounded to nearest.

    The usual scale, the largest magnitude, spends the outermost level on one number. On normal numbers in blocks of 64
    the best multiple of it, from 0.75 to 1.15, takes 13 % off the squared error of NF4.

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

    Without a full metric every number is rounded to the nearest level. With X the columns are rounded one after the
    other, those of the largest X_jj first, and each one's error is subtracted, in proportion to what is correlated with
    it, from the columns that are still to come: GPTQ (Frantar et al. 2023), here on a grid that need not be uniform.

    Args:
        weight: W, (out, in).
        scale: (out, in), positive where W is not zero; fixed beforehand, so that any layout of blocks will do.
        levels: (n,), of a unit scale.
        metric: X = E[x x^T] of what the weight is multiplied with, as in :mod:`lora_svd.linalg`; of any size.
    """
    weight, scale, levels = weight.double(), scale.double(), levels.double()
    scale = scale.where(scale > 0, 1.0)
    metric = shrink(metric, _SHRINKAGE)
    if metric is None or metric.dim() == 1:
        return nearest_levels(weight / scale, levels)
    order = metric.diagonal().argsort(descending=True)
    inverse = torch.linalg.inv(metric[order][:, order])
    upper = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)
    rest, scale = weight[:, order].clone(), scale[:, order]
    codes = torch.empty(weight.shape, dtype=torch.int64)
    for start in range(0, len(order), BLOCK):
        block = slice(start, min(start + BLOCK, len(order)))
        errors = torch.empty_like(rest[:, block])
        for column in range(block.start, block.stop):
            code = nearest_levels(rest[:, column] / scale[:, column], levels)
            error = (rest[:, column] - scale[:, column] * levels[code]) / upper[column, column]
            rest[:, column + 1 : block.stop] -= torch.outer(error, upper[column, column + 1 : block.stop])
            errors[:, column - start] = error
            codes[:, order[column]] = code
        rest[:, block.stop :] -= errors @ upper[block, block.stop :]
    return codes


def refit_left(left: Tensor, right: Tensor, rounded: Tensor, metric: Tensor | None = None) -> Tensor:
    """The L' that minimizes ``tr((left right - L' rounded) X (left right - L' rounded)^T)``, (out, k), float64.

    ``L' = left (right X rounded^T) (rounded X rounded^T)^-1``: it makes good what rounding ``right`` (k, in) did, and
    is the minimum in every row metric. On transposed factors it refits ``right`` to a rounded ``left``.

    Args:
        metric: X, a metric as in :mod:`lora_svd.linalg`.
    """
    left, right, rounded = left.double(), right.double(), rounded.double()
    weighted = metric_times(shrink(metric, _SHRINKAGE), rounded.T)
    inner = shrink(rounded @ weighted, 1e-9)  # rows that rounding has made zero leave no direction
    assert inner is not None
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
