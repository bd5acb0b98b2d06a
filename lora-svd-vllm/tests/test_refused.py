"""What is damaged or not served is refused by name before a token is computed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lora_svd_vllm.description import check_served
from lora_svd_vllm.files import folder_of
from safetensors.torch import load_file, save_file
from serving import engine
from torch import Tensor

UP = "model.layers.1.mlp.up_proj"
SAY_DENSE = r"make the model dense \(lora_svd.compact.densify"


def refusal(folder: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match), engine(folder, max_model_len=32):
        pass


@pytest.fixture
def damaged(models: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Tensor]], None]], Path]:
    """A copy of a model whose tensors were changed, without checksums."""

    def change(edit: Callable[[dict[str, Tensor]], None]) -> Path:
        folder = shutil.copytree(models / "neurons", tmp_path / "damaged")
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        edit_config(folder, checksums={})
        return folder

    return change


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "name", [f"{UP}.left.weight", f"{UP}.order", f"{UP}.bias", f"{UP}.weight", "model.norm.weight"]
)
def test_missing_tensor(name: str, damaged: Callable[..., Path]) -> None:
    refusal(damaged(lambda tensors: tensors.pop(name)), rf"{name}: missing in this compact checkpoint, expected shape")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_norm.weight", f"{UP}.left.bias", "extra"])
def test_extra_tensor(name: str, damaged: Callable[..., Path]) -> None:
    folder = damaged(lambda tensors: tensors.update({name: torch.zeros(3)}))
    refusal(folder, rf"{name}: in this compact checkpoint with shape \[3\], but the model .* has no such tensor")


@pytest.mark.parametrize("name", [f"{UP}.right.weight", f"{UP}.order", "lm_head.weight"])
def test_wrong_shape(name: str, damaged: Callable[..., Path]) -> None:
    folder = damaged(lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    refusal(folder, rf"{name}: has shape \[.*\] in this compact checkpoint, expected \[")


def test_wrong_rank_and_module(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "neurons", tmp_path / "model")
    ranks = json.loads((folder / "config.json").read_text())["quantization_config"]["ranks"]
    edit_config(folder, ranks={**ranks, UP: 999})
    refusal(folder, f"{UP}: the compact checkpoint gives rank 999, expected 1 to 64")
    edit_config(folder, ranks={**ranks, "model.other": 3})
    refusal(folder, "model.other: named in this compact checkpoint's ranks, but LlamaForCausalLM has no such module")


def test_wrong_checksum(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "neurons", tmp_path / "model")
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refusal(folder, r"model.safetensors: is not the file that was saved, its SHA-256 is \w+, expected \w+")
    path.unlink()
    refusal(folder, "model.safetensors: missing, but named in config.json")


def test_damaged_file(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "neurons", tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    edit_config(folder, checksums={})
    refusal(folder, "model.safetensors: cannot be read")


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("mixtral", rf"model.layers.0.mlp.experts.*: a mixture of experts \(MixtralForCausalLM\).*{SAY_DENSE}"),
        ("kronecker", rf"_proj: a sum of Kronecker products.*{SAY_DENSE}"),
        ("four-bits", rf"_proj\S*: in 4 or 8 bits.*without quantization_config.*{SAY_DENSE}"),
        ("gpt2", rf"transformer.h.0.\S+: of class Conv1D, expected a linear layer or an embedding; {SAY_DENSE}"),
    ],
)
def test_kinds_that_are_not_served(case: str, match: str, models: Path) -> None:
    refusal(models / case, match)


def test_other_formats() -> None:
    with pytest.raises(ValueError, match="format_version: the compact checkpoint has 2, this plugin reads 1; upgrade"):
        check_served({"format_version": 2})
    with pytest.raises(ValueError, match="factor_format: the compact checkpoint has 'other', expected 'pivoted' or"):
        check_served({"format_version": 1, "factor_format": "other"})


def test_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in the Hub's cache, which it is downloaded to where there is a network."""
    snapshot = tmp_path / "models--user--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert folder_of("user/name", None) == snapshot


def test_without_the_plugin(models: Path) -> None:
    code = f"from vllm import LLM; LLM(model={str(models / 'pivoted')!r}, skip_tokenizer_init=True)"
    environment = {**os.environ, "VLLM_PLUGINS": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Unknown quantization method: lora_svd" in done.stderr
