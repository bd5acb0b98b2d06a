"""``SharedGram``: what layers with one input have in common while they are observed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..linalg import gram

if TYPE_CHECKING:
    from .tokens import TokenObservation


@dataclass(frozen=True)
class _BackwardInput:
    """The input that the backward pass is at.

    Attributes:
        mark: of the input, from :meth:`SharedGram.recognize`.
        start: the first token that is observed.
        mask: which tokens count; None until the first layer says so.
        gram: Gram matrix of these tokens, once a layer asked for it.
        sums: totals before and after it was added to them.
    """

    mark: object
    start: int = 0
    mask: Tensor | None = None
    gram: Tensor | None = None
    sums: list[tuple[Tensor | None, Tensor]] = field(default_factory=list)


class SharedGram:
    """What layers with one input have in common: which tokens are observed, their Gram matrix, sums of such.

    Layers that are called with one tensor, one after the other in forward and backward pass, are told by its memory.

    Attributes:
        loss_scale: what the loss is multiplied by, for the owner, who divides gradients by it.
    """

    def __init__(self) -> None:
        self.loss_scale = 1.0
        self.clear()

    def clear(self) -> None:
        """Forget the input: the optimizer step is over."""
        self._last_input: tuple[Tensor, int] | None = None
        self._mark: object = None
        self._at = _BackwardInput(mark=None)

    def recognize(self, x: Tensor) -> object:
        """A mark of this input: the same for all layers that are called with it, one after the other.

        The input is held, so that its memory cannot be reused for another one meanwhile, and its version is noted,
        because it may be filled anew in place.
        """
        if self._last_input is None or not _same_tensor(*self._last_input, x):
            self._last_input, self._mark = (x.detach(), x._version), object()
        return self._mark

    def start(self, mark: object, stride: int) -> int:
        """First of every ``stride`` tokens to observe: drawn for each input, and the same for all its layers."""
        if mark is not self._at.mark:
            self._at = _BackwardInput(mark, int(torch.randint(stride, ())) if stride > 1 else 0)
        return self._at.start

    def bind(self, mask: Tensor) -> None:
        """Say which tokens the next calls are about; the Gram matrix is kept if they are the last ones."""
        if self._at.mask is None or not torch.equal(self._at.mask, mask):
            self._at = replace(self._at, mask=mask, gram=None, sums=[])

    def gram(self, seen: TokenObservation) -> Tensor:
        """``sum over tokens of x x^T``, (in, in)."""
        if self._at.gram is None:
            self._at = replace(self._at, gram=gram(seen.observed_inputs.flatten(0, 1)))
        assert self._at.gram is not None
        return self._at.gram

    def add(self, total: Tensor | None, value: Tensor, device: torch.device) -> Tensor:
        """``total + value`` on a device, float32; in place unless the value is the Gram matrix. None: no total yet.

        Layers that had one and the same total get one and the same tensor then, so that equal sums take memory once;
        the total is not changed, because a layer that was not called this time keeps it.
        """
        if value is not self._at.gram:
            moved = value.to(device, torch.float32, copy=total is None)
            return moved if total is None else total.to(device).add_(moved)
        for before, after in self._at.sums:
            if before is total:
                return after
        moved = value.to(device)
        self._at.sums.append((total, moved if total is None else total.to(device) + moved))
        return self._at.sums[-1][1]


def _same_tensor(a: Tensor, version: int, b: Tensor) -> bool:
    same_memory = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    return same_memory and a.dtype == b.dtype and version == b._version
