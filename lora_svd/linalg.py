"""Matrix functions behind the weighted factorizations. Pure: float64 in, float64 out, named failures.

A *metric* is a symmetric positive semi-definite weight on the rows or columns of a matrix, stored as ``None`` (the
identity), a vector (its diagonal) or a square matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from .errors import NumericalError, warn_numerical

# Negative eigenvalues of a Gram matrix accumulated in float32 are rounding. Beyond this share of the largest one they
# are not (statistics accumulated in half precision reach 1e-3), and no root of the matrix means anything.
INDEFINITE_TOLERANCE = 1e-4
# Smaller eigenvalues, relative to the largest, are raised to it, or the root could not be inverted.
SINGULAR = 1e-12


@dataclass(frozen=True)
class Metrics:
    """What an error in each direction costs: ``tr(D^T row D column)`` for the error D of a weight (out, in).

    Attributes:
        row: None, (out,) or (out, out).
        column: None, (in,) or (in, in).
        elements: F (out, in), if an error costs ``sum_ij F_ij D_ij^2`` instead; row and column are then None.
    """

    row: Tensor | None = None
    column: Tensor | None = None
    elements: Tensor | None = None

    @property
    def transposed(self) -> Metrics:
        """The same metrics for the transposed weight."""
        return Metrics(row=self.column, column=self.row)

    @property
    def zero(self) -> list[str]:
        """Names of the metrics that are zero throughout: with one of them no error costs anything."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return [name for name, metric in given.items() if metric is not None and not bool(metric.any())]

    def narrowed(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Metrics:
        """The metrics of some rows and columns of the weight; None: of all."""
        elements = self.elements
        if elements is not None:
            elements = elements if rows is None else elements[rows]
            elements = elements if columns is None else elements[:, columns]
        return Metrics(_part(self.row, rows), _part(self.column, columns), elements)

    @property
    def definite(self) -> Metrics:
        """The same with the identity in place of those that are zero, for factors where all are as good."""
        return replace(self, **dict.fromkeys(self.zero))


def _part(metric: Tensor | None, index: Tensor | None) -> Tensor | None:
    if metric is None or index is None:
        return metric
    return metric[index] if metric.dim() == 1 else metric[index][:, index]


def gram(rows: Tensor) -> Tensor:
    """``sum over rows of x x^T``, (n, n), of rows (tokens, n), in their dtype, but in float32 of half-precision ones.

    Products of bfloat16 numbers are exact in float32, and units made for them, where there are some, add them in
    float32: as exact as products of float32, and faster.
    """
    if rows.dtype == torch.bfloat16:
        with _bfloat16_products():
            return rows.T.float() @ rows.float()
    rows = rows.float() if rows.dtype == torch.float16 else rows
    return symmetric_product(rows, rows)


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Multiply float32 tensors as if they were bfloat16 (oneDNN) or TensorFloat-32 (CUDA), and add in float32."""
    libraries: Any = torch.backends
    backends = ((libraries.mkldnn.matmul, "bf16"), (libraries.cuda.matmul, "tf32"))
    before = [backend.fp32_precision for backend, _ in backends]
    for backend, precision in backends:
        backend.fp32_precision = precision
    try:
        yield
    finally:
        for (backend, _), precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """``left^T right``, (n, n), of matrices (..., n) whose product is known to be symmetric, and is so to the bit.

    By blocks of its upper triangle, which saves up to half of the multiplications.
    """
    size = left.shape[1]
    total = left.new_empty(size, size)
    for start, end in _blocks(size):
        total[start:end, start:] = left[:, start:end].T @ right[:, start:]
        block = total[start:end, start:end]
        block.copy_(block.triu() + block.triu(1).T)
        total[end:, start:end] = total[start:end, end:].T
    return total


def _blocks(size: int) -> list[tuple[int, int]]:
    step = max(192, size // 8)
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def non_finite(values: Tensor) -> str | None:
    """None if all values are; else how many are not. One pass: a sum of finite values is finite, or overflows."""
    num_bad = 0 if bool(values.sum().isfinite()) else int((~torch.isfinite(values)).sum())
    return f"{num_bad} of {values.numel()} non-finite values" if num_bad else None


@overload
def shrink(metric: None, amount: float, correlation: float = 0.0) -> None: ...


@overload
def shrink(metric: Tensor, amount: float, correlation: float = 0.0) -> Tensor: ...


def shrink(metric: Tensor | None, amount: float, correlation: float = 0.0) -> Tensor | None:
    """``(1 - amount) M' + amount * mean(diag M) * I``, M' = M with its off-diagonal times ``1 - correlation``; float64.

    A full metric estimated from few tokens has a good diagonal and noisy correlations: it is shrunk towards the first
    more than both are towards the identity. A metric that is zero stays zero.

    Raises:
        NumericalError: the metric has non-finite values.
    """
    if metric is None:
        return None
    metric = metric.to(torch.float64)
    if bad := non_finite(metric):
        raise NumericalError(f"metric has {bad}, expected none")
    diagonal = metric if metric.dim() == 1 else metric.diagonal()
    mean = float(diagonal.mean())
    if metric.dim() == 1:
        return (1 - amount) * metric + amount * mean
    shrunk = (1 - amount) * (1 - correlation) * metric
    shrunk.diagonal().copy_((1 - amount) * diagonal + amount * mean)
    return shrunk


def metric_root(metric: Tensor | None) -> Tensor | None:
    """R with ``R R^T = metric``: None, (n,) for a diagonal, else lower triangular or, for a singular metric or one that
    rounding left indefinite, eigenvectors times square roots of eigenvalues, of which those below ``SINGULAR`` times
    the largest are raised to that, with a warning.

    Raises:
        NumericalError: an eigenvalue is below ``-INDEFINITE_TOLERANCE`` times the largest.
    """
    root, num_raised = raised_root(metric)
    if root is not None and num_raised:
        warn_numerical(
            f"a metric is singular: {num_raised} of its {len(root)} eigenvalues were raised to {SINGULAR:g} of the "
            "largest. Raise row_shrinkage and column_shrinkage, or observe more text"
        )
    return root


def raised_root(metric: Tensor | None) -> tuple[Tensor | None, int]:
    """The root of :func:`metric_root`, and how many eigenvalues were raised."""
    if metric is None:
        return None, 0
    if metric.dim() == 1:
        values, vectors = metric, None
    else:
        root, failed = torch.linalg.cholesky_ex(metric)
        if not int(failed):
            return root, 0
        values, vectors = eigen(metric)
    largest = float(values.max())
    check_semidefinite(float(values.min()), largest)
    num_raised = int((values < SINGULAR * largest).sum())
    roots = values.clamp_min(SINGULAR * largest).sqrt()
    return roots if vectors is None else vectors * roots, num_raised


def check_semidefinite(smallest: float, largest: float) -> None:
    """Raise unless eigenvalues in this range are those of a positive semi-definite matrix that is not zero."""
    if largest <= 0 or smallest < -INDEFINITE_TOLERANCE * largest:
        raise NumericalError(
            f"indefinite metric: eigenvalues from {smallest:.3g} to {largest:.3g}, expected none below "
            f"{-INDEFINITE_TOLERANCE:g} of the largest. Accumulate statistics in float32 or raise the shrinkage"
        )


def root_transpose_times(root: Tensor | None, matrix: Tensor) -> Tensor:
    """``R^T M`` for a root from :func:`metric_root`; of a triangular one the zeros are left out, by blocks."""
    if root is None:
        return matrix
    if root.dim() == 1:
        return root[:, None] * matrix
    if not _is_lower(root):
        return root.T @ matrix
    return torch.cat([root[start:, start:end].T @ matrix[start:] for start, end in _blocks(len(root))])


def _is_lower(root: Tensor) -> bool:
    return torch.equal(root, root.tril())


def root_transpose_solve(root: Tensor | None, matrix: Tensor) -> Tensor:
    """``R^-T M`` for a root from :func:`metric_root`."""
    if root is None:
        return matrix
    if root.dim() == 1:
        return matrix / root[:, None]
    if _is_lower(root):
        return torch.linalg.solve_triangular(root.T, matrix, upper=True)
    return torch.linalg.solve(root.T, matrix)


def eigenvalues(matrix: Tensor) -> Tensor:
    """Of a symmetric matrix, ascending.

    On the CPU by NumPy's LAPACK, as :func:`eigen`: PyTorch's takes 2 to 6 times as long for hundreds of rows, since its
    threads wait for each other in every small step.
    """
    if matrix.device.type == "cpu":
        return torch.from_numpy(np.linalg.eigvalsh(matrix.numpy()))
    return torch.linalg.eigvalsh(matrix)


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a symmetric matrix, ascending, and its eigenvectors, as columns."""
    if matrix.device.type == "cpu":
        values, vectors = np.linalg.eigh(matrix.numpy())
        return torch.from_numpy(values), torch.from_numpy(vectors)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def metric_times(metric: Tensor | None, matrix: Tensor) -> Tensor:
    """``metric @ M``."""
    if metric is None:
        return matrix
    return metric[:, None] * matrix if metric.dim() == 1 else metric @ matrix
