"""Where this package is not installed: a plain dense model, or a folder with its own code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from models import (
    ARCHITECTURES,
    LLAMA,
    assert_bit_equal,
    assert_plain,
    linear_sizes,
    logits,
    make_trainer,
    settings,
    tensors,
    trained,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_svd import LoraSVDError
from lora_svd.compact import densify, parameter_report, save_compact
from lora_svd.compact.bnb import keep_unpacked
from lora_svd.compact.convert import dense_weight

PLAIN_PROCESS = """
import sys
sys.modules["lora_svd"] = None  # as if it were not installed
import torch, transformers
for folder, name in zip(sys.argv[1::2], sys.argv[2::2]):
    saved = torch.load(folder + "-logits", weights_only=True)
    for path in (folder, folder + "-again"):
        load = getattr(transformers, name).from_pretrained
        model, info = load(path, output_loading_info=True, trust_remote_code=name.startswith("Auto"))
        with torch.no_grad():
            found = model.eval()(**saved["inputs"]).logits.float()
        print(torch.allclose(found, saved["logits"], rtol=1e-6, atol=1e-6), any(info.values()), sep="/")
        model.save_pretrained(folder + "-again")
"""
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_loads_and_saves_in_another_process(tmp_path: Path) -> None:
    """With other kinds of layers than Linear, and with a head that was tied to the embedding."""
    arguments = []
    for name in ("llama", "gpt2", "t5"):
        architecture = ARCHITECTURES[name]
        heads = {} if name == "gpt2" else {"target_modules": ["q_proj", "q", "lm_head"], "param_ratio": 0.8}
        form = {"factor_format": "pivoted" if name == "gpt2" else "factors"}
        form |= {"decomposition": "kronecker"} if name == "t5" else {}
        compact = trained(tmp_path / "run", architecture, **form, **heads).merge_and_unload()
        auto = "AutoModelForSeq2SeqLM" if name == "t5" else "AutoModelForCausalLM"
        save_compact(compact, tmp_path / f"{name}-compact", self_contained=True)
        saved = {"inputs": architecture.inputs(), "logits": logits(compact, architecture)}
        torch.save(saved, tmp_path / f"{name}-compact-logits")
        densify(compact).save_pretrained(tmp_path / f"{name}-dense")
        torch.save({**saved, "logits": logits(compact, architecture)}, tmp_path / f"{name}-dense-logits")
        arguments += [tmp_path / f"{name}-compact", auto, tmp_path / f"{name}-dense", architecture.model.__name__]
    command = [sys.executable, "-W", "ignore", "-c", PLAIN_PROCESS, *arguments]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True/False"] * 12, done.stderr


def test_folder_with_code_where_the_package_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    compact = trained(tmp_path / "run").merge_and_unload()
    save_compact(compact, tmp_path / "compact", self_contained=True)
    auto_map = json.loads((tmp_path / "compact" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_compact.CompactLlamaForCausalLM"
    for trusted, kind in ((False, "LlamaForCausalLM"), (True, "CompactLlamaForCausalLM")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "compact", trust_remote_code=trusted)
        assert type(model).__name__ == kind
        assert_bit_equal(tensors(model), tensors(compact))
        assert torch.equal(logits(model), logits(compact))
        assert parameter_report(model) == parameter_report(compact)
        dense = densify(model)
        dense.save_pretrained(tmp_path / "dense")
        assert sorted(path.name for path in (tmp_path / "dense").glob("*.py")) == []
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        assert type(again) is type(dense) is type(compact)
        torch.testing.assert_close(logits(again), logits(compact), rtol=1e-4, atol=1e-5)
    card = (tmp_path / "compact" / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "This needs the package" not in card


def test_what_cannot_be_self_contained(tmp_path: Path) -> None:
    class Other(LLAMA.model):
        pass

    save = partial(save_compact, folder=tmp_path / "model", self_contained=True)
    with pytest.raises(LoraSVDError, match="self_contained: got one that is not compact"):
        save(LLAMA.build())
    compact = trained(tmp_path / "run").merge_and_unload()
    compact.config.quantization_config.quantized = ["model.layers.0.mlp.up_proj"]
    with pytest.raises(LoraSVDError, match="self_contained: got a model in 4 or 8 bits"):
        save(compact)
    compact.config.quantization_config.quantized = []
    compact.__class__ = Other
    with pytest.raises(LoraSVDError, match="self_contained: got Other, expected a class of transformers"):
        save(compact)
    assert not (tmp_path / "model").exists()


def test_model_file_of_mlx(tmp_path: Path) -> None:
    """Saved on request, and not named by what is saved again without it. ``make serve-test`` runs it."""
    compact = trained(tmp_path / "run").merge_and_unload()
    save_compact(compact, tmp_path / "compact", mlx=True)
    config = json.loads((tmp_path / "compact" / "config.json").read_text())
    assert config["model_file"] == "mlx_model.py"
    assert "class LowRankLinear" in (tmp_path / "compact" / "mlx_model.py").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "compact")
    assert torch.equal(logits(again), logits(compact))
    save_compact(again, tmp_path / "again")
    assert "model_file" not in json.loads((tmp_path / "again" / "config.json").read_text())


@pytest.mark.filterwarnings("ignore:.* are in 3-D weights")
def test_what_mlx_does_not_load(tmp_path: Path) -> None:
    save = partial(save_compact, folder=tmp_path / "model", mlx=True)
    with pytest.raises(LoraSVDError, match="mlx: got a model that is not compact"):
        save(LLAMA.build())
    with pytest.raises(LoraSVDError, match=r"mlx: got a model with a mixture of experts, model.layers.0.mlp.experts"):
        save(trained(tmp_path / "run", ARCHITECTURES["mixtral"]).merge_and_unload())
    products = {"decomposition": "kronecker", "factor_format": "factors", "neurons": False}
    compact = trained(tmp_path / "run", **products).merge_and_unload()
    with pytest.raises(LoraSVDError, match="_proj as Kronecker products, expected low-rank layers in full precision"):
        save(compact)
    compact.config.quantization_config.quantized = ["model.layers.0.mlp.up_proj"]
    with pytest.raises(LoraSVDError, match=r"mlx: got a model with model.layers.0.mlp.up_proj in 4 or 8 bits"):
        save(compact)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_the_rounded_products(dtype: torch.dtype, tmp_path: Path) -> None:
    compact = trained(tmp_path).merge_and_unload().to(dtype).train()
    report = parameter_report(compact)
    exact = {name: dense_weight(compact.get_submodule(name)) for name in report.layers}
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
        rows, columns = weight.shape  # behind them zeros, for neurons that are gone
        found_weight = dense.get_submodule(name).weight
        assert torch.equal(found_weight[:rows, :columns], weight.to(dtype))
        assert not found_weight[rows:].any()
        assert not found_weight[:, columns:].any()
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
