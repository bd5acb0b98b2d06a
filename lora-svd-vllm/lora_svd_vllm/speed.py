"""Which of two forms of a layer is faster here."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_TOKENS = (1, 32)  # one conversation, and a batch of them
_REPEATS = 7


@torch.inference_mode()
def fastest(candidates: Sequence[nn.Module], in_features: int, like: Tensor) -> int:
    """Index of the module that is through first with few and with some tokens, the best of several turns each.

    Args:
        like: a tensor of the type and on the device of the inputs.
    """
    times = [0.0] * len(candidates)
    for tokens in _TOKENS:
        x = torch.randn(tokens, in_features, dtype=torch.float32, device=like.device).to(like.dtype)
        turns = [[_seconds(module, x) for module in candidates] for _ in range(_REPEATS)]
        times = [total + min(best) for total, best in zip(times, zip(*turns, strict=True), strict=True)]
    return min(range(len(candidates)), key=times.__getitem__)


def _seconds(module: nn.Module, x: Tensor) -> float:
    _wait(x)
    start = time.perf_counter()
    for _ in range(3):
        module(x)
    _wait(x)
    return time.perf_counter() - start


def _wait(x: Tensor) -> None:
    if x.device.type != "cpu":
        torch.accelerator.synchronize(x.device)
