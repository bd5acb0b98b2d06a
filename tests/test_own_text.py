"""Text that a model writes itself is a sample of its distribution."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lm import save_tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_svd import LoraSVDError
from lora_svd.own_text import own_text

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_tiny_lm(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """With logits far apart, and settings for generation that would change the distribution."""
    model: Any = AutoModelForCausalLM.from_pretrained(save_tiny_lm(tmp_path))
    model.model.norm.weight.data.fill_(12.0)
    model.generation_config.update(do_sample=True, temperature=0.1, top_k=2, top_p=0.5, repetition_penalty=9.0)
    model.generation_config.update(min_p=0.9, no_repeat_ngram_size=2, num_return_sequences=2, max_time=1e-6)
    return model


def test_tokens_have_the_probabilities_of_the_model(model: Any, tokenizer: Any):
    torch.manual_seed(0)
    blocks = own_text(model, tokenizer, 1500, 8, document=4, batch_size=1000, progress=False)
    documents = blocks.view(3000, 4)
    with torch.no_grad():
        expected = model(documents).logits[:, :-1].softmax(-1).mean(0)  # positions, vocabulary
    drawn = torch.stack([documents[:, place].bincount(minlength=63) / 3000 for place in (1, 2, 3)])
    assert expected.max() > 4 * expected.mean()  # else every distribution would do
    assert (drawn - expected).abs().max() < 5 * 0.5 / 3000**0.5  # five standard errors at most


def test_documents_fill_blocks_and_go_on_behind_an_end_token(model: Any, tokenizer: Any):
    direction = model.model.embed_tokens.weight[EOS].detach().clone()
    with torch.no_grad():
        model.model.embed_tokens.weight[EOS] = 8 * direction  # tied to the head: likely, or unlikely, at every place
        model.model.norm.weight.fill_(1.0)
    torch.manual_seed(0)
    blocks = own_text(model, tokenizer, 6, 30, document=16, batch_size=5, progress=False)
    assert (tuple(blocks.shape), blocks.dtype, blocks.device.type) == ((6, 30), torch.int64, "cpu")
    assert (blocks.flatten()[::16] == BOS).all()
    behind = [row[row.index(EOS) + 1 :] for row in blocks.flatten()[:176].view(11, 16).tolist() if EOS in row[:-4]]
    assert behind
    assert all(set(rest) - {BOS, EOS} for rest in behind)


def test_the_seed_decides_and_modes_are_restored(model: Any, tokenizer: Any):
    model.config.attention_dropout = 0.9
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(own_text(model, tokenizer, 2, 8, start="w3", progress=False))
    assert [module.training for module in model.modules()] == before
    assert texts[0].equal(texts[1])
    assert not texts[0].equal(texts[2])
    assert (texts[0][:, 0] == tokenizer.convert_tokens_to_ids("w3")).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0}, "own_text: blocks is 0, expected an integer >= 1"),
        ({"document": 1}, "own_text: document is 1, expected an integer >= 2"),
        ({"batch_size": 0}, "own_text: batch_size is 0, expected an integer >= 1"),
        ({"length": 0}, "own_text: length is 0, expected an integer >= 2"),
        ({"length": 65}, "own_text: document is 65, but the model has positions for 64 tokens: use at most 64"),
        ({"start": "<|none|>"}, "own_text: start is '<|none|>' and bos_token '<s>', expected a token of the vocab"),
    ],
)
def test_refuses(model: Any, tokenizer: Any, options: dict[str, Any], message: str):
    with pytest.raises(LoraSVDError, match=re.escape(message)):
        own_text(model, tokenizer, **{"blocks": 1, "length": 16, **options}, progress=False)
