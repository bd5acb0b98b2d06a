"""What is observed of a layer while it trains: sums over tokens and over steps, in float32, one tensor a statistic.

A layer with a bypass shows what it does in its backward pass (:mod:`.tokens`, summed by :mod:`.token_sums`), once a
token, whatever gradient checkpointing repeats, and in the gradients of its bypass before an optimizer step
(:mod:`.lora_gradients`).

A new statistic is one function with a record, :func:`statistic`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import token_sums
from .lora_gradients import StepObservation, input_sketch
from .registry import COUNTS, STATISTICS, Statistic, statistic, stored_shape
from .sketch import expand
from .tokens import TokenObservation

__all__ = [
    "COUNTS",
    "STATISTICS",
    "LayerStatistics",
    "Statistic",
    "StepObservation",
    "TokenObservation",
    "input_sketch",
    "is_gram",
    "pack",
    "statistic",
    "stored_shape",
    "token_summand",
    "token_sums",
    "unpack",
]


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
    record = STATISTICS[name]
    return record.summand(seen, rank) if record.gram else record.summand(seen)


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
