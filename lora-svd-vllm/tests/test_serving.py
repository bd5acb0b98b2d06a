"""Compact models in vLLM, compared with transformers: every form of layer, both kinds of model code, ways to run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cases import CASES
from serving import answers, difference, engine, references, served
from vllm.lora.request import LoRARequest

TOLERANCE = 1e-4  # of log-probabilities in float32


@pytest.mark.parametrize("case", CASES)
def test_same_as_transformers(case: str, models: Path) -> None:
    error, alike = served(models / case)
    assert error < TOLERANCE
    assert alike


@pytest.mark.parametrize("case", ["heads", "dense-kept", "embedding", "phi3"])
def test_model_code_of_transformers(case: str, models: Path) -> None:
    error, alike = served(models / case, model_impl="transformers")
    assert error < TOLERANCE
    assert alike


@pytest.mark.parametrize("expand", ["always", "never"])
def test_expanded_or_not(expand: str, models: Path) -> None:
    error, alike = served(models / "heads", additional_config={"lora_svd": {"expand": expand}})
    assert error < TOLERANCE
    assert alike


def test_what_was_measured_is_noted(models: Path) -> None:
    """In the config from which vLLM makes the key of its compiled graphs."""
    with engine(models / "pivoted") as llm:
        config = llm.llm_engine.vllm_config
        noted = config.additional_config["lora_svd"]
        key = config.compute_hash()
        shape, choice = next(iter(noted["measured"].items()))
        noted["measured"][shape] = not choice
        assert config.compute_hash() != key


def test_unknown_expansion_is_refused(models: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"expand: got 'sometimes' .*, expected one of"),
        engine(models / "pivoted", additional_config={"lora_svd": {"expand": "sometimes"}}),
    ):
        pass


def test_compiled(models: Path) -> None:
    """Each form has a graph of its own in vLLM's cache, though all else of the config is the same."""
    for expand in ("never", "always"):
        options = {"enforce_eager": False, "additional_config": {"lora_svd": {"expand": expand}}}
        command = [sys.executable, str(Path(__file__).with_name("serving.py")), str(models / "neurons")]
        done = subprocess.run([*command, json.dumps(options)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        error, alike = json.loads(done.stdout.splitlines()[-1])
        assert error < TOLERANCE
        assert alike


@pytest.mark.parametrize("case", ["heads", "embedding"])
def test_two_processes(case: str, models: Path) -> None:
    error, alike = served(models / case, tensor_parallel_size=2, distributed_executor_backend="mp")
    assert error < TOLERANCE
    assert alike


def test_adapter_on_top(models: Path) -> None:
    """One that was trained on the dense model, on layers without some neurons and heads too."""
    folder = models / "heads"
    plain, adapted = references(folder), references(models / "adapter")
    prompts = [answer.prompt for answer in plain]
    with engine(folder, enable_lora=True, max_lora_rank=8) as llm:
        request = LoRARequest("adapter", 1, str(models / "adapter"))
        found = answers(llm, prompts, len(plain[0].written), request, whole=False)
        without = answers(llm, prompts, len(plain[0].written), whole=False)
    assert difference(adapted, plain) > 0.1
    assert difference(found, adapted) < TOLERANCE
    assert difference(without, plain) < TOLERANCE
    assert [a.written for a in found] == [b.written for b in adapted]


def test_real_model(models: Path) -> None:
    error, alike = served(models / "real", kv_cache_memory_bytes=1 << 27)
    assert error < TOLERANCE
    assert alike


def test_openai_server(models: Path) -> None:
    (first, *_) = references(models / "real")
    with server(models / "real") as ask:
        (choice,) = ask(prompt=first.prompt, max_tokens=len(first.written), temperature=0, return_token_ids=True)
    assert choice["token_ids"] == first.written


@contextmanager
def server(folder: Path) -> Iterator[Any]:
    """An OpenAI server in a process of its own, and what asks it for a completion."""
    options = {"dtype": "float32", "max-model-len": "128", "max-num-seqs": "2", "port": "8765", "host": "127.0.0.1"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--enforce-eager"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    process = subprocess.Popen([*command, *words], env=environment)
    try:
        url = "http://127.0.0.1:8765"
        _wait_for(f"{url}/health", process)
        yield lambda **request: _post(f"{url}/v1/completions", {"model": str(folder), **request})["choices"]
    finally:
        process.terminate()
        process.wait(60)


def _wait_for(url: str, process: subprocess.Popen[bytes], seconds: int = 240) -> None:
    for _ in range(seconds):
        assert process.poll() is None, f"the server ended with {process.returncode}"
        try:
            urllib.request.urlopen(url, timeout=5)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
        else:
            return
    raise TimeoutError(f"{url} does not answer after {seconds} seconds")


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)
