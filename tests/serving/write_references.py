"""Tiny compact models, and one real one, with what transformers answers for each: written where lora_svd is installed.

python write_references.py FOLDER [--real DENSE_FOLDER]
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from models import ARCHITECTURES, Architecture, trained
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from lora_svd import LoraSVDConfig
from lora_svd.compact import densify, save_compact

# Heads of 32 features are the smallest for vLLM. Large random weights, or all tokens would be about equally likely.
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "initializer_range": 0.2}
BIASES = {"attention_bias": True, "mlp_bias": True}
MLP = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP)
NEW_TOKENS = 16


def tiny(name: str, folder: Path, *, model: dict[str, Any], **changes: Any) -> PreTrainedModel:
    """A compact model of an architecture in ``tests/models.py``, trained for a few steps."""
    base = ARCHITECTURES[name]
    kind = Architecture(lambda **more: base.config(**{**SIZES, **model, **more}), base.model)
    return trained(folder, kind, warmup=2, **changes).merge_and_unload()


def llama(folder: Path, *, tied: bool = False, biases: bool = False, **changes: Any) -> PreTrainedModel:
    return tiny("llama", folder, model={"tie_word_embeddings": tied, **(BIASES if biases else {})}, **changes)


def ranks(rank: int, widths: dict[str, int], blocks: Iterable[int] = (0, 1), **others: int) -> dict[str, Any]:
    """Ranks of all projections, and kept heads or neurons by the layer that takes them, in some blocks."""
    names = {name: f"{'mlp' if name in MLP else 'self_attn'}.{name}" for name in PROJECTIONS}
    each = {f"model.layers.{i}.{names[name]}": others.get(name, rank) for i in blocks for name in PROJECTIONS}
    taken = {f"model.layers.{i}.{names[name]}": width for i in blocks for name, width in widths.items()}
    return {"compact_ranks": each, "compact_widths": taken, "param_ratio": 0.99}


def biased(model: PreTrainedModel) -> PreTrainedModel:
    """With biases that are not the zeros of a new model."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


SERVED: dict[str, Callable[[Path], PreTrainedModel]] = {
    "pivoted": lambda folder: llama(folder, tied=True, neurons=False),
    "factors": lambda folder: biased(llama(folder, biases=True, neurons=False, factor_format="factors")),
    "neurons": lambda folder: biased(llama(folder, biases=True, **ranks(24, {"down_proj": 64}))),
    "heads": lambda folder: biased(llama(folder, biases=True, **ranks(24, {"o_proj": 1, "down_proj": 96}))),
    "heads-factors": lambda folder: llama(folder, factor_format="factors", **ranks(24, {"o_proj": 1})),
    # up_proj stays dense beside a low-rank gate_proj, and loses neurons
    "dense-kept": lambda folder: llama(folder, **ranks(24, {"down_proj": 64}, up_proj=64, v_proj=64, o_proj=128)),
    "excluded": lambda folder: llama(folder, exclude_modules=["up_proj", "k_proj"], neurons=False),
    "odd-width": lambda folder: llama(folder, **ranks(24, {"down_proj": 63})),
    "embedding": lambda folder: llama(
        folder, tied=True, target_modules=["embed_tokens", *PROJECTIONS], importance="lora_diagonal", neurons=False
    ),
    "head": lambda folder: llama(folder, target_modules=["lm_head", *PROJECTIONS], neurons=False),
    "qwen2": lambda folder: biased(tiny("qwen2", folder, model={}, param_ratio=0.5)),
    "phi3": lambda folder: tiny("phi3", folder, model={}, param_ratio=0.5),
    "qwen3": lambda folder: tiny("qwen3", folder, model={"head_dim": 32}, param_ratio=0.5),
}
REFUSED: dict[str, Callable[[Path], PreTrainedModel]] = {
    "mixtral": lambda folder: tiny("mixtral", folder, model={}),
    "kronecker": lambda folder: llama(folder, decomposition="kronecker", factor_format="factors", neurons=False),
    "gpt2": lambda folder: trained(folder, ARCHITECTURES["gpt2"]).merge_and_unload(),
}


def four_bits(folder: Path) -> PreTrainedModel:
    base = ARCHITECTURES["llama"]
    kind = Architecture(lambda **more: base.config(**{**SIZES, **more}), base.model)
    model = trained(folder, kind, factor_format="factors", rank_multiple=64, neurons=False)
    return model.merge_and_unload(quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))


def real(dense: Path, folder: Path) -> None:
    """SmolLM2, eight of whose blocks have lower ranks, half of their neurons and two of three key-value heads."""
    tokenizer = AutoTokenizer.from_pretrained(dense)
    ids = tokenizer("\n".join(topics.topics.values()), return_tensors="pt")["input_ids"][:, :2048].view(8, 256)
    base = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    blocks = list(range(10, 18))
    sizes = ranks(96, {"down_proj": 768, "o_proj": 2}, blocks, gate_proj=256, up_proj=256, down_proj=256)
    config = LoraSVDConfig(importance="activation", warmup=len(ids) - 1, layers_to_transform=blocks, **sizes)
    model = get_peft_model(base, config)
    for step, rows in enumerate(ids):
        model.train()(input_ids=rows[None], labels=rows[None]).loss.backward()
        model.base_model.update_and_allocate(step, len(ids))
    save_compact(model.merge_and_unload(), folder, tokenizer, mlx=True)


def adapter(compact: Path, folder: Path) -> PreTrainedModel:
    """The dense model of a compact one with an adapter, which is saved alone, on every projection."""
    generator = torch.manual_seed(11)
    model = densify(AutoModelForCausalLM.from_pretrained(compact))
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=list(PROJECTIONS)))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


@torch.inference_mode()
def answers(model: PreTrainedModel, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """What is written behind each prompt, and the log-probabilities of all tokens behind the first, of both."""
    model = model.eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        chances = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        given = chances.gather(1, ids[0, 1:, None])[:, 0]
        found.append({"prompt": prompt, "written": ids[0, len(prompt) :].tolist(), "log_probabilities": given.tolist()})
    return found


def write_answers(model: PreTrainedModel, folder: Path, prompts: list[list[int]]) -> None:
    found = answers(model, prompts)
    spread = torch.tensor(found[0]["log_probabilities"]).std()
    assert spread > 0.3, f"{folder}: the log-probabilities are all alike, {spread}; a wrong model would have them too"
    folder.with_name(f"{folder.name}.json").write_text(json.dumps(found), encoding="utf-8")


def reloaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--real", type=Path, help="folder of SmolLM2-135M-Instruct")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in (5, 24, 40)]
    for name, make in {**SERVED, **REFUSED, "four-bits": four_bits}.items():
        save_compact(make(given.folder / "run"), given.folder / name, mlx=name in SERVED)
        if name in SERVED:
            write_answers(reloaded(given.folder / name), given.folder / name, prompts)
        print(name, flush=True)
    write_answers(adapter(given.folder / "heads", given.folder / "adapter"), given.folder / "adapter", prompts)
    if given.real:
        real(given.real, given.folder / "real")
        tokenizer = AutoTokenizer.from_pretrained(given.real)
        texts = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time there was a little boat that"]
        prompts = [tokenizer(text)["input_ids"] for text in texts]
        write_answers(reloaded(given.folder / "real"), given.folder / "real", prompts)


if __name__ == "__main__":
    main()
