"""Perplexity of a causal language model on a text, by one stated convention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .errors import LoraSVDError, NumericalError


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what is needed to compare it with another one.

    Attributes:
        value: exp of the mean negative log-likelihood per token, in nats.
        tokens: number of tokens that were predicted; every window predicts all of its tokens but the first.
        window: window length in tokens.
    """

    value: float
    tokens: int
    window: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.tokens:,} tokens, window {self.window:,})"


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    window: int = 1024,
    *,
    batch_size: int = 1,
    max_tokens: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of ``model`` on ``text``.

    Convention: the text is tokenized once, without special tokens, and cut into non-overlapping windows; a last
    window that is not full is dropped. The negative log-likelihoods of all windows are averaged over tokens and
    exponentiated. Others slide the window, add a BOS token to each one or average over windows: such numbers, and
    numbers with another ``window``, are not comparable with these.

    The model is used as it is: its dtype and device, adapters included. Logits are reduced in float32. Evaluation mode
    is set during the call and restored after it.

    Args:
        model: a causal language model of transformers, with or without PEFT adapters.
        tokenizer: its tokenizer.
        text: at least one window long.
        window: tokens in one window, at least 2, at most what the model's position embeddings allow.
        batch_size: windows in one forward pass; changes memory and speed, and the value by rounding only.
        max_tokens: only the windows that fit into this many tokens are read, at least one; None: all.
        progress: show a progress bar on stderr.

    Raises:
        LoraSVDError: ``window`` is out of range or the text is shorter than one window.
        NumericalError: the loss of a batch is not finite; the message names the batch.
    """
    if batch_size < 1:
        raise LoraSVDError(f"batch_size is {batch_size}; it must be at least 1")
    _check_window(model, window)
    blocks = token_blocks(tokenizer, text, window, field="window")
    if max_tokens is not None:
        blocks = blocks[: max(1, max_tokens // window)]
    batches = blocks.split(batch_size)
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with evaluation_mode(model), torch.inference_mode():
        for index, batch in enumerate(tqdm(batches, desc="perplexity", unit="batch", disable=not progress)):
            loss = _sum_of_losses(model, batch.to(device))
            if not math.isfinite(loss):
                raise NumericalError(
                    f"evaluation batch {index} of {len(batches)} has loss {loss}: the weights hold NaN, or "
                    f"activations overflow in {next(model.parameters()).dtype}"
                )
            total += loss
            tokens += batch.shape[0] * (window - 1)
    # Through a tensor, because math.exp raises OverflowError where infinity is the answer.
    value = torch.tensor(total / tokens, dtype=torch.float64).exp().item()
    return Perplexity(value=value, tokens=tokens, window=window)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def token_blocks(tokenizer: Any, text: str, length: int, *, field: str = "length") -> Tensor:
    """The tokens of ``text`` in consecutive blocks of ``length``, without special tokens; an incomplete last one is
    dropped.

    Args:
        tokenizer: a transformers tokenizer.
        text: any text.
        length: tokens in one block.
        field: what the caller's user knows ``length`` as; error messages name it.

    Returns:
        Token ids, shape (blocks, length), int64.

    Raises:
        LoraSVDError: the text does not fill one block, or a block would have no token.
    """
    if length < 1:
        raise LoraSVDError(f"`{field}` is {length}, expected an integer >= 1")
    # verbose=False: the text is meant to be longer than the model's context, which tokenizers warn about.
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    blocks = len(ids) // length
    if blocks == 0:
        raise LoraSVDError(
            f"the text has {len(ids)} tokens, `{field}` asks for {length}: give more text or a smaller `{field}`"
        )
    return ids[: blocks * length].view(blocks, length)


def _sum_of_losses(model: nn.Module, ids: Tensor) -> float:
    """Summed negative log-likelihood, in nats, of ids[:, 1:] given their past; ids is (batch, window)."""
    logits = model(input_ids=ids, use_cache=False).logits
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten().to(logits.device), reduction="sum"
    )
    return losses.item()


def _check_window(model: nn.Module, window: int) -> None:
    if window < 2:
        raise LoraSVDError(f"window is {window}; it must be at least 2 tokens, one of which is predicted")
    check_positions(model, window, "window")


def check_positions(model: nn.Module, tokens: int, field: str) -> None:
    """Raise if the model has no positions for so many tokens; the message names the field that asks for them."""
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise LoraSVDError(
            f"{field} is {tokens}, but the model has positions for {longest} tokens: use at most {longest}"
        )
