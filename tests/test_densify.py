"""A compact model becomes a plain dense one that loads where this package is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, LLAMA, assert_plain, linear_sizes, logits, make_trainer, settings, tensors, trained
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig

from lora_svd import LoraSVDError
from lora_svd.compact import densify, keep_unpacked, parameter_report

PLAIN_PROCESS = """
import sys
sys.modules["lora_svd"] = None  # as if it were not installed
import torch, transformers
for folder, name in zip(sys.argv[1::2], sys.argv[2::2]):
    saved = torch.load(folder + "-logits", weights_only=True)
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        found = model.eval()(**saved["inputs"]).logits.float()
    print(torch.allclose(found, saved["logits"], rtol=1e-6, atol=1e-6), any(info.values()), sep="/")
"""
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_loads_where_this_package_is_not_installed(tmp_path: Path) -> None:
    """With other kinds of layers than Linear, and with a head that was tied to the embedding."""
    arguments = []
    for name in ("llama", "gpt2", "t5"):
        architecture = ARCHITECTURES[name]
        heads = {} if name == "gpt2" else {"target_modules": [r"q_proj", "q", "lm_head"], "param_ratio": 0.8}
        compact = trained(tmp_path / "run", architecture, factor_format="factors", **heads).merge_and_unload()
        dense = densify(compact)
        dense.save_pretrained(tmp_path / name)
        saved = {"inputs": architecture.inputs(), "logits": logits(dense, architecture)}
        torch.save(saved, tmp_path / f"{name}-logits")
        arguments += [str(tmp_path / name), architecture.model.__name__]
    command = [sys.executable, "-W", "ignore", "-c", PLAIN_PROCESS, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True/False"] * 3, done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_the_rounded_products(dtype: torch.dtype, tmp_path: Path) -> None:
    compact = trained(tmp_path).merge_and_unload().to(dtype).train()
    report = parameter_report(compact)
    exact = {name: compact.get_submodule(name).dense_weight() for name in report.layers}
    others = {name: value for name, value in tensors(compact).items() if name.rpartition(".")[0] not in exact}
    compact.model.layers[0].mlp.up_proj.requires_grad_(False)
    dense = densify(compact)
    assert dense is compact
    assert_plain(dense)
    assert dense.model.layers[0].mlp.up_proj.training
    assert linear_sizes(dense) == linear_sizes(LLAMA.build())
    assert parameter_report(dense).parameters == parameter_report(dense).dense_parameters == report.dense_parameters
    for name, weight in exact.items():
        assert weight.dtype == torch.float64
        assert torch.equal(dense.get_submodule(name).weight, weight.to(dtype))
    found = tensors(dense)
    kept = [name for name in others if name.rpartition(".")[0].rpartition(".")[0] not in exact]
    assert kept
    assert all(torch.equal(found[name], others[name]) for name in kept)


def test_four_bits(tmp_path: Path) -> None:
    """Low-rank or not, every quantized layer is dequantized."""
    torch.manual_seed(0)
    base = LLAMA.build(hidden_size=192, intermediate_size=384)
    changes = {"factor_format": "factors", "rank_multiple": 64, "exclude_modules": ["gate_proj"]}
    model = get_peft_model(base, settings(**changes))
    make_trainer(model, tmp_path / "run").train()
    compact = model.merge_and_unload(quantization_config=NF4)
    expected, sizes = logits(compact), parameter_report(compact)
    densify(compact).save_pretrained(tmp_path / "dense")
    assert sum(linear_sizes(compact).values()) == sizes.dense_targeted_parameters + 2 * 192 * 384 + 64 * 192
    again = LLAMA.model.from_pretrained(tmp_path / "dense")
    assert not hasattr(again.config, "quantization_config")
    torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-4)


def test_four_bits_of_another_kind_of_layer(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["gpt2"]
    base = architecture.build()
    base.save_pretrained(tmp_path)
    quantized = architecture.model.from_pretrained(tmp_path, quantization_config=NF4)
    keep_unpacked(quantized)  # the kernels of some CPUs fail for sizes like these
    expected = logits(quantized, architecture)
    dense = densify(quantized)
    assert linear_sizes(dense) == linear_sizes(base)
    assert not hasattr(dense, "hf_quantizer")
    torch.testing.assert_close(logits(dense, architecture), expected, rtol=1e-4, atol=1e-4)


def test_adapters_and_other_models_are_refused(tmp_path: Path) -> None:
    """Their bypass would be lost."""
    model = trained(tmp_path)
    on_top = get_peft_model(trained(tmp_path).merge_and_unload(), LoraConfig(target_modules="all-linear"))
    for given in (model, model.base_model.model, on_top, on_top.base_model.model):
        with pytest.raises(LoraSVDError, match=r"with adapters, expected .* without adapters; call merge_and_unload"):
            densify(given)
    with pytest.raises(LoraSVDError, match="model: got Linear, expected a transformers model"):
        densify(nn.Linear(2, 2))
