"""Statistics of single tokens and samples: the summands over one backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import statistic
from .sketch import gram_or_sketch, signed_sums
from .tokens import TokenObservation


@statistic("input_gram", side="columns", per="token", gram=True)
def input_gram(seen: TokenObservation, rank: int | None) -> Tensor:
    """``sum x x^T``, (in, in), or its sketch with r = rank."""
    return seen.input_gram(rank)


@statistic("input_sum", side="columns", per="token")
def input_sum(seen: TokenObservation) -> Tensor:
    """``sum x``, (in,)."""
    return seen.input_sum()


@statistic("input_abs", side="columns", per="token")
def input_abs(seen: TokenObservation) -> Tensor:
    """``sum |x_j|``, (in,)."""
    return seen.input_abs()


@statistic("output_gram", side="rows", per="token", gram=True)
def output_gram(seen: TokenObservation, rank: int | None) -> Tensor:
    """``sum g g^T``, (out, out), or its sketch with r = rank."""
    return gram_or_sketch(seen.gradients.flatten(0, 1), rank)


@statistic("signed_output_gram", side="rows", per="token", gram=True, formerly="lora_gradient_gram")
def signed_output_gram(seen: TokenObservation, rank: int | None) -> Tensor:
    """``sum g g^T``, (out, out), up to noise of mean zero, from :func:`signed_sums` of the g: a quarter of the work."""
    return gram_or_sketch(signed_sums(seen.gradients.flatten(0, 1)), rank)


@statistic("output_square", side="rows", per="token")
def output_square(seen: TokenObservation) -> Tensor:
    """``sum g_i^2``, (out,)."""
    return seen.g.square().sum((0, 1))


@statistic("weight_gradient_rows", side="rows", per="sample")
def weight_gradient_rows(seen: TokenObservation) -> Tensor:
    """The row sums of :func:`weight_gradient_square`, (out,)."""
    total = torch.zeros(seen.g.shape[-1], device=seen.g.device)
    for gradient, _ in seen.weight_gradients():
        total += gradient.square_().sum(1)
    return total


@statistic("weight_gradient_square", side="elements", per="sample")
def weight_gradient_square(seen: TokenObservation) -> Tensor:
    """``sum over samples of (dL/dw_ij)^2``, (out, in): gradients of single samples, as FWSVD and TFWSVD define it."""
    total = torch.zeros(seen.g.shape[-1], seen.in_features, device=seen.g.device)
    for gradient, columns in seen.weight_gradients():
        total[:, columns] += gradient.square_()
    return total
