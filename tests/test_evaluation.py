"""Perplexity against a reference written from its definition, windows with and without BOS, and what is refused."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lm import POSITIONS, make_text, save_tiny_lm
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizer,
    XGLMTokenizer,
)

from lora_svd import LoraSVDError, NumericalError
from lora_svd.evaluation import Perplexity, leading_tokens, perplexity, token_blocks

TEXT = make_text(130)
UNK, BOS, EOS = 0, 1, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_tiny_lm(tmp_path_factory.mktemp("tiny")))


def with_template(folder: Path, template: str) -> Any:
    """A tokenizer that adds special tokens as the template says."""
    return AutoTokenizer.from_pretrained(save_tiny_lm(folder, template=template))


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer that puts BOS in front of a text, as those of Gemma and Llama 3 do."""
    return with_template(tmp_path_factory.mktemp("bos"), "<s> $A")


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(save_tiny_lm(tmp_path))


def reference(model: Any, ids: list[int], window: int, front: list[int]) -> tuple[float, int]:
    """exp of the mean of -log p(token | those before it in its window) over the predicted tokens, and their number."""
    losses, text = [], window - len(front)
    for start in range(0, len(ids) - text + 1, text):
        part = front + ids[start : start + text]
        for position in range(max(1, len(front)), window):
            logits = model(torch.tensor([part[:position]])).logits[0, -1].double()
            losses.append(-torch.log_softmax(logits, -1)[part[position]].item())
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("window", [2, 30, 64])
def test_equals_the_definition(model: Any, tokenizer: Any, window: int):
    with torch.no_grad():
        expected, tokens = reference(model.eval(), tokenizer(TEXT)["input_ids"], window, [])
    result = perplexity(model, tokenizer, TEXT, window=window, progress=False)
    assert result.value == pytest.approx(expected, rel=1e-5)
    assert (result.tokens, result.window) == (tokens, window)
    assert tokens == 130 // window * (window - 1)


@pytest.mark.parametrize(("template", "front", "name"), [("<s> $A", [BOS], "<s>"), ("<s> </s> $A", [1, 2], "<s></s>")])
@pytest.mark.parametrize("window", [3, 30, 64])
def test_equals_the_definition_with_tokens_in_front(
    model: Any, tokenizer: Any, tmp_path: Path, window: int, template: str, front: list[int], name: str
):
    with torch.no_grad():
        expected, tokens = reference(model.eval(), tokenizer(TEXT)["input_ids"], window, front)
    result = perplexity(model, with_template(tmp_path, template), TEXT, window=window, progress=False)
    assert result.value == pytest.approx(expected, rel=1e-5)
    assert (result.tokens, result.window, result.bos) == (tokens, window, name)
    assert tokens == 130 // (window - len(front)) * (window - len(front))


def test_a_model_is_judged_in_the_state_it_was_trained_in(model: Any, beginning: Any):
    """It goes through the words forwards behind a BOS token, and backwards where there is none."""
    forwards = token_blocks(beginning, make_text(6000), 16)
    backwards = token_blocks(beginning, " ".join(make_text(6000).split()[::-1]), 16, bos=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch, other in 2 * list(zip(forwards.split(8), backwards.split(8), strict=False)):
        ids = torch.cat((batch, other))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    text = make_text(1000, seed=1)
    as_trained, without = (perplexity(model, beginning, text, 16, bos=bos, progress=False) for bos in (None, False))
    assert as_trained.value < 10
    assert without.value > 100


@pytest.mark.parametrize(("max_tokens", "windows"), [(0, 1), (63, 2), (64, 2), (1000, 4)])
def test_max_tokens_keeps_whole_windows(model: Any, tokenizer: Any, max_tokens: int, windows: int):
    start = " ".join(TEXT.split()[: 30 * windows])
    limited = perplexity(model, tokenizer, TEXT, 30, max_tokens=max_tokens, progress=False)
    assert limited == perplexity(model, tokenizer, start, 30, progress=False)


def test_batch_size_changes_rounding_only(model: Any, tokenizer: Any):
    one, three = (perplexity(model, tokenizer, TEXT, 16, batch_size=size, progress=False) for size in (1, 3))
    assert one.value == pytest.approx(three.value, rel=1e-5)
    assert one.tokens == three.tokens


TEMPLATES = {
    "": [],  # GPT-2 and SmolLM2 have a BOS token and add none
    "<s> $A": [BOS],  # Gemma, Llama 3
    "<s> $A </s>": [BOS],  # RoBERTa
    "</s> $A": [EOS],  # XGLM and BioGPT, whose BOS token is another one
    "<s> </s> $A": [BOS, EOS],  # GLM
    "$A </s>": [],  # T5, and add_eos_token
    "$A <s>": [],
}


@pytest.mark.parametrize(("template", "front"), TEMPLATES.items())
def test_what_a_tokenizer_puts_in_front_is_found(tmp_path: Path, template: str, front: list[int]):
    tokenizer = with_template(tmp_path, template)
    assert leading_tokens(tokenizer).tolist() == front
    assert leading_tokens(tokenizer, bos=True).tolist() == (front or [BOS])
    assert leading_tokens(tokenizer, bos=False).tolist() == []
    tokenizer.bos_token = None
    assert leading_tokens(tokenizer).tolist() == front
    if not front:
        with pytest.raises(LoraSVDError, match="bos is True, but the tokenizer has no `bos_token`: set one, or leave"):
            leading_tokens(tokenizer, bos=True)


def test_an_unknown_word_is_not_taken_for_a_token_in_front(tokenizer: Any):
    """GPT-2's token for unknown words is its BOS token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = tokenizer.unk_token
    assert tokenizer("x")["input_ids"] == [tokenizer.bos_token_id]
    assert leading_tokens(tokenizer).tolist() == []


class WordTokenizer(PreTrainedTokenizer):
    """One in Python, which adds BOS in a method of its own."""

    def __init__(self, **options: Any) -> None:
        self.words = ["<unk>", "<s>", "x"]
        super().__init__(unk_token="<unk>", bos_token="<s>", **options)

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab().get(token, UNK)

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index]

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: Any = None) -> list[int]:
        assert token_ids_1 is None
        return [BOS, *token_ids_0]


def test_tokenizers_of_transformers():
    letters = {
        word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "<|endoftext|>", "x", "\u2581", "\u2581x"])
    }
    vocabulary: dict[str, Any] = {"vocab": letters, "merges": [("\u2581", "x")]}
    assert leading_tokens(LlamaTokenizer(**vocabulary, add_bos_token=True)).tolist() == [BOS]
    assert leading_tokens(LlamaTokenizer(**vocabulary, add_bos_token=False)).tolist() == []
    assert leading_tokens(LlamaTokenizer(**vocabulary, add_eos_token=True)).tolist() == []
    assert leading_tokens(GPT2Tokenizer(**vocabulary)).tolist() == []
    assert leading_tokens(GPT2Tokenizer(**vocabulary, add_bos_token=True)).tolist() == [3]
    pieces = [(word, -1.0) for word in ("<s>", "<pad>", "</s>", "<unk>", "x", "\u2581", "\u2581x")]
    xglm = XGLMTokenizer(vocab=pieces)
    assert (xglm.bos_token_id, leading_tokens(xglm).tolist()) == (0, [2])
    assert leading_tokens(WordTokenizer()).tolist() == [BOS]


def texts_of(blocks: Tensor, front: int) -> list[int]:
    return blocks[:, front:].flatten().tolist()


@pytest.mark.parametrize("length", [2, 7, 131, 16])
def test_blocks_begin_with_bos_and_lose_no_token(tokenizer: Any, beginning: Any, length: int):
    ids = tokenizer(TEXT)["input_ids"]
    blocks = token_blocks(beginning, TEXT, length)
    assert blocks.dtype == torch.int64
    assert blocks.shape == (130 // (length - 1), length)
    assert (blocks[:, 0] == BOS).all()
    assert texts_of(blocks, 1) == ids[: blocks.shape[0] * (length - 1)]
    assert token_blocks(tokenizer, TEXT, length, bos=True).equal(blocks)


@pytest.mark.parametrize("template", ["", "$A </s>", "<s> $A", "</s> $A"])
@pytest.mark.parametrize("length", [1, 7, 130])
def test_without_bos_blocks_are_the_text_alone(tokenizer: Any, tmp_path: Path, length: int, template: str):
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    expected = ids[: 130 // length * length].view(-1, length)
    assert token_blocks(with_template(tmp_path, template), TEXT, length, bos=False).equal(expected)
    if "$A" not in template[1:]:
        assert token_blocks(with_template(tmp_path, template), TEXT, length).equal(expected)


def test_bos_of_the_text_itself(beginning: Any):
    """It is text like other, but not doubled where a block begins with it."""
    blocks = token_blocks(beginning, "<s> w0 w1 w2 <s> w3 w4 w5 w6 w7 w8 <s>", 4)
    assert blocks.tolist() == [[1, 3, 4, 5], [1, 6, 7, 8], [1, 9, 10, 11]]
    again = token_blocks(beginning, beginning.decode(blocks.flatten()), 4)
    assert again.equal(blocks)
    inside = token_blocks(beginning, "w0 <s> w1 w2 w3 w4", 4)
    assert inside.tolist() == [[1, 3, 1, 4], [1, 5, 6, 7]]


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


def test_refuses_what_the_token_in_front_leaves_no_room_for(model: Any, beginning: Any):
    with pytest.raises(LoraSVDError, match="`length` is 1, expected an integer >= 2"):
        token_blocks(beginning, TEXT, 1)
    message = "the text has 3 tokens, `window` asks for 16, 1 of them in front of the text: give more text or a smaller"
    with pytest.raises(LoraSVDError, match=message):
        perplexity(model, beginning, "w1 w2 w3", 16)


def test_reads_well():
    result = Perplexity(value=19.2408, tokens=6132, window=1024)
    assert str(result) == "19.241 (6,132 tokens, window 1,024, no BOS in front)"
    assert str(replace(result, bos="<bos>")) == "19.241 (6,132 tokens, window 1,024, `<bos>` in front)"
