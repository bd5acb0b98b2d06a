"""What one backward pass shows of a layer: its inputs and the gradients of its outputs, token by token.

A layer ``y = W x`` shows x in its forward pass and ``g = dL/dy`` in its backward pass. A token is observed if its g is
finite and not zero: what cannot change the loss (padding, a label that is ignored, the query of a first token) has no
say in what matters. g is taken as autograd gives it; its scale (mean over tokens, gradient accumulation) is common to
all layers and drops out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from . import distributed
from .linalg import gram
from .sketch import sketched_gram


@dataclass(frozen=True)
class TokenObservation:
    """One backward pass of one layer. x: (samples, tokens, in), g: (samples, tokens, out), float32, unobserved rows 0.

    Both are made, where a statistic asks for them, of the inputs and gradients that autograd holds, in their dtypes;
    all of these are finite, and gradients of tokens that are not observed are 0. ``shared`` lets layers with the same
    input (query, key and value; gate and up) compute its Gram matrix once. lora_A: (r, in), float32, of the layer's
    bypass, where a statistic asks for it and it shows anything.
    """

    inputs: Tensor = field(repr=False)
    gradients: Tensor = field(repr=False)
    observed: Tensor
    shared: SharedGram = field(repr=False)
    lora_A: Tensor | None = field(default=None, repr=False)

    @cached_property
    def observed_inputs(self) -> Tensor:
        """x as the layer multiplies it: in bfloat16 under autocast, whatever dtype it came in."""
        is_bfloat16 = self.gradients.dtype == torch.bfloat16
        return (self.inputs.bfloat16() if is_bfloat16 else self.inputs) * self.observed[..., None]

    @cached_property
    def x(self) -> Tensor:
        return self.observed_inputs.float()

    @cached_property
    def g(self) -> Tensor:
        return self.gradients.float()

    @property
    def in_features(self) -> int:
        return self.inputs.shape[-1]

    def input_gram(self, rank: int | None) -> Tensor:
        """``sum x x^T``, (in, in), or its sketch with r = rank."""
        return self.shared.gram(self) if rank is None else sketched_gram(self.x.flatten(0, 1), rank)

    def input_abs(self) -> Tensor:
        """``sum |x_j|``, (in,)."""
        return self.x.abs().sum((0, 1))

    def weight_gradients(self) -> Iterator[tuple[Tensor, Tensor | slice]]:
        """``dL/dW`` of each sample, in the columns that are given, and zero in the others."""
        for x, g in zip(self.x, self.g, strict=True):
            yield g.T @ x, slice(None)


@dataclass(frozen=True)
class IndexObservation(TokenObservation):
    """One backward pass of an embedding, which is a linear layer of the inputs ``x = e_id``, one of V unit vectors.

    inputs: (samples, tokens, 1), the ids. ``sum x x^T`` is diagonal, how often each id was seen: kept as a sketch with
    r = 0. No vector of the size V is formed for a token.
    """

    num_ids: int = 0

    @property
    def in_features(self) -> int:
        return self.num_ids

    def _counts(self) -> Tensor:
        ids = self.inputs[..., 0]
        return torch.bincount(ids[self.observed], minlength=self.num_ids).float()

    def input_gram(self, _rank: int | None) -> Tensor:
        return self._counts()[None]

    def input_abs(self) -> Tensor:
        return self._counts()

    def weight_gradients(self) -> Iterator[tuple[Tensor, Tensor | slice]]:
        for ids, g in zip(self.inputs[..., 0], self.g, strict=True):
            columns, which = ids.unique(return_inverse=True)
            yield g.new_zeros(len(columns), g.shape[-1]).index_add_(0, which, g).T, columns


class SharedGram:
    """What the layers of a model have in common while they are observed.

    The Gram matrix of the input last seen, kept until another input comes, and the sums it was added to; and what
    gradients are divided by.
    """

    def __init__(self) -> None:
        self.loss_scale = 1.0
        self.clear()

    @property
    def divisor(self) -> float:
        """Of gradients: the loss is scaled, and it is the mean over processes."""
        return self.loss_scale * distributed.world_size()

    def recognize(self, x: Tensor) -> object:
        """A mark of this input: the same for all layers that are called with it, one after the other.

        The input is held, so that its memory cannot be reused for another one meanwhile, and its version is noted,
        because it may be filled anew in place.
        """
        if self._input is None or not _same_tensor(*self._input, x):
            self._input, self._mark = (x.detach(), x._version), object()
        return self._mark

    def start(self, mark: object, stride: int) -> int:
        """Say which input the next calls are about; the first of every ``stride`` tokens of it that are observed."""
        if mark is not self._observed:
            self._observed, self._mask = mark, None
            self._start = int(torch.randint(stride, ())) if stride > 1 else 0
        return self._start

    def bind(self, mask: Tensor) -> None:
        """Say which tokens the next call is about; the Gram matrix is kept if they are the last ones."""
        if self._mask is None or not torch.equal(self._mask, mask):
            self._mask, self._gram, self._added = mask, None, {}

    def gram(self, seen: TokenObservation) -> Tensor:
        """sum over tokens of ``x x^T``, (in, in)."""
        if self._gram is None:
            self._gram = gram(seen.observed_inputs.flatten(0, 1))
        return self._gram

    def add(self, total: Tensor | None, value: Tensor, device: torch.device) -> Tensor:
        """``total + value`` on a device, float32; in place unless the value is the Gram matrix. None: no total yet.

        Layers that had one and the same total get one and the same tensor then, so that equal sums take memory once;
        the total is not changed, because a layer that was not called this time keeps it.
        """
        if value is not self._gram:
            moved = value.to(device, torch.float32, copy=total is None)
            return moved if total is None else total.to(device).add_(moved)
        if id(total) not in self._added:
            moved = value.to(device)
            self._added[id(total)] = (total, moved if total is None else total.to(device) + moved)
        return self._added[id(total)][1]

    def clear(self) -> None:
        """Forget the input: the optimizer step is over."""
        self._input: tuple[Tensor, int] | None = None
        self._mark: object = None
        self._observed: object = None
        self._mask: Tensor | None = None
        self._gram: Tensor | None = None
        self._added: dict[int, tuple[Tensor | None, Tensor]] = {}  # total before and after, by id, which it keeps valid
        self._start = 0


def _same_tensor(a: Tensor, version: int, b: Tensor) -> bool:
    same_memory = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    return same_memory and a.dtype == b.dtype and version == b._version


class Observe(torch.autograd.Function):
    """The identity on y that hands (x, dL/dy) to ``sink`` in the backward pass. y must not be a view.

    y comes back itself, marked as changed: a view or a copy could not be changed in place afterwards, as some models
    do, or would take memory. x is saved by autograd, so gradient checkpointing recomputes it instead of keeping it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, sink: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink = sink
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[None, Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.autocast(device_type=x.device.type, enabled=False):
            ctx.sink(x.detach(), grads[0].detach())
        return None, grads[0], None


# A backward pass of fewer tokens is observed whole: there, sampling saves little and loses much.
_FEWEST_TOKENS = 512


def observe_tokens(
    x: Tensor,
    g: Tensor,
    shared: SharedGram,
    share: float = 1.0,
    mark: object = None,
    num_ids: int | None = None,
) -> tuple[TokenObservation, dict[str, Tensor]]:
    """Shape one backward pass for the statistics and count it. x: (..., in), g: (..., out).

    The first dimension counts samples, the last features, all between tokens; a matrix (samples, features) has one
    token a sample. With a ``share`` below 1 every k-th token is observed, k = 1 / share, from a random one on and as
    one sample; at least 512 of them. mark: of the input, :meth:`SharedGram.recognize`, if x is a copy of it.
    num_ids: of an embedding, whose x, (...), are ids.
    """
    start_of = mark or shared.recognize(x)
    if num_ids is not None:
        x = x[..., None]
    num_tokens = x[..., 0].numel()
    stride = max(1, round(min(1 / share, num_tokens // _FEWEST_TOKENS)))
    start = shared.start(start_of, stride)
    if stride > 1:
        x, g = (tensor.reshape(1, num_tokens, -1)[:, start::stride] for tensor in (x, g))
        g = g * math.sqrt(stride)  # a token stands for k of them in sums of g g^T
    else:
        x, g = (tensor.reshape(tensor.shape[0], -1, tensor.shape[-1]) for tensor in (x, g))
    size = g.abs().sum(-1, dtype=torch.float32)
    # What overflowed would spoil the sums for good. It is no secret: its gradients are not finite either.
    finite = (size + x.sum(-1, dtype=torch.float32)).isfinite()
    if not bool(finite.all()):
        x, g = (tensor.masked_fill(~finite[..., None], 0) for tensor in (x, g))
    observed = (size != 0) & finite
    shared.bind(observed)
    counts = {"token": observed.sum(), "sample": observed.any(-1).sum()}
    if num_ids is not None:
        return IndexObservation(x, g, observed, shared, num_ids=num_ids), counts
    return TokenObservation(x, g, observed, shared), counts
