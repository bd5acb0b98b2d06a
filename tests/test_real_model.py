"""The quickstart on the real model, shortened: what ``make demo`` does, in a few steps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = Path(".cache/quickstart/text/eval.txt")


def run(*words: str | Path) -> str:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.real_model
@pytest.mark.timeout(900)
def test_quickstart_in_a_few_steps(tmp_path: Path):
    run("recipes/quickstart/prepare.py")
    shorter = tmp_path / "eval.txt"
    shorter.write_text((ROOT / TEXT).read_text(encoding="utf-8")[:6000], encoding="utf-8")
    options = {
        "eval_text": shorter,
        "window": 512,
        "block_length": 256,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "max_new_tokens": 8,
        "report_tokens": 512,
        "output_dir": tmp_path,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    out = run("-m", "lora_svd.cli", "compress", "recipes/quickstart/quickstart.yaml", *words)

    report = json.loads((tmp_path / "compact" / "report.json").read_text())
    assert 0.595 < report["size"]["param_ratio"] <= 0.6
    assert report["size"]["dense_parameters"] == 134_515_008
    assert report["size"]["bytes"] < 0.7 * report["dense_bytes"]
    assert 10 < report["perplexity_dense"] < 25
    assert math.isfinite(report["perplexity_reloaded"])
    assert report["perplexity_reloaded"] == pytest.approx(report["perplexity_compact"], rel=1e-3)
    # Truncation without any importance gives 1e4 and more on this model; observing 1,024 tokens is worth that much.
    assert report["perplexity_compact"] < 1000
    assert 'Compact: The "if" statement is used for' in out
