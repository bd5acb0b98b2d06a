"""Compact models in mlx-lm, by the model file in their folder, compared with transformers. Runs where mlx-lm is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from cases import CASES
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from safetensors.numpy import load_file, save_file

TOLERANCE = 1e-3  # of log-probabilities in float32


@pytest.fixture(scope="session")
def models() -> Path:
    return Path(os.environ["LORA_SVD_REFERENCES"])


def load(folder: Path) -> Any:
    return load_model(folder, trust_remote_code=True)[0]


def log_probabilities(model: Any, prompt: list[int]) -> list[float]:
    logits = model(mx.array([prompt]))[0, :-1]
    chances = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return mx.take_along_axis(chances, mx.array(prompt[1:])[:, None], axis=-1)[:, 0].tolist()


def greedy(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    cache, given, written = make_prompt_cache(model), prompt, []
    for _ in range(new_tokens):
        written.append(int(model(mx.array([given]), cache=cache)[0, -1].argmax()))
        given = written[-1:]
    return written


@pytest.mark.parametrize("case", [*CASES, "real"])
def test_same_as_transformers(case: str, models: Path) -> None:
    model = load(models / case)
    for answer in json.loads((models / f"{case}.json").read_text()):
        found = log_probabilities(model, answer["prompt"] + answer["written"])
        assert max(abs(a - b) for a, b in zip(found, answer["log_probabilities"], strict=True)) < TOLERANCE
        assert greedy(model, answer["prompt"], len(answer["written"])) == answer["written"]


def test_heads_that_are_gone_are_not_computed(models: Path) -> None:
    model = load(models / "heads")
    cache = make_prompt_cache(model)
    model(mx.array([[3, 4, 5]]), cache=cache)
    assert {layer.keys.shape[1] for layer in cache} == {1}  # of two
    assert model.layers[0].mlp.down_proj.right.weight.shape[1] == 96  # of 192 neurons


def test_rotary_base_is_the_one_of_the_config(models: Path, tmp_path: Path) -> None:
    """Written as transformers 5 does, under a name that mlx-lm's own models do not read."""
    config = json.loads((models / "real" / "config.json").read_text())
    assert "rope_theta" not in config
    assert config["rope_parameters"]["rope_theta"] == 100000
    prompt = json.loads((models / "real.json").read_text())[0]["prompt"]
    expected = log_probabilities(load(models / "real"), prompt)
    folder = shutil.copytree(models / "real", tmp_path / "other")
    config["rope_parameters"]["rope_theta"] = 10000
    (folder / "config.json").write_text(json.dumps(config))
    found = log_probabilities(load(folder), prompt)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) > 0.01


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_damaged_tensors_are_refused(change: str, models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "neurons", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.left.weight"
    if change == "missing":
        del tensors[name]
    else:
        tensors["extra" if change == "extra" else name] = tensors[name][:-1].copy()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="extra" if change == "extra" else name):
        load(folder)


def test_rotary_parameters_by_kind_of_layer_are_refused(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "neurons", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"full_attention": {"rope_theta": 10000}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"rope_parameters: got \['full_attention'\]"):
        load(folder)


def test_command(models: Path) -> None:
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(models / "real"), "--trust-remote-code"]
    options = ["--prompt", "The capital of France is", "--ignore-chat-template", "--max-tokens", "16", "--temp", "0"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Generation: 16 tokens" in done.stdout
