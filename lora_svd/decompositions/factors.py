"""A pair of factors that stands for a weight: low rank, or a sum of Kronecker products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """How the indices of a weight (out, in) are split in two: ``out = m1 m2``, ``in = n1 n2``.

    The matrix that is factorized has the entries of the weight in another order (Van Loan's rearrangement),
    ``M[(i1, j1), (i2, j2)] = W[(i1, i2), (j1, j2)]``, shape (m1 n1, m2 n2). ``M = sum_k a_k b_k^T`` is then
    ``W = sum_k A_k (x) B_k`` with A_k (m1, n1) and B_k (m2, n2). :meth:`none` leaves the weight as it is.
    """

    m1: int
    n1: int
    m2: int
    n2: int

    @classmethod
    def none(cls, out_features: int, in_features: int) -> Split:
        """The factors multiply to the weight itself: low rank."""
        return cls(out_features, 1, 1, in_features)

    @property
    def is_none(self) -> bool:
        return self.n1 == self.m2 == 1

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix that is factorized."""
        return self.m1 * self.n1, self.m2 * self.n2

    @property
    def stored(self) -> tuple[int, int] | None:
        """(m1, n1), which together with the weight's shape says all; None for none."""
        return None if self.is_none else (self.m1, self.n1)

    @property
    def full_rank(self) -> int:
        return min(self.shape)

    def rearranged(self, weight: Tensor) -> Tensor:
        """The matrix (m1 n1, m2 n2) of a weight (out, in)."""
        return weight.reshape(self.m1, self.m2, self.n1, self.n2).transpose(1, 2).reshape(self.shape)

    def restored(self, matrix: Tensor) -> Tensor:
        """The weight (out, in) of a matrix (m1 n1, m2 n2)."""
        blocks = matrix.reshape(self.m1, self.n1, self.m2, self.n2)
        return blocks.transpose(1, 2).reshape(self.m1 * self.m2, self.n1 * self.n2)


@dataclass(frozen=True)
class Factors:
    """A weight in factors, ``left @ right`` in the order of ``split`` (None: as it stands).

    Attributes:
        left: (out, k), or (m1 n1, k): a column is an A_k, row after row.
        right: (k, in), or (k, m2 n2): a row is a B_k, row after row.
        split: of the weight's indices.
        rows, columns: indices of those that they stand for, of a weight that has lost the others; None: all.
    """

    left: Tensor
    right: Tensor
    split: Split | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    @property
    def is_full(self) -> bool:
        """Whether they have full rank: the weight that they stand for is stored dense."""
        return self.rank >= min(len(self.left), self.right.shape[1])

    def stacked(self, other: Factors) -> Factors:
        """The sum of both products, as factors of the summed rank; both in the order of this one's split."""
        left, right = torch.cat([self.left, other.left], dim=1), torch.cat([self.right, other.right], dim=0)
        return replace(self, left=left, right=right)

    def product(self) -> Tensor:
        """The dense weight (out, in)."""
        matrix = self.left @ self.right
        return matrix if self.split is None else self.split.restored(matrix)

    def narrowed(self, like: Factors | None) -> Factors:
        """The rows and columns that another pair stands for, of a pair that stands for all."""
        if like is None:
            return self
        left = self.left if like.rows is None else self.left[like.rows]
        right = self.right if like.columns is None else self.right[:, like.columns]
        return replace(self, left=left, right=right, rows=like.rows, columns=like.columns)


def scattered(matrix: Tensor, shape: Sequence[int], rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """A matrix of that shape with these rows and columns, the others zero; with gradients."""
    if rows is not None:
        matrix = matrix.new_zeros(shape[0], matrix.shape[1]).index_copy(0, rows, matrix)
    if columns is not None:
        matrix = matrix.new_zeros(matrix.shape[0], shape[1]).index_copy(1, columns, matrix)
    return matrix


def dense_sum(factors: Factors, other: Factors) -> Tensor:
    """The dense sum of both products, float64, on the CPU."""
    return factors.product().cpu().double() + other.product().cpu().double()


def balance(factors: Factors) -> Factors:
    """The same product with equal norms of ``left[:, i]`` and ``right[i]``, so that neither factor loses precision."""
    left_norm, right_norm = factors.left.norm(dim=0), factors.right.norm(dim=1)
    scale = (right_norm / left_norm.clamp_min(1e-300)).sqrt()
    scale = torch.where((scale > 0) & torch.isfinite(scale), scale, torch.ones_like(scale))
    return replace(factors, left=factors.left * scale, right=factors.right / scale[:, None])
