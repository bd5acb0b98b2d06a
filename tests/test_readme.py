"""What the README shows is executed as it stands, each Python block by a process of its own, on a tiny model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_lm import make_text, save_tiny_lm

from lora_svd.importance import IMPORTANCES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(600)
def test_python_blocks_run(tmp_path: Path):
    use, load, four_bit, stream = PYTHON_BLOCKS
    # it goes on where the first begins to train; 60 steps once are enough
    four_bit = use.partition("attach(Trainer(")[0].replace("max_steps=60", "max_steps=6") + four_bit
    stream = use.partition("model = get_peft_model")[0] + stream
    # from_pretrained prefers a local folder to the Hub, so the model's name can stay as it is.
    model = tmp_path / "HuggingFaceTB" / "SmolLM2-135M"
    save_tiny_lm(model, positions=512)
    (tmp_path / "train.txt").write_text(make_text(3000))
    (tmp_path / "eval.txt").write_text(make_text(1500, seed=1))
    printed = []
    for number, block in enumerate((use, load, stream, four_bit)):
        if block == four_bit:  # wide enough for 4-bit kernels
            save_tiny_lm(model, positions=512, hidden=192, intermediate=384)
        script = tmp_path / f"block{number}.py"
        script.write_text(block)
        done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert (tmp_path / "compact-streamed" / "model.safetensors.index.json").exists()
    assert (tmp_path / "compact-nf4" / "model.safetensors").exists()
    param_ratio, model_param_ratio, num_bytes = printed[1].split()[:3]
    assert 0.5 < float(param_ratio) <= 0.6 < float(model_param_ratio) < 1
    assert int(num_bytes) > 0
    assert re.search(r"[\d.]+ \(1,022 tokens, window 512, no BOS in front\)", printed[1])


def test_the_main_block_is_short():
    """It promises ten lines of use; imports and blank lines aside."""
    lines = [line for line in PYTHON_BLOCKS[0].splitlines() if line and not line.startswith(("from ", "import "))]
    assert len(lines) <= 10


def test_files_that_are_named_exist():
    names = set(re.findall(r"`((?:lora_svd|recipes|benchmarks)/[\w./]+)`", README))
    assert len(names) > 4
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []


def test_every_folder_and_file_stands_in_a_table():
    package = ROOT / "lora_svd"
    assert first_column("in `lora_svd/`") == {
        *(path.name for path in package.glob("*.py") if path.name != "__init__.py"),
        *(f"{path.parent.name}/" for path in package.glob("*/__init__.py")),
    }
    assert first_column("beside it") == {
        *(path.name for path in ROOT.glob("*.py") if path.name != "conftest.py"),
        *("benchmarks/", "lora-svd-vllm/", "notebooks/", "recipes/", "tests/", "tests/serving/"),
    }


def first_column(heading: str) -> set[str]:
    """The names in the first column of a table, by its heading."""
    rows = re.search(rf"^\| {heading} .*\n\|---\|---\|\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert rows is not None
    return {name for row in rows[1].splitlines() for name in re.findall(r"`([\w./-]+)`", row.split("|")[1])}


def test_presets_are_those_of_the_code():
    section = re.search(r"## Importance\n(.*?)\n## ", README, re.DOTALL)
    assert section is not None
    assert set(re.findall(r"^\| `(\w+)`", section[1], re.MULTILINE)) == set(IMPORTANCES)


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^ +make (\w+)", README, re.MULTILINE))
    assert targets == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    assert set(re.findall(r"^ +lora-svd (\w+)", README, re.MULTILINE)) == {"analyze", "compress", "evaluate", "stream"}
