"""Tiny models with their tokenizer, saved as a user's would be, and texts that they can learn."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{index}" for index in range(60)]
POSITIONS = 64


def make_text(num_words: int, seed: int = 0) -> str:
    """Words of which each is mostly followed by the next one in the list; one token a word."""
    rng = random.Random(seed)
    index, chosen = 0, []
    for _ in range(num_words):
        index = (index + 1) % len(WORDS) if rng.random() < 0.8 else rng.randrange(len(WORDS))
        chosen.append(WORDS[index])
    return " ".join(chosen)


def save_tiny_lm(
    folder: Path, positions: int = POSITIONS, *, hidden: int = 32, intermediate: int = 48, template: str = ""
) -> Path:
    """Save a random Llama with grouped-query attention and tied embeddings, and a tokenizer of one token a word.

    ``template`` says which special tokens the tokenizer adds to a text, as in "<s> $A"; empty: none.
    """
    torch.manual_seed(0)
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        special = [(word, index) for word, index in vocabulary.items() if word in template.split()]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_tiny_task(folder: Path) -> None:
    """Save a random ``encoder`` and, as train.jsonl and dev.jsonl, sentences whose first word decides on the label."""
    save_tiny_lm(folder / "encoder")  # for its tokenizer
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(vocab_size=63, **sizes)).save_pretrained(folder / "encoder")
    for seed, name in enumerate(("train", "dev")):
        sentences = make_text(64 * 6, seed=seed).split()
        rows = [sentences[i : i + 6] for i in range(0, len(sentences), 6)]
        lines = [json.dumps({"sentence": " ".join(row), "label": int(int(row[0][1:]) < 30)}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
