"""The benchmarks that people copy run, on a model small enough for a test."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from common import PeakMemory, Results, read_text
from peft import get_peft_model
from tiny_lm import make_text, save_tiny_lm, save_tiny_task
from transformers import AutoModelForCausalLM

from lora_svd import LoraSVDConfig
from lora_svd.compact import save_compact

FOLDER = Path(__file__).parents[1]


def test_every_benchmark_is_run_here() -> None:
    parts = {
        "accuracy.py",
        "common.py",
        "cost_growth.py",
        "cost_inference.py",
        "cost_training.py",
        "figure.py",
        "keep_out.py",  # in test_task_baselines.py
        "kngpt2.py",
        "lora_prune.py",
        "lpaf.py",
        "neuron_selection.py",
        "serving.py",  # in lora-svd-vllm/tests, where vLLM is
        "task_data.py",  # in tests/test_real_model.py
        "task_rows.py",
        "tensorgpt.py",
    }
    assert {path.name for path in FOLDER.glob("*.py")} - parts == {
        "ablation.py",
        "cost.py",
        "four_bit.py",
        "kill_and_resume.py",  # in test_kill_and_resume.py
        "language_model.py",
        "task_model.py",
    }


@pytest.mark.timeout(600)
def test_language_model_benchmark_fills_its_table_and_resumes(tmp_path: Path) -> None:
    save_tiny_lm(tmp_path / "model")
    (tmp_path / "train.txt").write_text(make_text(1000))
    (tmp_path / "test.txt").write_text(make_text(300, seed=1))
    results = tmp_path / "results.jsonl"
    words = ["--model", "model", "--train", "train.txt", "--test", "words=test.txt", "--results", results]
    words += ["--sizes", "0.6", "--steps", "6", "--observed_steps", "2", "--window", "32", "--eval_tokens", "128"]
    for _ in range(2):  # the second run finds everything there
        printed = run(tmp_path, "language_model.py", *words)
    assert printed == ""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert len({row["row"] for row in rows}) == len(rows) == 22
    assert all(1 < row["words"] < 1000 and row["seconds"] > 0 and row["peak_mebibytes"] > 0 for row in rows)
    dense = next(row["parameters"] for row in rows if row["row"] == "dense")
    assert all((row["parameters"] < dense) == (row["param_ratio"] < 1) for row in rows)
    table = run(tmp_path, "figure.py", results, "--texts", "words")
    assert table.count("\n| ") == 22, table  # below the heading
    assert (tmp_path / "results-words.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(600)
def test_ablation_benchmark_runs_a_row_of_every_kind(tmp_path: Path) -> None:
    save_tiny_lm(tmp_path / "model")
    (tmp_path / "train.txt").write_text(make_text(1000))
    (tmp_path / "test.txt").write_text(make_text(300, seed=1))
    words = ["--model", "model", "--train", "train.txt", "--test", "words=test.txt", "--results", "results.jsonl"]
    words += ["--sizes", "0.6", "--steps", "6", "--observed_steps", "2", "--window", "32", "--eval_tokens", "128"]
    names = ["one-shot", "one-shot, column_shrinkage=0.1", "one-shot, rows of queries and keys count alike"]
    names += ["one-shot, mean output mended", "one-shot, mean output mended, inputs centred"]
    names += [f"one-shot, inputs of the compact model{also}" for also in ("", ", weights refitted")]
    names += ["recovery", "recovery, r=4, lora_alpha=4"]
    printed = run(tmp_path, "ablation.py", *words, "--rows", *names)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == ["dense", *names]
    assert all(f"\n| {name} | " in printed for name in names)
    assert len({row["words"] for row in rows}) == len(rows), "a change changes something"
    assert all(1 < row["words"] < 1000 for row in rows)


@pytest.mark.timeout(600)
def test_four_bit_benchmark(tmp_path: Path) -> None:
    """Wide enough for rows of 64 numbers with one scale each."""
    save_tiny_lm(tmp_path / "model", hidden=192, intermediate=384)
    (tmp_path / "train.txt").write_text(make_text(1000))
    (tmp_path / "test.txt").write_text(make_text(300, seed=1))
    words = ["--model", "model", "--train", "train.txt", "--test", "words=test.txt", "--results", "four_bit.jsonl"]
    words += ["--sizes", "0.8", "0.6", "--steps", "5", "--window", "32", "--eval_tokens", "128"]
    printed = run(tmp_path, "four_bit.py", *words)
    rows = [json.loads(line) for line in (tmp_path / "four_bit.jsonl").read_text().splitlines()]
    assert len(rows) == 11 + 3 * 2
    assert (tmp_path / "four_bit-words.png").read_bytes().startswith(b"\x89PNG")
    assert sum(line.startswith("| ") for line in printed.splitlines()) == 2 * 2 + len(rows)
    memory = [row for row in rows if row["row"].startswith("memory, ")]
    assert ["statistics_mebibytes" in row for row in memory] == [False, True]
    size = {(row["row"], row["param_ratio"]): row["block_bytes"] for row in rows if row not in memory}
    assert all(1 < row["words"] < 1000 for row in rows if row not in memory)
    assert size["dense, HQQ 2 bits", 1.0] < size["dense, HQQ 4 bits", 1.0] < size["dense, bfloat16", 1.0]
    assert size["compact, NF4", 0.6] < 0.8 * size["dense, NF4", 1.0] < size["compact, bfloat16", 0.6]


@pytest.mark.timeout(600)
def test_task_model_benchmark_fills_its_table_and_resumes(tmp_path: Path) -> None:
    save_tiny_task(tmp_path)
    words = ["--model", "encoder", "--train", "train.jsonl", "--test", "dev.jsonl", "--task", "words"]
    words += ["--results", "results.jsonl", "--sizes", "0.33", "--seeds", "0", "--batch", "8"]
    words += ["--dense_steps", "3", "--steps", "4", "--observed_steps", "2"]
    for _ in range(2):  # the second run finds everything there
        printed = run(tmp_path, "task_model.py", *words)
    assert printed == ""
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len({row["row"] for row in rows}) == len(rows) == 27
    dense = next(row["parameters"] for row in rows if row["row"] == "dense")
    assert all((row["parameters"] < dense) == (row["param_ratio"] < 1) for row in rows)
    assert all(64 * row["accuracy"] == pytest.approx(round(64 * row["accuracy"]), abs=0.01) for row in rows)


@pytest.mark.timeout(600)
def test_cost_benchmark(tmp_path: Path) -> None:
    """A row of every kind."""
    save_tiny_lm(tmp_path / "model")
    words = ["--model", "model", "--results", "cost.jsonl", "--window", "32", "--steps", "4", "--repetitions", "1"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model: Any = get_peft_model(base, LoraSVDConfig(importance="none"))
    model.base_model.set_param_ratio(0.5)
    save_compact(model.merge_and_unload(), tmp_path / "compact")
    rows = ["step, recovering", "factorization, kronecker", "search for neurons, heads and ranks, kronecker"]
    rows += ["inference, pivoted", "run", "inference of compact models"]
    run(tmp_path, "cost.py", *words, "--blocks", "1", "--rows", *rows, "--compact", "compact")
    step, factorization, search, inference, whole, given = map(
        json.loads, (tmp_path / "cost.jsonl").read_text().splitlines()
    )
    assert factorization["layers"] == search["layers"] == 7
    assert search["groups"] == 2
    compared = [
        step,
        factorization,
        search,
        whole,
        *(inference["0.4"][f"{name}, batch 1"] for name in ("prefill", "decode")),
    ]
    assert all(row["wall_ratio"] > 0 and row["cpu_ratio"] > 0 for row in compared)
    assert step["memory_ratio"] > 0.5 < whole["mebibytes_ratio"]
    assert inference["0.2"]["bytes_ratio"] < inference["0.8"]["bytes_ratio"] < 1
    ((_, of_folder),) = ((key, value) for key, value in given.items() if key.startswith("0."))
    assert inference["0.4"]["bytes_ratio"] < of_folder["bytes_ratio"] < inference["0.6"]["bytes_ratio"]


def test_results_are_found_by_what_names_them(tmp_path: Path) -> None:
    results = Results(tmp_path / "new" / "results.jsonl")
    assert not results.has(row="a")
    results.add({"row": "a", "param_ratio": 0.6, "seed": 0, "words": 2.5})
    Results(results.path).add({"row": "b", "param_ratio": 0.6, "seed": 0, "words": 3.5})
    assert [result["words"] for result in results.read()] == [2.5, 3.5]
    assert results.has(row="a", param_ratio=0.6, seed=0)
    assert not results.has(row="a", param_ratio=0.6, seed=1)


def test_peak_memory_counts_what_was_freed_again() -> None:
    memory = PeakMemory()
    with memory.watch():
        before = PeakMemory()
        with before.watch():
            pass
        held = torch.ones(64 << 20, dtype=torch.uint8).clone()
        time.sleep(0.3)
        del held
    assert memory.mebibytes >= before.mebibytes + 60


def test_texts_are_lines_or_documents(tmp_path: Path) -> None:
    (tmp_path / "text.raw").write_text("one\ntwo\n")
    (tmp_path / "text.jsonl").write_text('{"text": "one\\nand"}\n\n{"text": "two"}\n')
    assert read_text(tmp_path / "text.raw") == "one\n\ntwo"
    assert read_text(tmp_path / "text.jsonl") == "one\nand\n\ntwo"


def run(folder: Path, script: str, *words: str | Path) -> str:
    """What a benchmark script prints."""
    command = [sys.executable, FOLDER / script, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
