"""Tiny random models of every kind of architecture, data for each, and a Trainer run. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_svd import LoraSVDCallback, LoraSVDConfig

VOCABULARY, LENGTH, LABELS = 64, 8, 3
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _causal(rows: Tensor) -> dict[str, Tensor]:
    return {"input_ids": rows, "labels": rows}


def _classes(rows: Tensor) -> Tensor:
    return rows[:, 0] % LABELS


@dataclass(frozen=True)
class Architecture:
    """A model and what it is fed: ``batch`` makes the keyword arguments of a forward pass from token rows."""

    config: Callable[..., tf.PreTrainedConfig]
    model: type[tf.PreTrainedModel]
    batch: Callable[[Tensor], dict[str, Tensor]] = _causal

    def build(self, **changes: Any) -> tf.PreTrainedModel:
        """The same random weights every time."""
        torch.manual_seed(0)
        return self.model(self.config(**changes)).eval()

    def data(self, num_samples: int = 16) -> list[dict[str, Tensor]]:
        rows = torch.randint(3, VOCABULARY, (num_samples, LENGTH), generator=torch.Generator().manual_seed(1))
        batch = self.batch(rows)
        return [{name: values[i] for name, values in batch.items()} for i in range(num_samples)]

    def inputs(self) -> dict[str, Tensor]:
        return self.batch(torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(2)))


def _llama(**changes: Any) -> tf.LlamaConfig:
    return tf.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True, **TOKENS, **changes})


def _gpt2(**changes: Any) -> tf.GPT2Config:
    return tf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, **TOKENS, **changes)


def _opt(**changes: Any) -> tf.OPTConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2}
    return tf.OPTConfig(**sizes, ffn_dim=48, num_attention_heads=4, max_position_embeddings=32, **TOKENS, **changes)


def _t5(**changes: Any) -> tf.T5Config:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return tf.T5Config(**sizes, decoder_start_token_id=0, eos_token_id=2, pad_token_id=0, **changes)


def _bert(**changes: Any) -> tf.BertConfig:
    return tf.BertConfig(**SIZES, max_position_embeddings=32, num_labels=LABELS, **changes)


def _vit(**changes: Any) -> tf.ViTConfig:
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    return tf.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=LABELS, **changes)


def _classify_text(rows: Tensor) -> dict[str, Tensor]:
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": _classes(rows)}


def _classify_images(rows: Tensor) -> dict[str, Tensor]:
    images = torch.stack([torch.sin(rows.float() * (i + 1)) for i in range(3 * 8)], dim=1)
    return {"pixel_values": images.reshape(len(rows), 3, 8, LENGTH), "labels": _classes(rows)}


ARCHITECTURES = {
    "llama": Architecture(_llama, tf.LlamaForCausalLM),
    "gpt2": Architecture(_gpt2, tf.GPT2LMHeadModel),
    "opt": Architecture(_opt, tf.OPTForCausalLM),
    "t5": Architecture(_t5, tf.T5ForConditionalGeneration),
    "bert": Architecture(_bert, tf.BertForSequenceClassification, _classify_text),
    "vit": Architecture(_vit, tf.ViTForImageClassification, _classify_images),
}
LLAMA = ARCHITECTURES["llama"]


def settings(**changes: Any) -> LoraSVDConfig:
    """Small enough for the tiny models: any rank is allowed, so that budgets are met closely."""
    return LoraSVDConfig(**{"r": 4, "lora_alpha": 8, "param_ratio": 0.6, "rank_multiple": 1, **changes})


def wrap(architecture: Architecture = LLAMA, **changes: Any) -> PeftModel:
    """The architecture's model with an adapter whose random parts are the same every time."""
    base = architecture.build()
    torch.manual_seed(3)
    return get_peft_model(base, settings(**changes))


def make_trainer(
    model: nn.Module, folder: Path, architecture: Architecture = LLAMA, *, steps: int = 5, **arguments: Any
) -> tf.Trainer:
    """A Trainer over the architecture's data, with the callback unless ``callbacks`` are given."""
    callbacks = arguments.pop("callbacks", None)
    data = architecture.data()
    fixed = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True}
    quiet = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "max_steps": steps}
    return tf.Trainer(
        model=model,
        args=tf.TrainingArguments(output_dir=str(folder), **{**fixed, **quiet, **arguments}),
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=[LoraSVDCallback()] if callbacks is None else callbacks,
    )


def trained(folder: Path, architecture: Architecture = LLAMA, *, steps: int = 5, **changes: Any) -> PeftModel:
    """An adapter after a Trainer run through all phases."""
    model = wrap(architecture, **changes)
    make_trainer(model, folder, architecture, steps=steps).train()
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, architecture: Architecture = LLAMA) -> Tensor:
    """What the model answers to the architecture's fixed input, in evaluation mode, float32."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in architecture.inputs().items()}
    return model.eval()(**inputs).logits.float()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and persistent buffer."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_bit_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


def linear_sizes(model: nn.Module) -> dict[str, int]:
    """Numbers in the weight of every dense linear layer."""
    return {
        name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    }
