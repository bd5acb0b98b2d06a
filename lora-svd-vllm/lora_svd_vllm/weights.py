"""A weight of low rank as tensors: some of its rows, some of its columns, its other form; and several as one module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Weight:
    """``W`` (out, in), in one of three forms.

    dense: ``W = right``. factors: ``W = left right``, right (k, in). pivoted: ``W = [right; left right][order]``, whose
    right holds k rows of W; ``order`` (out,) says where each row is found.
    """

    right: Tensor
    left: Tensor | None = None
    order: Tensor | None = None

    def rows(self, index: Tensor) -> Weight:
        """The rows of W at ``index``; -1: a row of zeros."""
        if self.left is None:
            return Weight(take(self.right, index))
        if self.order is None:
            return Weight(self.right, take(self.left, index))
        rank = self.right.shape[0]
        place = take(self.order + 1, index) - 1  # -1 where W is to have zeros
        own = (place >= rank) | (place < 0)
        sources = torch.where(place < 0, -1, place - rank)[own]
        order = place.clone()
        order[own] = torch.arange(rank, rank + len(sources), dtype=order.dtype)
        return Weight(self.right, take(self.left, sources), order)

    def columns(self, index: Tensor) -> Weight:
        """The columns of W at ``index``; -1: a column of zeros."""
        return replace(self, right=take(self.right.T, index).T.contiguous())

    def expanded(self) -> Weight:
        """Pivoted as factors, with ``k^2`` numbers more; others as they are."""
        if self.left is None or self.order is None:
            return self
        unit = torch.eye(self.right.shape[0], dtype=self.left.dtype, device=self.left.device)
        return Weight(self.right, torch.cat([unit, self.left])[self.order])

    def to(self, device: torch.device, dtype: torch.dtype) -> Weight:
        left = None if self.left is None else self.left.to(device, dtype)
        order = None if self.order is None else self.order.to(device)
        return Weight(self.right.to(device, dtype), left, order)

    def matrix(self) -> Tensor:
        factors = self.expanded()
        return factors.right if factors.left is None else factors.left @ factors.right


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows of a tensor; zeros where the index is -1."""
    taken = tensor[index.clamp_min(0)]
    taken[index < 0] = 0
    return taken


class FusedProduct(nn.Module):
    """``[W_1 x, W_2 x, ...]``: one product with all that reads x, then one with each left factor.

    Args:
        weights: of layers with the same input.
        linear: makes a module that multiplies with a matrix.

    Attributes:
        reduce: what is done to the product with all that reads x, if anything: summed over processes.
    """

    def __init__(self, weights: Sequence[Weight], linear: Callable[[Tensor], nn.Module]) -> None:
        super().__init__()
        self.stem = linear(torch.cat([weight.right for weight in weights]))
        self.widths = [weight.right.shape[0] for weight in weights]
        self.lefts = nn.ModuleList(nn.Identity() if of.left is None else linear(of.left) for of in weights)
        self.stays = [weight.left is None or weight.order is not None for weight in weights]
        self.reduce: Callable[[Tensor], Tensor] | None = None
        self.register_buffer("order", _joint_order(weights), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x)
        if self.reduce is not None:
            hidden = self.reduce(hidden)
        pieces = []
        for part, left, stays in zip(hidden.split(self.widths, dim=-1), self.lefts, self.stays, strict=True):
            if stays:
                pieces.append(part)
            if not isinstance(left, nn.Identity):
                pieces.append(left(part))
        result = torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]
        if self.order is None:
            return result
        # of a matrix: several times faster than along the last of three dimensions
        return result.flatten(0, -2).index_select(1, self.order).unflatten(0, result.shape[:-1])


def _joint_order(weights: Sequence[Weight]) -> Tensor | None:
    """Where each output is found in what the parts give one after the other; None: they are in order."""
    if all(weight.order is None for weight in weights):
        return None
    orders, start = [], 0
    for weight in weights:
        outputs = weight.right if weight.left is None else weight.left
        width = outputs.shape[0] + (0 if weight.order is None else weight.right.shape[0])
        order = torch.arange(width, device=outputs.device) if weight.order is None else weight.order
        orders.append(order + start)
        start += width
    return torch.cat(orders).int()
