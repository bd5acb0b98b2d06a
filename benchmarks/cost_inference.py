"""How fast a compact model is beside the dense one: prefill, decoding, loading, and its linear layers alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from common import CostArguments, paired
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lora_svd import LoraSVDConfig
from lora_svd.compact import LowRankLinear, parameter_report, save_compact
from lora_svd.compact.bnb import num_bytes

SIZES = (0.8, 0.6, 0.4, 0.2)
PROMPT, NEW = 256, 16  # tokens


def inference(given: CostArguments, factor_format: str, dtype: str) -> dict[str, Any]:
    """All measurements of one format, in batches of 1 and 8. Speed does not ask what the weights are: plain SVD."""
    found: dict[str, Any] = {"dtype": dtype}
    dense = loaded(given.model, dtype)
    with tempfile.TemporaryDirectory() as folder:
        config = LoraSVDConfig(param_ratio=0.99, importance="none", factor_format=factor_format)
        for size in SIZES:
            tuned: Any = get_peft_model(loaded(given.model, dtype), config)
            tuned.base_model.set_param_ratio(size)
            save_compact(tuned.merge_and_unload(), folder)
            found[str(size)] = compared_folder(given, folder, dense, dtype)
    return found


def inference_of(given: CostArguments, dtype: str) -> dict[str, Any]:
    """The same of the compact models in folders, which may be without some neurons and heads."""
    dense = loaded(given.model, dtype)
    sizes = {folder: round(parameter_report(loaded(folder, dtype)).param_ratio, 4) for folder in given.compact}
    return {"dtype": dtype} | {str(sizes[of]): compared_folder(given, of, dense, dtype) for of in given.compact}


def compared_folder(given: CostArguments, folder: str, dense: Any, dtype: str) -> dict[str, Any]:
    """Speed, loading and bytes of a compact model in a folder, over those of the dense one."""
    compact = loaded(folder, dtype)
    return compared(given, compact, dense) | {
        "load": paired(lambda: loaded(folder, dtype), lambda: loaded(given.model, dtype), 3),
        "bytes_ratio": round(model_bytes(compact) / model_bytes(dense), 4),
    }


def loaded(folder: str, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def model_bytes(model: nn.Module) -> int:
    return sum(num_bytes(parameter) for parameter in model.parameters())


@torch.inference_mode()
def compared(given: CostArguments, compact: Any, dense: Any) -> dict[str, Any]:
    """Ratios of seconds, compact / dense."""
    found = {}
    for batch in (1, 8):
        tokens = torch.randint(dense.config.vocab_size, (batch, PROMPT))
        for name, work in WORK.items():
            found[f"{name}, batch {batch}"] = paired(work(compact, tokens), work(dense, tokens), given.repetitions)
    return found


def prefill(model: Any, tokens: Tensor) -> Callable[[], Any]:
    """All tokens of the prompts, and the logits of the last one."""
    return lambda: model(input_ids=tokens, use_cache=True, logits_to_keep=1)


def decode(model: Any, tokens: Tensor) -> Callable[[], Any]:
    """``NEW`` tokens, one after the other, behind prompts."""
    cache = model(input_ids=tokens, use_cache=True).past_key_values

    def work() -> None:
        for index in range(NEW):
            model(input_ids=tokens[:, index : index + 1], past_key_values=cache, use_cache=True)
        cache.crop(-NEW)

    return work


def linear_layers(model: Any, tokens: Tensor) -> Callable[[], Any]:
    """Every targeted linear layer once, on a row for every token."""
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, LowRankLinear)) and not name.endswith(("lm_head", ".left", ".right"))
    ]
    inputs = [torch.randn(*tokens.shape, layer.in_features, dtype=model.dtype) for layer in layers]

    def work() -> None:  # no output outlives its successor's, as in a model
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)

    return work


def linear_layers_of_one_token(model: Any, tokens: Tensor) -> Callable[[], Any]:
    """As in decoding."""
    return linear_layers(model, tokens[:, :1])


WORK = {
    "prefill": prefill,
    "decode": decode,
    "linear layers": linear_layers,
    "linear layers of one token": linear_layers_of_one_token,
}
