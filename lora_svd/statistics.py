"""What is observed of a layer while it trains: sums over tokens and over steps, in float32, one tensor a statistic.

A layer ``y = W x`` with a bypass ``s B A x`` shows x in its forward pass and ``g = dL/dy`` in its backward pass, so
everything here is collected in the backward pass of the wrapped layer: once a token, whatever gradient checkpointing
repeats. A token is observed if its g is finite and not zero: what cannot change the loss (padding, a label that is
ignored, the query of a first token) has no say in what matters. g is taken as autograd gives it; its scale (mean over
tokens, gradient accumulation) is common to all layers and drops out.

A new statistic is one function and one registry line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .errors import LoraSVDError
from .linalg import gram, shrink
from .sketch import expand, sketched_gram


@dataclass(frozen=True)
class TokenObservation:
    """One backward pass of one layer. x: (samples, tokens, in), g: (samples, tokens, out), float32, unobserved rows 0.

    Both are made of what autograd holds where a statistic asks for them. ``shared`` lets layers with the same input
    (query, key and value; gate and up) compute its Gram matrix once.
    """

    inputs: Tensor = field(repr=False)
    gradients: Tensor = field(repr=False)
    observed: Tensor
    shared: SharedGram = field(repr=False)

    @cached_property
    def x(self) -> Tensor:
        return self.inputs.float().where(self.observed[..., None], 0.0)

    @cached_property
    def g(self) -> Tensor:
        return self.gradients.float().where(self.observed[..., None], 0.0)

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


@dataclass(frozen=True)
class StepObservation:
    """One optimizer step of one layer, gradients accumulated and clipped: what the optimizer is about to use.

    weight: (out, in), where a statistic asks for it; lora_A: (r, in), lora_B: (out, r), scaling: s. float32.
    input_sketch: :func:`input_sketch` of the tokens observed so far, where a statistic of the same preset collects X.
    """

    weight: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    grad_A: Tensor
    grad_B: Tensor
    scaling: float
    input_sketch: Tensor | None = None


class SharedGram:
    """The Gram matrix of the input last seen, kept until another input comes, and the sums it was added to."""

    def __init__(self) -> None:
        self.clear()

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
            self._gram = gram(seen.x.flatten(0, 1))
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


def lora_gradient(step: StepObservation) -> Tensor:
    """``dB A + B dA - dB dA``, (out, in): LoRAPrune's estimate of dL/d(BA), as published (no scaling)."""
    return step.grad_B @ step.lora_A + step.lora_B @ step.grad_A - step.grad_B @ step.grad_A


def minnorm_gradient(step: StepObservation) -> Tensor:
    """The matrix of least norm that explains both gradients exactly, an estimate of dL/dW, (out, in).

    ``(1/s) [dB (A A^T)^+ A + B (B^T B)^+ dA - B (B^T B)^+ (B^T dB) (A A^T)^+ A]``, from ``dB = s G A^T`` and
    ``dA = s B^T G``. The terms with B vanish while B = 0.
    """
    A, B = step.lora_A.double(), step.lora_B.double()
    grad_A, grad_B = step.grad_A.double(), step.grad_B.double()
    onto_A = torch.linalg.pinv(A @ A.T, hermitian=True) @ A
    from_B = B @ torch.linalg.pinv(B.T @ B, hermitian=True)
    estimate = grad_B @ onto_A + from_B @ grad_A - from_B @ (B.T @ grad_B) @ onto_A
    return (estimate / step.scaling).to(step.lora_A.dtype)


def input_sketch(lora_A: Tensor, input_gram: Tensor) -> Tensor:
    """``M = A X A^T``, (r, r), float64: what A (r, in) lets through of ``X = E[x x^T]`` (in, in)."""
    A = lora_A.double()
    # X by blocks of rows, which are its columns: a float64 copy of a wide one takes longer than the products
    return torch.cat([A @ rows.double().T for rows in input_gram.split(256)], dim=1) @ A.T


def gradient_rows(step: StepObservation) -> Tensor:
    """The diagonal of ``C = E[g g^T]`` as LoRA's own gradient shows it, (out,), up to a factor common to all layers.

    ``dB = s sum_t g_t (A x_t)^T`` is what A lets through of the gradient. With ``M = A X A^T``, (r, r), independence of
    g and x gives ``E[dB M^-1 dB^T] = s^2 r T C`` for T tokens, hence ``c_i = (dB M^-1 dB^T)_ii / (s^2 r)``.
    Whitening by M keeps the few large directions of the input from drowning the others, which the norms of the rows of
    dB, or LoRAPrune's sensitivity divided by the energy of weights and input, do not.
    """
    if step.input_sketch is None:
        raise LoraSVDError("gradient_rows: collect input_gram in the same importance preset; it whitens the gradient")
    sketch = shrink(step.input_sketch, 1e-6)
    grad_B = step.grad_B.double()
    whitened = torch.linalg.solve(sketch, grad_B.T).T
    return ((grad_B * whitened).sum(1) / (step.scaling**2 * len(step.lora_A))).to(step.grad_B.dtype)


def _sensitivity_rows(gradient: Tensor, step: StepObservation) -> Tensor:
    """``J_i = sum_j ( G_ij ((BA)_ij + w_ij) )^2``, (out,)."""
    assert step.weight is not None
    return (gradient * (step.lora_B @ step.lora_A + step.weight)).square().sum(1)


def _output_gram(seen: TokenObservation, rank: int | None) -> Tensor:
    """``sum g g^T``, (out, out), or its sketch with r = rank."""
    rows = seen.g.flatten(0, 1)
    return gram(rows) if rank is None else sketched_gram(rows, rank)


def _weight_gradient_square(seen: TokenObservation) -> Tensor:
    """``sum over samples of (dL/dw_ij)^2``, (out, in): gradients of single samples, as FWSVD and TFWSVD define it."""
    total = torch.zeros(seen.g.shape[-1], seen.in_features, device=seen.g.device)
    for gradient, columns in seen.weight_gradients():
        total[:, columns] += gradient.square_()
    return total


def _weight_gradient_rows(seen: TokenObservation) -> Tensor:
    """The row sums of :func:`_weight_gradient_square`, (out,)."""
    total = torch.zeros(seen.g.shape[-1], device=seen.g.device)
    for gradient, _ in seen.weight_gradients():
        total += gradient.square_().sum(1)
    return total


@dataclass(frozen=True)
class Statistic:
    """One sum kept for a layer.

    Attributes:
        shape: ``(out, in) -> shape`` of the sum.
        per: what the sum runs over and is divided by: "token", "sample" or "step".
        of: the summand over one observation (tokens and samples of a backward pass, or an optimizer step); of a Gram
            matrix, whole or as a sketch with the r that it is given.
        of_weight: whether the summand depends on the frozen weight, which is costly to dequantize or gather.
        gram: whether it is a sum of ``v v^T``, which may be kept as a sketch.
    """

    shape: Callable[[int, int], tuple[int, ...]]
    per: str
    of: Callable[..., Tensor]
    of_weight: bool = False
    gram: bool = False


STATISTICS: dict[str, Statistic] = {
    "input_gram": Statistic(lambda _, n: (n, n), "token", lambda seen, rank: seen.input_gram(rank), gram=True),
    "input_abs": Statistic(lambda _, n: (n,), "token", lambda seen: seen.input_abs()),
    "output_gram": Statistic(lambda m, _: (m, m), "token", _output_gram, gram=True),
    "output_square": Statistic(lambda m, _: (m,), "token", lambda seen: seen.g.square().sum((0, 1))),
    "weight_gradient_rows": Statistic(lambda m, _: (m,), "sample", _weight_gradient_rows),
    "weight_gradient_square": Statistic(lambda m, n: (m, n), "sample", _weight_gradient_square),
    "lora_rows": Statistic(lambda m, _: (m,), "step", lambda step: _sensitivity_rows(lora_gradient(step), step), True),
    "gradient_rows": Statistic(lambda m, _: (m,), "step", gradient_rows),
    "minnorm_rows": Statistic(
        lambda m, _: (m,), "step", lambda step: _sensitivity_rows(minnorm_gradient(step), step), True
    ),
}

COUNTS = ("token", "sample", "step")


def stored_shape(name: str, out_features: int, in_features: int, rank: int | None = None) -> tuple[int, ...]:
    """Of the sum of a layer, whole, or as a sketch with r = rank."""
    whole = STATISTICS[name].shape(out_features, in_features)
    return whole if rank is None else (rank + 1, whole[1])


def pack(total: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix (n, n), row after row, (n (n + 1) / 2,)."""
    return total[_upper(len(total), total.device)]


def unpack(packed: Tensor) -> Tensor:
    """The symmetric matrix (n, n) of :func:`pack`."""
    size = math.isqrt(2 * len(packed))
    upper = packed.new_zeros(size, size).masked_scatter_(_upper(size, packed.device), packed)
    return upper + upper.triu(1).T


def _upper(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu_()


def is_gram(name: str, total: Tensor) -> bool:
    """Whether a sum is a whole symmetric matrix, neither packed nor a sketch."""
    return STATISTICS[name].gram and total.dim() == 2 and total.shape[0] == total.shape[1]


def token_summand(name: str, seen: TokenObservation, rank: int | None = None) -> Tensor:
    """What one backward pass adds to a sum, whole, or as a sketch with r = rank."""
    statistic = STATISTICS[name]
    return statistic.of(seen, rank) if statistic.gram else statistic.of(seen)


@dataclass(frozen=True)
class LayerStatistics:
    """The sums of one layer and how much they saw, on the CPU.

    Attributes:
        sums: by name, float32; Gram matrices whole, packed or as sketches, which :meth:`mean` tells by their shape.
        counts: tokens, samples and steps observed.
    """

    sums: Mapping[str, Tensor]
    counts: Mapping[str, int]

    def mean(self, name: str) -> Tensor:
        """The sum, or what its sketch stands for, divided by what it ran over, float64; (n,) if it is a diagonal."""
        total, statistic = self.sums[name], STATISTICS[name]
        if statistic.gram and total.dim() == 1:
            total = unpack(total)
        elif statistic.gram and not is_gram(name, total):
            total = total[0] if len(total) == 1 else expand(total)
        return total.to(torch.float64, copy=True).div_(self.counts[statistic.per])


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
    else:
        x, g = (tensor.reshape(tensor.shape[0], -1, tensor.shape[-1]) for tensor in (x, g))
    size = g.abs().sum(-1, dtype=torch.float32)
    # What overflowed would spoil the sums for good. It is no secret: its gradients are not finite either.
    observed = (size != 0) & (size + x.sum(-1, dtype=torch.float32)).isfinite()
    shared.bind(observed)
    counts = {"token": observed.sum(), "sample": observed.any(-1).sum()}
    if num_ids is not None:
        return IndexObservation(x, g, observed, shared, num_ids), counts
    return TokenObservation(x, g, observed, shared), counts
