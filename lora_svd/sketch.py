"""Gram matrices in less memory.

For ``G = sum over rows of x x^T``, (n, n), and a matrix of signs O, (n, r), the sketch of G holds the rows of ``O^T G``
and the diagonal of G: (r + 1, n), a sum over the same rows. It stands for ``Y (O^T Y)^+ Y^T`` with ``Y = G O`` (the
Nystroem approximation) with the diagonal of G in place of its own; with r = 0, for the diagonal. Pure.

Weights (256, 1024) at rank 122 in the metric of inputs whose standard deviations fall like ``i^-1/2`` (``i^-1``) in a
random basis leave 1.25 (1.74) times the least error with r = n / 16, and 2.35 (80) times with the diagonal.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

_NOISE = 1e-6  # of the largest eigenvalue: about what rounding in float32 makes of one that is zero


@functools.lru_cache(maxsize=8)
def _signs(size: int, rank: int, device: torch.device) -> Tensor:
    """O: (size, rank), +1 or -1, float32, the same in every process and on every machine, since sums are resumed."""
    words = np.random.PCG64(size).random_raw(math.ceil(size * rank / 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8))[: size * rank]
    return (2 * torch.from_numpy(bits).view(size, rank).float() - 1).to(device)


def sketched_gram(rows: Tensor, rank: int) -> Tensor:
    """The sketch of ``sum over rows of x x^T``, (rank + 1, n), of rows (tokens, n), float32."""
    signs = _signs(rows.shape[1], rank, rows.device)
    return torch.cat([(rows @ signs).T @ rows, rows.square().sum(0, keepdim=True)])


def _parts(sketch: Tensor) -> tuple[Tensor, Tensor]:
    """F, (n, k), and d, (n,), of the matrix ``F F^T + diag(d)`` that a sketch stands for; float64."""
    sketch = sketch.double()
    products, diagonal = sketch[:-1], sketch[-1]
    core = products @ _signs(sketch.shape[1], len(products), sketch.device).double()
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    seen = values > _NOISE * values.max() if len(values) else values > 0
    factor = products.T @ (vectors[:, seen] / values[seen].sqrt())
    return factor, (diagonal - factor.square().sum(1)).clamp_min(0)


def expand(sketch: Tensor) -> Tensor:
    """The matrix that a sketch (r + 1, n) stands for, (n, n), float64, positive semi-definite."""
    factor, rest = _parts(sketch)
    result = factor @ factor.T
    result.diagonal().add_(rest)
    return result


def between(A: Tensor, sketch: Tensor) -> Tensor:
    """``A G A^T``, (m, m), float64, for A (m, n) and the G that a sketch stands for, which is not formed."""
    A = A.double()
    factor, rest = _parts(sketch)
    inner = A @ factor
    return inner @ inner.T + (A * rest) @ A.T
