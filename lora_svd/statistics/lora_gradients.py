"""Statistics from the gradients of the bypass, which LoRA's optimizer is about to use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import warn_numerical
from ..linalg import shrink
from .registry import statistic


@dataclass(frozen=True)
class StepObservation:
    """One optimizer step of one layer, gradients accumulated and clipped: what the optimizer is about to use.

    weight: (out, in), where a statistic needs it; lora_A: (r, in), lora_B: (out, r), scaling: s. float32.
    input_sketch, input_mean: :func:`input_sketch` (r, r) and ``A E[x]`` (r,) of the tokens observed so far, float64,
    where a statistic needs "input_gram".
    """

    weight: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    grad_A: Tensor
    grad_B: Tensor
    scaling: float
    input_sketch: Tensor | None = None
    input_mean: Tensor | None = None


def lora_gradient(step: StepObservation) -> Tensor:
    """``dB A + B dA - dB dA``, (out, in): LoRAPrune's estimate of dL/d(BA), as published.

    The change of BA in a step of gradient descent at rate 1, but for its sign. BA enters the weight in force,
    ``W + s B A``, with s, so it is s times an estimate of dL/dW.
    """
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


@statistic("gradient_rows", side="rows", per="step", needs={"input_gram", "input_sum"})
def gradient_rows(step: StepObservation) -> Tensor:
    """The diagonal of ``C = sum g g^T``, over the tokens of the step, as LoRA's own gradient shows it, (out,).

    ``dB = s sum_t g_t h_t^T`` is what A lets through of the gradient, with ``h = A x``. With ``M = E[h h^T]`` and
    ``m = E[h]``,

        ``c_i = (dB Q dB^T)_ii / (s^2 tr(Q M))``,   ``Q = M^-1 - M^-1 m m^T M^-1 / (m^T M^-1 m)``,

    so that ``E[c] = diag C`` if the inputs of different tokens are uncorrelated with each other and independent of the
    gradients, whatever the means of both: ``tr(Q M) = r - 1``, and products of two tokens' gradients, of which there
    are many, come with ``m^T Q m = 0``. On text, where both conditions hold in part, c is an estimate.

    Whitening by M keeps the few large directions of the input from drowning the others, which the norms of the rows of
    dB, or LoRAPrune's sensitivity divided by the energy of weights and input, do not. With r = 1 there is no direction
    beside m: ``Q = M^-1``, with a warning.
    """
    assert step.input_sketch is not None
    assert step.input_mean is not None
    M, mean, grad_B = step.input_sketch.double(), step.input_mean.double(), step.grad_B.double()
    if not bool(M.any()):  # A lets nothing through, as that of an embedding at first: no gradient of B either
        return torch.zeros_like(step.grad_B[:, 0])
    if len(M) == 1:
        warn_numerical(
            "r = 1 leaves nothing of the gradient beside the direction of the mean input, so importance="
            "'lora_diagonal' counts the mean gradient of a step again and again; set r to 2 or more"
        )
    sides = [len(M), len(grad_B), 1]
    inverse_M, inverse_dB, inverse_mean = torch.linalg.solve(
        shrink(M, 1e-6), torch.cat([M, grad_B.T, mean[:, None]], dim=1)
    ).split(sides, dim=1)
    rows, directions, along_mean = (grad_B * inverse_dB.T).sum(1), inverse_M.trace(), mean @ inverse_mean
    beside = ((along_mean > 0) & (len(M) > 1)).double() / along_mean.where(along_mean > 0, 1.0)
    rows = rows - beside * (grad_B @ inverse_mean)[:, 0].square()
    directions = directions - beside * (inverse_mean[:, 0] @ M @ inverse_mean)
    return (rows.clamp_min(0) / (step.scaling**2 * directions)).to(step.grad_B.dtype)


@statistic("lora_rows", side="rows", per="step", needs={"weight"})
def lora_rows(step: StepObservation) -> Tensor:
    """Sensitivity of the rows by :func:`lora_gradient`, (out,)."""
    return _sensitivity_rows(lora_gradient(step), step)


@statistic("minnorm_rows", side="rows", per="step", needs={"weight"})
def minnorm_rows(step: StepObservation) -> Tensor:
    """Sensitivity of the rows by :func:`minnorm_gradient`, (out,)."""
    return _sensitivity_rows(minnorm_gradient(step), step)


def _sensitivity_rows(gradient: Tensor, step: StepObservation) -> Tensor:
    """``J_i = sum_j ( G_ij (w_ij + s (BA)_ij) )^2``, (out,): the weight in force is ``W + s B A``."""
    assert step.weight is not None
    return (gradient * (step.weight + step.scaling * step.lora_B @ step.lora_A)).square().sum(1)
