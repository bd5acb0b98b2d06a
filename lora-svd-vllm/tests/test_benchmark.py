"""The benchmark of serving, on tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_dense_and_compact_in_turns(models: Path) -> None:
    """A model beside itself: the same size, and numbers of everything that is asked."""
    folder = str(models / "pivoted")
    options = ["--batches", "1", "2", "--prompt", "8", "--new", "8", "--rounds", "1", "--dtype", "float32"]
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "serving.py"),
        "--dense",
        folder,
        "--compact",
        folder,
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout[done.stdout.index('{\n  "settings"') :])
    assert found["settings"]["batches"] == [1, 2]
    measured = {"tokens a second, batch 1", "tokens a second, batch 2", "seconds to the first token", "memory"}
    assert measured == found.keys() - {"settings"}
    for name in measured:
        assert found[name].keys() == {"dense", "compact", "compact / dense"}
        assert all(value > 0 for value in found[name].values())
    assert 0.7 < found["memory"]["compact / dense"] < 1.4
