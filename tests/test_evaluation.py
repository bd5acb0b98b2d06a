"""Perplexity against a reference written from its definition, and what it refuses."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lm import POSITIONS, make_text, save_tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_svd import LoraSVDError, NumericalError
from lora_svd.evaluation import Perplexity, perplexity, token_blocks

TEXT = make_text(130)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_tiny_lm(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(save_tiny_lm(tmp_path))


def reference(model: Any, ids: list[int], window: int) -> tuple[float, int]:
    """exp of the mean of -log p(token | those before it in its window) over the predicted tokens, and their number."""
    losses = []
    for start in range(0, len(ids) - window + 1, window):
        part = ids[start : start + window]
        for position in range(1, window):
            logits = model(torch.tensor([part[:position]])).logits[0, -1].double()
            losses.append(-torch.log_softmax(logits, -1)[part[position]].item())
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("window", [2, 30, 64])
def test_equals_the_definition(model: Any, tokenizer: Any, window: int):
    with torch.no_grad():
        expected, tokens = reference(model.eval(), tokenizer(TEXT)["input_ids"], window)
    result = perplexity(model, tokenizer, TEXT, window=window, progress=False)
    assert result.value == pytest.approx(expected, rel=1e-5)
    assert (result.tokens, result.window) == (tokens, window)
    assert tokens == 130 // window * (window - 1)


@pytest.mark.parametrize(("max_tokens", "windows"), [(0, 1), (63, 2), (64, 2), (1000, 4)])
def test_max_tokens_keeps_whole_windows(model: Any, tokenizer: Any, max_tokens: int, windows: int):
    start = " ".join(TEXT.split()[: 30 * windows])
    limited = perplexity(model, tokenizer, TEXT, 30, max_tokens=max_tokens, progress=False)
    assert limited == perplexity(model, tokenizer, start, 30, progress=False)


def test_batch_size_changes_rounding_only(model: Any, tokenizer: Any):
    one, three = (perplexity(model, tokenizer, TEXT, 16, batch_size=size, progress=False) for size in (1, 3))
    assert one.value == pytest.approx(three.value, rel=1e-5)
    assert one.tokens == three.tokens


def test_special_tokens_are_not_added():
    class Recorder:
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            assert options["add_special_tokens"] is False
            return {"input_ids": [len(word) for word in text.split()]}

    assert token_blocks(Recorder(), "a bb ccc dddd eeeee", 2).tolist() == [[1, 2], [3, 4]]


def test_training_modes_are_restored_module_by_module(model: Any, tokenizer: Any):
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    perplexity(model, tokenizer, TEXT, 16, progress=False)
    assert [module.training for module in model.modules()] == before
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(NumericalError):
        perplexity(model, tokenizer, TEXT, 16, progress=False)
    assert [module.training for module in model.modules()] == before


def test_dropout_is_off(model: Any, tokenizer: Any):
    model.config.attention_dropout = 0.9
    model.train()
    assert perplexity(model, tokenizer, TEXT, 16) == perplexity(model, tokenizer, TEXT, 16)


def test_a_non_finite_batch_is_named(model: Any, tokenizer: Any):
    words = TEXT.split()
    marked = " ".join([*words[:40], "unheard-of", *words[40:]])  # token 40 is in batch 2 of windows of 16
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.unk_token_id] = math.nan
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    with pytest.raises(NumericalError, match="evaluation batch 2 of 8 has loss nan"):
        perplexity(model, tokenizer, marked, 16, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window is 1; it must be at least 2"),
        (
            {"window": POSITIONS + 1},
            f"window is 65, but the model has positions for {POSITIONS} tokens: use at most 64",
        ),
        ({"window": 16, "batch_size": 0}, "batch_size is 0; it must be at least 1"),
    ],
)
def test_refuses(model: Any, tokenizer: Any, options: dict[str, int], message: str):
    with pytest.raises(LoraSVDError, match=re.escape(message)):
        perplexity(model, tokenizer, TEXT, progress=False, **options)


def test_refuses_a_short_text(model: Any, tokenizer: Any):
    with pytest.raises(LoraSVDError, match="the text has 3 tokens, `window` asks for 16"):
        perplexity(model, tokenizer, "w1 w2 w3", 16)


def test_reads_well():
    assert str(Perplexity(value=19.2408, tokens=6132, window=1024)) == "19.241 (6,132 tokens, window 1,024)"
