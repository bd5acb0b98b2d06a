"""Windows of a text as a causal language model reads them, and its perplexity on them."""

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
        window: window length in tokens, the BOS token included.
        bos: the token that every window begins with, as text; None: windows begin with the text.
    """

    value: float
    tokens: int
    window: int
    bos: str | None = None

    @property
    def convention(self) -> str:
        """What the number depends on besides model and text."""
        first = f"`{self.bos}`" if self.bos else "no BOS"
        return f"{self.tokens:,} tokens, window {self.window:,}, {first} in front"

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.convention})"


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    window: int = 1024,
    *,
    batch_size: int = 1,
    max_tokens: int | None = None,
    bos: bool | None = None,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of ``model`` on ``text``.

    Convention: the text is tokenized once and cut into windows as by :func:`token_blocks`, which do not overlap and
    begin with the BOS token where the tokenizer puts one in front of a text. The BOS token is part of the window, and
    is not predicted. The negative log-likelihoods of all predicted tokens are averaged and exponentiated. Others slide
    the window, leave the BOS token out or average over windows: such numbers, and numbers with another ``window``, are
    not comparable with these.

    The model is used as it is: its dtype and device, adapters included. Logits are reduced in float32. Evaluation mode
    is set during the call and restored after it.

    Args:
        model: a causal language model of transformers, with or without PEFT adapters.
        tokenizer: its tokenizer.
        text: at least one window long.
        window: tokens in one window, at least 2, at most what the model's position embeddings allow.
        batch_size: windows in one forward pass; changes memory and speed, and the value by rounding only.
        max_tokens: only the windows that fit into this many tokens are read, at least one; None: all.
        bos: whether every window begins with the BOS token, see :func:`leading_tokens`.
        progress: show a progress bar on stderr.

    Raises:
        LoraSVDError: ``window`` is out of range, the text is shorter than one window, or there is no BOS token.
        NumericalError: the loss of a batch is not finite; the message names the batch.
    """
    if batch_size < 1:
        raise LoraSVDError(f"batch_size is {batch_size}; it must be at least 1")
    _check_window(model, window)
    leading = leading_tokens(tokenizer, bos)
    blocks = token_blocks(tokenizer, text, window, bos=bos, field="window")
    if max_tokens is not None:
        blocks = blocks[: max(1, max_tokens // window)]
    given = max(1, len(leading))
    batches = blocks.split(batch_size)
    device = next(model.parameters()).device
    total = 0.0
    with evaluation_mode(model), torch.inference_mode():
        for index, batch in enumerate(tqdm(batches, desc="perplexity", unit="batch", disable=not progress)):
            loss = _sum_of_losses(model, batch.to(device), given)
            if not math.isfinite(loss):
                raise NumericalError(
                    f"evaluation batch {index} of {len(batches)} has loss {loss}: the weights hold NaN, or "
                    f"activations overflow in {next(model.parameters()).dtype}"
                )
            total += loss
    tokens = len(blocks) * (window - given)
    # Through a tensor, because math.exp raises OverflowError where infinity is the answer.
    value = torch.tensor(total / tokens, dtype=torch.float64).exp().item()
    name = "".join(tokenizer.convert_ids_to_tokens(leading.tolist())) or None
    return Perplexity(value=value, tokens=tokens, window=window, bos=name)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def token_blocks(tokenizer: Any, text: str, length: int, *, bos: bool | None = None, field: str = "length") -> Tensor:
    """Consecutive blocks of the tokens of a text, each with the BOS token in front where the model expects it.

    Blocks share no token of the text and leave none out, but for an incomplete last block. The BOS token takes one of
    the ``length`` places. A causal language model that gets a block as its labels predicts all of it but the first
    token, so the BOS token is no target. The tokenizer adds no other special tokens.

    Args:
        tokenizer: a transformers tokenizer.
        text: any text.
        length: tokens in one block, the BOS token included.
        bos: whether every block begins with the BOS token, see :func:`leading_tokens`.
        field: what the caller's user knows ``length`` as; error messages name it.

    Returns:
        Token ids, shape (blocks, length), int64.

    Raises:
        LoraSVDError: the text does not fill one block, a block would have no text, or there is no BOS token.
    """
    leading, ids = leading_tokens(tokenizer, bos), text_tokens(tokenizer, text)
    if length <= len(leading):
        raise LoraSVDError(f"`{field}` is {length}, expected an integer >= {len(leading) + 1}")
    blocks = cut_blocks(ids, length, leading)
    if len(blocks) == 0:
        asked = f"{length}, {len(leading)} of them in front of the text" if len(leading) else f"{length}"
        raise LoraSVDError(
            f"the text has {len(ids)} tokens, `{field}` asks for {asked}: give more text or a smaller `{field}`"
        )
    return blocks


def leading_tokens(tokenizer: Any, bos: bool | None = None) -> Tensor:
    """Tokens that a model expects in front of a text: what its tokenizer puts there by itself.

    What the tokenizer does counts, not names: the BOS token of Gemma and Llama 3, the ``</s>`` of XGLM, whose
    ``bos_token`` is another one, the ``[CLS]`` of BERT, the two tokens of GLM, of which training predicts the second.
    GPT-2 and SmolLM2 have a ``bos_token`` and put nothing in front. What is put behind a text (``</s>`` by T5,
    ``[SEP]`` by BERT) does not count.

    Args:
        tokenizer: a transformers tokenizer.
        bos: None: what the tokenizer puts there. True: the same, or its ``bos_token`` if it puts nothing there.
            False: nothing.

    Returns:
        Token ids, shape (number,), int64; empty if there are none.

    Raises:
        LoraSVDError: ``bos`` is True, and the tokenizer has no ``bos_token``.
    """
    if bos is not None and not bos:
        return torch.empty(0, dtype=torch.long)
    text, whole = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (False, True))
    places = range(len(whole) - len(text) + 1)
    leading = next((whole[:place] for place in places if whole[place : place + len(text)] == text), [])
    if bos and not leading:
        if tokenizer.bos_token_id is None:
            raise LoraSVDError("bos is True, but the tokenizer has no `bos_token`: set one, or leave bos at None")
        leading = [tokenizer.bos_token_id]
    return torch.tensor(leading, dtype=torch.long)


def text_tokens(tokenizer: Any, text: str) -> Tensor:
    """Token ids of a text without special tokens, shape (tokens,), int64."""
    # verbose=False: a text may be longer than the model's context, which tokenizers warn about.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def put_in_front(leading: Tensor, ids: Tensor) -> Tensor:
    """Token ids with the leading ones in front; those that begin with them already stay as they are."""
    return ids if ids[: len(leading)].equal(leading) else torch.cat((leading, ids))


def cut_blocks(
    ids: Tensor,  # shape: (tokens,)
    length: int,
    leading: Tensor,  # shape: (fewer than length,)
) -> Tensor:
    """Consecutive blocks of token ids, each with the leading tokens in front; shape (blocks, length).

    A block whose part of the text begins with the leading tokens itself gets no second ones, since models are not
    trained with two BOS tokens in a row. An incomplete last block is dropped.
    """
    blocks, start = [], 0
    while True:
        part = ids[start : start + length]
        block = put_in_front(leading, part)
        if len(block) < length:
            return torch.stack(blocks) if blocks else ids.new_empty(0, length)
        blocks.append(block[:length])
        start += length - (len(block) - len(part))


def _sum_of_losses(model: nn.Module, ids: Tensor, given: int) -> float:
    """Summed negative log-likelihood, in nats, of ids[:, given:] given their past; ids is (batch, window)."""
    logits = model(input_ids=ids, use_cache=False).logits
    losses = nn.functional.cross_entropy(
        logits[:, given - 1 : -1].flatten(0, 1).float(), ids[:, given:].flatten().to(logits.device), reduction="sum"
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
