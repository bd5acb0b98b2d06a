"""What is observed of a layer while it trains: sums over tokens and over steps, in float32, one tensor a statistic.

A layer with a bypass shows what it does in its backward pass (:mod:`.tokens`), once a token, whatever gradient
checkpointing repeats, and in the gradients of its bypass before an optimizer step.

A new statistic is one function and one registry line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import LoraSVDError
from .linalg import gram, shrink
from .sketch import expand, sketched_gram
from .tokens import TokenObservation


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
    """The diagonal of ``C = sum g g^T``, over the tokens of the step, as LoRA's own gradient shows it, (out,).

    ``dB = s sum_t g_t (A x_t)^T`` is what A lets through of the gradient. With ``M = A X A^T``, (r, r), independence of
    g and x gives ``E[dB M^-1 dB^T] = s^2 r C``, hence ``c_i = (dB M^-1 dB^T)_ii / (s^2 r)``.
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
    return _gram(seen.gradients.flatten(0, 1), rank)


def _lora_gradient_gram(seen: TokenObservation, rank: int | None) -> Tensor:
    """``sum g g^T``, (out, out), as LoRA's gradient shows it, or its sketch with r = rank."""
    if seen.lora_A is None:
        return _output_gram(seen, rank)
    hidden = F.linear(seen.x, seen.lora_A).flatten(0, 1)
    return _gram(segment_gradients(hidden, seen.gradients.flatten(0, 1)), rank)


# Tokens of a segment, times r. Of SmolLM2-135M at 0.6, one-shot, on other text the perplexity is 49.1 and 50.5 with 4
# and 16 of them, 48.9 with the gradients of all tokens and 56.8 with the diagonal of the batch's gradient.
SEGMENT = 4


def segment_gradients(hidden: Tensor, g: Tensor) -> Tensor:
    """LoRA's gradients of B, of segments of tokens, (n, out), whitened so that ``E[rows^T rows] = sum g g^T``.

    With ``h = A x``, hidden (tokens, r), the gradient of B of a segment is ``dB = s sum_t g_t h_t^T``. Here h is
    whitened, ``z = M^-1/2 h`` with ``M = sum h h^T`` over what is given, so that the few large directions of the input
    do not drown the others, and scaled to ``|z_t| = 1``, so that a token counts once, however large its input is. The
    columns of ``sum_t g_t z_t^T`` have the covariance that is sought, whatever A is, as far as the tokens of a segment
    are independent. Neighbours are not, so a segment takes every n-th token.

    A segment has ``SEGMENT`` r tokens, so that there are a quarter as many rows as tokens, and a quarter of the work of
    ``g^T g``. The gradient of a whole batch, which the optimizer sees, has r rows: they show the diagonal, but hardly
    any correlations.

    Args:
        hidden: (tokens, r); g: (tokens, out), as autograd gives it: the sum over a segment is taken in bfloat16 if it
            is in bfloat16, as LoRA's own gradient is, and else in float32. Zero where a token is not observed.
    """
    tokens, r = hidden.shape
    h = hidden.double()
    M = gram(h)
    M.diagonal().add_(1e-9 * M.diagonal().mean() + 1e-200)  # few tokens do not span M, and no input is no gradient
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(M)[0], h.T, upper=False).T
    g = g if g.dtype == torch.bfloat16 else g.float()  # what is finite in float16 may have a sum that is not
    z = F.normalize(whitened, dim=1).to(g.dtype)
    segments = max(1, math.ceil(tokens / (SEGMENT * r)))
    z, g = (F.pad(rows, (0, 0, 0, -tokens % segments)).unflatten(0, (-1, segments)).transpose(0, 1) for rows in (z, g))
    return (z.mT @ g).flatten(0, 1)


def _gram(rows: Tensor, rank: int | None) -> Tensor:
    """``rows^T rows``, or its sketch with r = rank."""
    return gram(rows) if rank is None else sketched_gram(rows.float(), rank)


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
        of_bypass: whether the summand of tokens depends on LoRA's A.
        gram: whether it is a sum of ``v v^T``, which may be kept as a sketch.
    """

    shape: Callable[[int, int], tuple[int, ...]]
    per: str
    of: Callable[..., Tensor]
    of_weight: bool = False
    of_bypass: bool = False
    gram: bool = False


STATISTICS: dict[str, Statistic] = {
    "input_gram": Statistic(lambda _, n: (n, n), "token", lambda seen, rank: seen.input_gram(rank), gram=True),
    "input_abs": Statistic(lambda _, n: (n,), "token", lambda seen: seen.input_abs()),
    "output_gram": Statistic(lambda m, _: (m, m), "token", _output_gram, gram=True),
    "lora_gradient_gram": Statistic(lambda m, _: (m, m), "token", _lora_gradient_gram, of_bypass=True, gram=True),
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
        sums: by name, float32; Gram matrices whole, packed or as sketches, which :meth:`total` tells by their shape.
        counts: tokens, samples and steps observed.
    """

    sums: Mapping[str, Tensor]
    counts: Mapping[str, int]

    def mean(self, name: str) -> Tensor:
        """:meth:`total`, divided by the number of tokens, samples or steps that it ran over."""
        return self.total(name).div_(self.counts[STATISTICS[name].per])

    def total(self, name: str) -> Tensor:
        """The sum, or what its sketch stands for, float64; (n,) if it is a diagonal."""
        total, is_sum_of_grams = self.sums[name], STATISTICS[name].gram
        if is_sum_of_grams and total.dim() == 1:
            total = unpack(total)
        elif is_sum_of_grams and not is_gram(name, total):
            total = total[0] if len(total) == 1 else expand(total)
        return total.to(torch.float64, copy=True)
