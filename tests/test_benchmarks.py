"""The benchmarks that people copy run, on a model small enough for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_lm import make_text, save_tiny_lm

ROOT = Path(__file__).parents[1]


def test_every_benchmark_is_run_here() -> None:
    assert sorted(path.name for path in (ROOT / "recipes/benchmarks").glob("*.py")) == ["language_model.py"]


@pytest.mark.timeout(600)
def test_language_model_benchmark_fills_its_table_and_resumes(tmp_path: Path) -> None:
    save_tiny_lm(tmp_path / "model")
    (tmp_path / "train.txt").write_text(make_text(1000))
    (tmp_path / "test.txt").write_text(make_text(300, seed=1))
    results = tmp_path / "results.json"
    words = ["--model", "model", "--train", "train.txt", "--test", "words=test.txt", "--results", results]
    words += ["--sizes", "0.6", "--steps", "4", "--observed_steps", "2", "--window", "32", "--eval_tokens", "128"]
    command = [sys.executable, ROOT / "recipes/benchmarks/language_model.py", *words]
    for _ in range(2):  # the second run finds everything there
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""
    rows = json.loads(results.read_text())
    assert len({row["row"] for row in rows}) == len(rows) == 14
    assert all(1 < row["words"] < 1000 for row in rows)
