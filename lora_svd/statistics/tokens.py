"""What one backward pass shows of a layer: its inputs and the gradients of its outputs, token by token.

A layer ``y = W x`` shows x in its forward pass and ``g = dL/dy`` in its backward pass. A token is observed if its g is
finite and not zero: what cannot change the loss (padding, a label that is ignored, the query of a first token) has no
say in what matters. Some kernels leave the rounding of others in place of such a zero, a millionth of the largest g and
less. g is taken as autograd gives it; its scale (mean over tokens, gradient accumulation) is common to
all layers and drops out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..errors import LoraSVDError
from .shared import SharedGram
from .sketch import sketched_gram


@dataclass(frozen=True)
class TokenObservation:
    """One backward pass of one layer. x: (samples, tokens, in), g: (samples, tokens, out), float32, unobserved rows 0.

    Both are made, where a statistic asks for them, of the inputs and gradients that autograd holds, in their dtypes;
    all of these are finite, and gradients of tokens that are not observed are 0. ``shared`` lets layers with the same
    input (query, key and value; gate and up) compute its Gram matrix once.
    """

    inputs: Tensor = field(repr=False)
    gradients: Tensor = field(repr=False)
    observed: Tensor
    shared: SharedGram = field(repr=False)

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

    def input_sum(self) -> Tensor:
        """``sum x``, (in,)."""
        return self.x.sum((0, 1))

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

    @property
    def observed_inputs(self) -> Tensor:
        raise LoraSVDError("an embedding's inputs are ids: a statistic of them uses input_gram, input_sum, input_abs")

    def _counts(self) -> Tensor:
        ids = self.inputs[..., 0]
        return torch.bincount(ids[self.observed], minlength=self.num_ids).float()

    def input_gram(self, _rank: int | None) -> Tensor:
        return self._counts()[None]

    def input_sum(self) -> Tensor:
        return self._counts()

    def input_abs(self) -> Tensor:
        return self._counts()

    def weight_gradients(self) -> Iterator[tuple[Tensor, Tensor | slice]]:
        for ids, g in zip(self.inputs[..., 0], self.g, strict=True):
            columns, which = ids.unique(return_inverse=True)
            yield g.new_zeros(len(columns), g.shape[-1]).index_add_(0, which, g).T, columns


# A backward pass of fewer tokens is observed whole: there, sampling saves little and loses much.
_FEWEST_TOKENS = 512
_NOISE = 1e-6


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
    size = size.where(finite, 0.0)
    observed = size > _NOISE * size.amax()
    shared.bind(observed)
    counts = {"token": observed.sum(), "sample": observed.any(-1).sum()}
    if num_ids is not None:
        return IndexObservation(x, g, observed, shared, num_ids=num_ids), counts
    return TokenObservation(x, g, observed, shared), counts
