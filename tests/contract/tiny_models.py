"""Tiny random models, saved under the names of the Hub models that PEFT's tests load.

``from_pretrained`` prefers a local folder to the Hub, so a run whose working directory holds these folders needs no
network, and PEFT's lists of models, with the special cases it keys on their names, stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig

HIDDEN = 32
LAYERS = 2
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT: dict[str, Any] = {"vocab_size": 128, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
GPT_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DEBERTA: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 2}
ADAPTER_CONFIG = "peft-internal-testing/tiny-opt-lora-revision"


def _opt(*, hidden_size: int = HIDDEN, num_hidden_layers: int = LAYERS) -> tf.PreTrainedModel:
    config = tf.OPTConfig(
        vocab_size=128,
        hidden_size=hidden_size,
        word_embed_proj_dim=hidden_size,
        ffn_dim=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return tf.OPTForCausalLM(config)


def _opt_125m() -> tf.PreTrainedModel:
    """4 layers x 6 linear layers = the 24 quantized layers that PEFT's loaders expect; 4-bit blocks want 64 columns."""
    return _opt(hidden_size=64, num_hidden_layers=4)


def _gemma3() -> tf.PreTrainedModel:
    config = tf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=16, layer_types=["full_attention"] * LAYERS)
    return tf.Gemma3ForCausalLM(config)


def _t5() -> tf.PreTrainedModel:
    config = tf.T5Config(
        vocab_size=128, d_model=HIDDEN, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=4, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config)


def _bart() -> tf.PreTrainedModel:
    heads: dict[str, Any] = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    layers: dict[str, Any] = {
        "encoder_layers": LAYERS,
        "decoder_layers": LAYERS,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    }
    config = tf.BartConfig(vocab_size=128, d_model=HIDDEN, max_position_embeddings=64, **heads, **layers)
    return tf.BartForConditionalGeneration(config)


MODELS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "peft-internal-testing/opt-125m": _opt_125m,
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt,
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT, **GPT_TOKENS)),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": lambda: tf.GPTJForCausalLM(
        tf.GPTJConfig(**GPT, **GPT_TOKENS, rotary_dim=4)
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": _gemma3,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _t5,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _bart,
    "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: tf.BertForSequenceClassification(
        tf.BertConfig(**SIZES)
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: tf.RobertaForSequenceClassification(
        tf.RobertaConfig(**SIZES)
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": lambda: tf.LlamaForSequenceClassification(
        tf.LlamaConfig(**GROUPED)
    ),
    "peft-internal-testing/tiny-random-BertModel": lambda: tf.BertModel(tf.BertConfig(**SIZES)),
    "peft-internal-testing/tiny-random-RobertaModel": lambda: tf.RobertaModel(tf.RobertaConfig(**SIZES)),
    "peft-internal-testing/tiny-random-DebertaModel": lambda: tf.DebertaModel(tf.DebertaConfig(**SIZES, **DEBERTA)),
    "peft-internal-testing/tiny-random-DebertaV2Model": lambda: tf.DebertaV2Model(
        tf.DebertaV2Config(**SIZES, **DEBERTA)
    ),
}


def build(folder: Path) -> None:
    """Save every model of ``MODELS``, and the adapter config that ``test_config`` loads, below ``folder``."""
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().eval().save_pretrained(str(folder / name))
    LoraConfig(target_modules=["q_proj", "v_proj"]).save_pretrained(str(folder / ADAPTER_CONFIG))
