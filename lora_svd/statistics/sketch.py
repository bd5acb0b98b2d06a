"""Gram matrices in less memory, and in less work.

For ``G = sum over rows of x x^T``, (n, n), and a matrix of signs O, (n, r), the sketch of G holds the rows of ``O^T G``
and the diagonal of G: (r + 1, n), a sum over the same rows. It stands for ``Y (O^T Y)^+ Y^T`` with ``Y = G O`` (the
Nystroem approximation) with the diagonal of G in place of its own; with r = 0, for the diagonal.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..linalg import check_semidefinite, eigen, gram

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


def gram_or_sketch(rows: Tensor, rank: int | None) -> Tensor:
    """``sum over rows of x x^T``, (n, n), or its sketch with r = rank."""
    return gram(rows) if rank is None else sketched_gram(rows.float(), rank)


# Rows that are added up to one, but no more than leave this many sums: few rows are little work.
GROUP = 4
_FEWEST_SUMS = 128


def signed_sums(rows: Tensor) -> Tensor:
    """Sums of ``GROUP`` rows each, with random signs, (n, k), whose Gram matrix is in expectation that of the rows.

    ``E[(sum e_t g_t)(sum e_t g_t)^T] = sum g_t g_t^T`` over the signs e, whatever the rows g are. Products of two rows
    of one sum stay as noise, which for g and h is as large as ``|g| |h|``: each of the largest rows is in a sum of its
    own, and the larger one is the smaller those it is added to.

    Args:
        rows: (tokens, k); the sums are in bfloat16 if these are, and else in float32.
    """
    group = min(GROUP, len(rows) // _FEWEST_SUMS)
    if group <= 1:
        return rows
    rows = rows if rows.dtype == torch.bfloat16 else rows.float()  # what is finite in float16 may have a sum that isn't
    order = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).argsort(descending=True)
    signs = 1 - 2 * torch.randint(2, (len(rows),), device=rows.device)
    order, signs = (F.pad(part, (0, -len(rows) % group)).view(group, -1) for part in (order, signs))  # with signs of 0
    sums = rows.new_zeros(order.shape[1], rows.shape[1])
    for index, (chosen, sign) in enumerate(zip(order, signs.to(rows.dtype), strict=True)):
        chosen, sign = (chosen.flip(0), sign.flip(0)) if index else (chosen, sign)
        sums.addcmul_(rows.index_select(0, chosen), sign[:, None])
    return sums


def _parts(sketch: Tensor) -> tuple[Tensor, Tensor]:
    """F, (n, k), and d, (n,), of the matrix ``F F^T + diag(d)`` that a sketch stands for; float64.

    Raises:
        NumericalError: it is the sketch of no positive semi-definite matrix.
    """
    sketch = sketch.double()
    products, diagonal = sketch[:-1], sketch[-1]
    core = products @ _signs(sketch.shape[1], len(products), sketch.device).double()
    values, vectors = eigen((core + core.T) / 2)
    if bool(sketch.any()) and len(values):
        check_semidefinite(float(values[0]), float(values[-1]))
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
