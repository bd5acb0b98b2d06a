"""Text that a model writes itself is a sample of its distribution."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lm import save_tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_svd import LoraSVDError, own_text

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_tiny_lm(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer that puts BOS in front of a text."""
    return AutoTokenizer.from_pretrained(save_tiny_lm(tmp_path_factory.mktemp("bos"), template="<s> $A"))


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


def test_documents_are_written_behind_bos_and_blocks_begin_with_it(model: Any, beginning: Any):
    torch.manual_seed(0)
    blocks = own_text(model, beginning, 1500, 9, start="w3", document=4, batch_size=1000, progress=False)
    assert (blocks[:, 0] == BOS).all()
    documents = blocks[:, 1:].reshape(3000, 4)
    assert (documents[:, 0] == beginning.convert_tokens_to_ids("w3")).all()
    behind = torch.cat((torch.full((3000, 1), BOS), documents), 1)
    with torch.no_grad():
        expected, without = (
            model(ids).logits[:, start:-1].softmax(-1).mean(0) for ids, start in ((behind, 1), (documents, 0))
        )
    drawn = torch.stack([documents[:, place].bincount(minlength=63) / 3000 for place in (1, 2, 3)])
    limit = 5 * 0.5 / 3000**0.5  # five standard errors at most
    assert (drawn - expected).abs().max() < limit < (drawn - without).abs().max()


@pytest.mark.parametrize("document", [16, 8, 10, 100])
def test_blocks_that_begin_with_a_document_get_no_second_bos(model: Any, beginning: Any, document: int):
    texts = []
    for bos in (None, False):
        torch.manual_seed(0)
        texts.append(own_text(model, beginning, 6, 16, document=document, batch_size=3, bos=bos, progress=False))
    blocks, alone = texts[0], texts[1].flatten().tolist()
    assert (tuple(blocks.shape), (blocks[:, 0] == BOS).all().item()) == ((6, 16), True)
    at = 0
    for block in blocks.tolist():  # the same documents, cut elsewhere
        part = block if alone[at] == BOS else block[1:]
        assert part == alone[at : at + len(part)]
        at += len(part)
    assert (at == 6 * 16) == (document != 10)


def test_bos_is_as_the_tokenizer_does_or_as_asked(model: Any, tokenizer: Any, beginning: Any):
    def written(of: Any, **options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return own_text(model, of, 3, 15, document=10, progress=False, **options)

    assert written(tokenizer, bos=True).equal(written(beginning))
    assert written(beginning, bos=False).equal(written(tokenizer))
    assert (written(tokenizer)[:, 0] == BOS).tolist() == [True, False, True]


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 2, "start": "w3"}, "own_text: length is 2, expected an integer >= 3"),
        ({"length": 1}, "own_text: length is 1, expected an integer >= 2"),
        (
            {"length": 80, "document": 64, "start": "w3"},
            "own_text: document with 1 more in front is 65, but the model has positions for 64 tokens: use at most 64",
        ),
    ],
)
def test_refuses_what_bos_leaves_no_room_for(model: Any, beginning: Any, options: dict[str, Any], message: str):
    with pytest.raises(LoraSVDError, match=re.escape(message)):
        own_text(model, beginning, **{"blocks": 1, **options}, progress=False)
