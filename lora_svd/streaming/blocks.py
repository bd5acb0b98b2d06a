"""How a model calls its decoder blocks, found out by running it around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from ..errors import LoraSVDError
from .checkpoint import Checkpoint


class _Stopped(Exception):
    """The rest of a forward pass is not needed."""


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with besides its hidden states; the same for every sample of one length."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, checkpoint: Checkpoint, index: int, weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
        """Run the block on hidden states (1, tokens, features)."""
        block = checkpoint.blocks[index]
        result = functional_call(block, weights, (hidden, *self.args), self.kwargs)
        if not isinstance(result, Tensor):
            raise LoraSVDError(
                f"{checkpoint.prefix}.{index}: returns a {type(result).__name__}, expected its hidden states alone; "
                "compress the model in memory"
            )
        return result


def embed(checkpoint: Checkpoint, outer: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The hidden states that the first block gets for token ids (1, tokens)."""
    found = []

    def stop(_: int, hidden: Tensor, __: BlockCall) -> Tensor:
        found.append(hidden)
        raise _Stopped

    _run(checkpoint, outer, stop, ids)
    return found[0]


def record_calls(checkpoint: Checkpoint, outer: dict[str, Tensor], ids: Tensor) -> list[BlockCall]:
    """How each block is called for token ids (1, tokens).

    Raises:
        LoraSVDError: blocks are not called once each, one after the other, or what they are called with depends on the
            tokens or on other blocks.
    """
    calls, others = (_calls(checkpoint, outer, given, scale) for given, scale in ((ids, 1.0), (ids.roll(1), -2.0)))
    for index, (call, other) in enumerate(zip(calls, others, strict=True)):
        pairs = zip(tree_leaves([call.args, call.kwargs]), tree_leaves([other.args, other.kwargs]), strict=True)
        if not all(_equal(*pair) for pair in pairs):
            raise LoraSVDError(
                f"{checkpoint.prefix}.{index}: gets more than hidden states, masks and positions, which streaming does "
                "not follow; compress the model in memory"
            )
    return calls


def loss_gradient(checkpoint: Checkpoint, outer: dict[str, Tensor], ids: Tensor, hidden: Tensor) -> Tensor:
    """Gradient of the model's loss on token ids (1, tokens) with respect to what the last block returns."""
    leaf, last = hidden.detach().requires_grad_(), len(checkpoint.blocks) - 1

    def replace(index: int, given: Tensor, _: BlockCall) -> Tensor:
        return leaf if index == last else given

    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(_run(checkpoint, outer, replace, ids, labels=ids).loss, leaf)
    return gradient


def _calls(checkpoint: Checkpoint, outer: dict[str, Tensor], ids: Tensor, scale: float) -> list[BlockCall]:
    found: list[BlockCall] = []
    returned: list[Tensor] = []

    def record(index: int, hidden: Tensor, call: BlockCall) -> Tensor:
        in_order = index == len(found) and (not returned or torch.equal(hidden, returned[-1]))
        if not in_order:
            raise LoraSVDError(
                f"{checkpoint.prefix}.{index}: does not get what the block before it returns; compress the model in "
                "memory"
            )
        found.append(call)
        returned.append(scale * hidden)
        return returned[-1]

    _run(checkpoint, outer, record, ids)
    if len(found) != len(checkpoint.blocks):
        raise LoraSVDError(f"{checkpoint.prefix}: {len(found)} of {len(checkpoint.blocks)} blocks are called")
    return found


def _run(
    checkpoint: Checkpoint,
    outer: dict[str, Tensor],
    instead: Callable[[int, Tensor, BlockCall], Tensor],
    ids: Tensor,
    **given: Any,
) -> Any:
    """The model's forward pass with a function in the place of each block; None if it was stopped."""
    with _replaced(checkpoint, instead):
        try:
            arguments = {"input_ids": ids.to(checkpoint.device), "use_cache": False, **given}
            return functional_call(checkpoint.model, outer, kwargs=arguments)
        except _Stopped:
            return None


@contextmanager
def _replaced(checkpoint: Checkpoint, instead: Callable[[int, Tensor, BlockCall], Tensor]) -> Iterator[None]:
    def forward(index: int) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            return instead(index, hidden, BlockCall(args[1:], kwargs))

        return call

    for index, block in enumerate(checkpoint.blocks):
        block.forward = forward(index)
    try:
        yield
    finally:
        for block in checkpoint.blocks:
            del block.forward


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
