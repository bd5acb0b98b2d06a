"""The benchmark of resuming with a few kills: real processes, SIGKILL, one in every phase."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lora_svd

SCRIPT = Path(__file__).parents[1] / "kill_and_resume.py"


def test_killed_runs_end_as_one_that_was_left_alone(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--kills",
        "6",
        "--kills_per_run",
        "7",
        "--results",
        str(tmp_path / "found"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(lora_svd.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / "found").read_text().splitlines()]
    assert sum(sum(line["kills"].values()) for line in found) >= 6
    assert all(not line["different"] and line["export_whole_after_every_kill"] for line in found)
