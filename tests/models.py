"""Tiny random models of every kind of architecture, data for each, and a Trainer run. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_svd import LoraSVDCallback, LoraSVDConfig
from lora_svd.compact import parameter_report

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
    """A model and what it is fed: ``batch`` makes the keyword arguments of a forward pass from token rows, ``settings``
    are what its adapter needs."""

    config: Callable[..., tf.PreTrainedConfig]
    model: type[tf.PreTrainedModel]
    batch: Callable[[Tensor], dict[str, Tensor]] = _causal
    settings: dict[str, Any] = field(default_factory=dict)

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


def _like_llama(kind: type[tf.PreTrainedConfig], **fixed: Any) -> Callable[..., tf.PreTrainedConfig]:
    """Grouped-query attention; the sizes have the same names in every config of this family."""
    return lambda **changes: kind(**{**SIZES, "num_key_value_heads": 2, **TOKENS, **fixed, **changes})


def _gpt2(**changes: Any) -> tf.GPT2Config:
    return tf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, **TOKENS, **changes)


def _gpt_neox(**changes: Any) -> tf.GPTNeoXConfig:
    return tf.GPTNeoXConfig(**SIZES, max_position_embeddings=32, **TOKENS, **changes)


def _opt(**changes: Any) -> tf.OPTConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2}
    return tf.OPTConfig(**sizes, ffn_dim=48, num_attention_heads=4, max_position_embeddings=32, **TOKENS, **changes)


def _falcon(**changes: Any) -> tf.FalconConfig:
    """Its linear layers are of a class with a forward of its own."""
    sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    return tf.FalconConfig(**sizes, ffn_hidden_size=48, alibi=False, bias=True, **TOKENS, **changes)


def _funnel(**changes: Any) -> tf.FunnelConfig:
    """Initializes whatever has "Linear" in the name of its class by the shape of its weight."""
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48}
    return tf.FunnelConfig(**sizes, block_sizes=[1, 1], num_labels=LABELS, **changes)


def _mamba(**changes: Any) -> tf.MambaConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}
    return tf.MambaConfig(**sizes, **TOKENS, **changes)


def _t5(**changes: Any) -> tf.T5Config:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return tf.T5Config(**sizes, decoder_start_token_id=0, eos_token_id=2, pad_token_id=0, **changes)


def _encoder_decoder(kind: type[tf.PreTrainedConfig], **fixed: Any) -> Callable[..., tf.PreTrainedConfig]:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "decoder_start_token_id": 1, **TOKENS}
    sizes["max_position_embeddings"] = 32
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
    return lambda **changes: kind(**{**sizes, **fixed, **changes})


def _bert(**changes: Any) -> tf.BertConfig:
    return tf.BertConfig(**{**SIZES, **changes}, max_position_embeddings=32, num_labels=LABELS)


def _deberta(**changes: Any) -> tf.DebertaV2Config:
    """As in DeBERTa-v3, relative positions go through the projections of queries and keys: these are used twice."""
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
    return tf.DebertaV2Config(**SIZES, **relative, max_position_embeddings=32, num_labels=LABELS, **changes)


VISION = {name: size for name, size in SIZES.items() if name != "vocab_size"} | {"image_size": 8, "patch_size": 4}


def _vit(**changes: Any) -> tf.ViTConfig:
    return tf.ViTConfig(**VISION, num_labels=LABELS, **changes)


def _clip(**changes: Any) -> tf.CLIPConfig:
    text = {**SIZES, "max_position_embeddings": LENGTH, **TOKENS}
    return tf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16, **changes)


class CLIP(tf.CLIPModel):
    """With its contrastive loss, and logits under the name that other models have for theirs."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Any:
        outputs = super().forward(input_ids, pixel_values, return_loss=True)
        outputs.logits = outputs.logits_per_image
        return outputs


def _classify_text(rows: Tensor) -> dict[str, Tensor]:
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": _classes(rows)}


def _images(rows: Tensor) -> Tensor:
    images = torch.stack([torch.sin(rows.float() * (i + 1)) for i in range(3 * 8)], dim=1)
    return images.reshape(len(rows), 3, 8, LENGTH)


def _classify_images(rows: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": _images(rows), "labels": _classes(rows)}


def _captions(rows: Tensor) -> dict[str, Tensor]:
    return {"input_ids": rows, "pixel_values": _images(rows)}


def _speech(rows: Tensor) -> dict[str, Tensor]:
    return {"input_features": _images(rows)[:, 0], "labels": rows}


_MISTRAL = {"sliding_window": 4}
_GEMMA = {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
_WHISPER = {"num_mel_bins": 8, "max_source_positions": 4, "max_target_positions": 32}

ARCHITECTURES = {
    "llama": Architecture(_like_llama(tf.LlamaConfig, tie_word_embeddings=True), tf.LlamaForCausalLM),
    "mistral": Architecture(_like_llama(tf.MistralConfig, **_MISTRAL), tf.MistralForCausalLM),
    "qwen2": Architecture(_like_llama(tf.Qwen2Config), tf.Qwen2ForCausalLM),
    "qwen3": Architecture(_like_llama(tf.Qwen3Config, head_dim=8), tf.Qwen3ForCausalLM),
    "gemma2": Architecture(_like_llama(tf.Gemma2Config, **_GEMMA), tf.Gemma2ForCausalLM),
    "gemma3": Architecture(_like_llama(tf.Gemma3TextConfig, **_GEMMA), tf.Gemma3ForCausalLM),
    "phi": Architecture(_like_llama(tf.PhiConfig), tf.PhiForCausalLM),
    "phi3": Architecture(_like_llama(tf.Phi3Config), tf.Phi3ForCausalLM),
    "mixtral": Architecture(_like_llama(tf.MixtralConfig, **_MIXTRAL), tf.MixtralForCausalLM),
    "qwen2_moe": Architecture(_like_llama(tf.Qwen2MoeConfig, **_QWEN_MOE), tf.Qwen2MoeForCausalLM),
    "gpt2": Architecture(_gpt2, tf.GPT2LMHeadModel),
    "gpt_neox": Architecture(_gpt_neox, tf.GPTNeoXForCausalLM),
    "opt": Architecture(_opt, tf.OPTForCausalLM),
    "falcon": Architecture(_falcon, tf.FalconForCausalLM),
    "mamba": Architecture(_mamba, tf.MambaForCausalLM, settings={"exclude_modules": ["dt_proj"]}),
    "t5": Architecture(_t5, tf.T5ForConditionalGeneration),
    "bart": Architecture(_encoder_decoder(tf.BartConfig), tf.BartForConditionalGeneration),
    "whisper": Architecture(
        _encoder_decoder(tf.WhisperConfig, **_WHISPER), tf.WhisperForConditionalGeneration, _speech
    ),
    "bert": Architecture(_bert, tf.BertForSequenceClassification, _classify_text),
    "deberta": Architecture(_deberta, tf.DebertaV2ForSequenceClassification, _classify_text),
    "funnel": Architecture(_funnel, tf.FunnelForSequenceClassification, _classify_text),
    "vit": Architecture(_vit, tf.ViTForImageClassification, _classify_images),
    "clip": Architecture(_clip, CLIP, _captions),
}
LLAMA = ARCHITECTURES["llama"]
KINDS = ("llama", "gpt2", "opt", "t5", "bert", "vit")  # one of each kind, where every architecture would take long


# For tests that target an embedding to which the head is tied: what PEFT says of that.
TIED = pytest.mark.filterwarnings(
    "ignore:Model (has|with) `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers` to `True`"
)


def settings(**changes: Any) -> LoraSVDConfig:
    """Small enough for the tiny models: any rank is allowed, so that budgets are met closely."""
    form = {"decomposition": "elementwise"} if changes.get("importance") == "fisher_elementwise" else {}
    return LoraSVDConfig(**{"r": 4, "lora_alpha": 8, "param_ratio": 0.6, "rank_multiple": 1, **form, **changes})


def wrap(architecture: Architecture = LLAMA, **changes: Any) -> PeftModel:
    """The architecture's model with an adapter whose random parts are the same every time."""
    base = architecture.build()
    torch.manual_seed(3)
    return get_peft_model(base, settings(**architecture.settings, **changes))


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


def assert_plain(model: nn.Module) -> None:
    """No trace of PEFT: a transformers model whose every parameter can be trained."""
    assert isinstance(model, tf.PreTrainedModel)
    assert not any(
        isinstance(module, (PeftModel, BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in model.modules()
    )
    assert not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())


def assert_kept(model: nn.Module, param_ratio: float) -> None:
    """At most the requested size, and no further below than one rank of the widest layer."""
    report = parameter_report(model)
    assert report.param_ratio <= param_ratio
    assert report.param_ratio > param_ratio - 0.01


def linear_sizes(model: nn.Module) -> dict[str, int]:
    """Numbers in the weight of every dense linear layer."""
    return {
        name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    }
