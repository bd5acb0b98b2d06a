"""What a kill or a full disk leaves of a run: nothing torn is resumed from, what is whole is, to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LLAMA, assert_bit_equal, make_trainer, tensors, wrap
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_damaged_checkpoints import cut, files_up_to, flip_bit
from tiny_lm import save_tiny_lm

from lora_svd import LoraSVDError
from lora_svd.cli.compress import _train
from lora_svd.cli.inputs import load_model
from lora_svd.cli.recipe import read_recipe
from lora_svd.tuner.adapter import part_of
from lora_svd.tuner.checkpoints import check_checkpoint, last_whole_checkpoint

STEPS = 6
ADAPTER = "adapter_model.safetensors"


def run(folder: Path, resume: str | None = None) -> PeftModel:
    model = wrap(warmup=3)
    make_trainer(model, folder, steps=STEPS, save_strategy="steps", save_steps=2).train(resume_from_checkpoint=resume)
    return model


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints 2 (observed), 4 and 6 (compressed)."""
    folder = tmp_path_factory.mktemp("run")
    run(folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def state_of(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    found = load_file(folder / f"checkpoint-{step}" / ADAPTER)
    return {name: tensor.clone() for name, tensor in found.items()}  # of the file, which is about to change


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "killed before the state": (
        lambda path: [(path / name).unlink() for name in ("checksums.json", "trainer_state.json")],
        r"trainer_state\.json cannot be read, so it was not saved to its end",
    ),
    "killed in the state": (
        lambda path: [(path / "checksums.json").unlink(), cut(path / "trainer_state.json", 40)],
        r"trainer_state\.json cannot be read",
    ),
    "killed in the deletion": (lambda path: (path / "optimizer.pt").unlink(), r"No such file .*optimizer\.pt"),
    "a changed bit": (lambda path: flip_bit(path / ADAPTER, -5), f"{ADAPTER} is not the file that was saved"),
    "cut off": (lambda path: cut(path / "optimizer.pt", 100), r"optimizer\.pt is not the file that was saved"),
    "a power cut": (lambda path: (path / "checksums.json").write_bytes(b""), r"checksums\.json cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_last_whole_checkpoint_is_resumed_from(kind: str, folder: Path) -> None:
    damage, says = DAMAGE[kind]
    expected = state_of(folder)
    damage(folder / "checkpoint-6")
    with pytest.warns(UserWarning, match=f"{folder}/checkpoint-6: .*{says}.*; resume from an earlier checkpoint"):
        found = last_whole_checkpoint(folder)
    assert found == str(folder / "checkpoint-4")
    run(folder, found)
    assert_bit_equal(state_of(folder), expected)
    check_checkpoint(folder / "checkpoint-6")


def test_without_seal_what_trainer_finished_counts(folder: Path) -> None:
    """Killed while the checksums are computed: with save_total_limit=1 there is no other checkpoint."""
    (folder / "checkpoint-6/checksums.json").unlink()
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-6")


def test_nothing_whole(folder: Path, tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path / "nowhere") is None
    for path in folder.glob(f"*/{ADAPTER}"):
        path.unlink()
    with pytest.warns(UserWarning, match="checkpoint-"):
        assert last_whole_checkpoint(folder) is None


def test_trainer_itself_fails_on_a_torn_checkpoint(folder: Path) -> None:
    """Never silently: the state, without which it stops, is what it writes last."""
    (folder / "checkpoint-6/trainer_state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-6/trainer_state\.json"):
        make_trainer(wrap(warmup=3), folder, steps=STEPS).train(resume_from_checkpoint=True)


def test_finished_run_takes_no_further_step(folder: Path) -> None:
    """Six steps are three quarters of an epoch, and Trainer would go on until its end."""
    expected = state_of(folder)
    model = run(folder, str(folder / "checkpoint-6"))
    found = PeftModel.from_pretrained(LLAMA.build(), folder / "checkpoint-6", is_trainable=True)
    assert_bit_equal(tensors(model), tensors(found))
    assert_bit_equal(state_of(folder), expected)
    assert {path.name for path in folder.iterdir()} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


@pytest.mark.parametrize("limit", [1000, 40_000])
def test_full_disk_while_a_checkpoint_is_saved(limit: int, folder: Path) -> None:
    expected = state_of(folder)
    shutil.rmtree(folder / "checkpoint-6")
    with files_up_to(limit), pytest.raises((OSError, RuntimeError, Exception), match=r"(?i)large|write|os error 27"):
        run(folder, str(folder / "checkpoint-4"))
    with pytest.warns(UserWarning, match="checkpoint-6"):
        found = last_whole_checkpoint(folder)
    assert found == str(folder / "checkpoint-4")
    run(folder, found)
    assert_bit_equal(state_of(folder), expected)


@contextmanager
def edited_adapter(folder: Path) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
    checkpoint = folder / "checkpoint-6"
    found = state_of(folder)
    yield checkpoint, found
    save_file(found, checkpoint / ADAPTER, metadata={"format": "pt"})


UP = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("part", ["A", "B", "left", "right"])
def test_adapter_with_a_missing_or_renamed_tensor(part: str, folder: Path) -> None:
    key = f"{UP}.lora_svd_adapters.{part_of(part)}"
    with edited_adapter(folder) as (checkpoint, found):
        found[f"{key}_"] = found.pop(key)
    with pytest.raises(LoraSVDError, match=rf"layers\.0\.mlp\.up_proj\.\S+{part}: missing in this adapter"):
        PeftModel.from_pretrained(LLAMA.build(), checkpoint)
    with pytest.raises(LoraSVDError, match="missing in this adapter"):
        run(folder, str(checkpoint))


@pytest.mark.parametrize("part", ["A", "B", "left", "right", "input_gram", "counts"])
def test_adapter_with_a_tensor_of_another_shape(part: str, folder: Path) -> None:
    key = f"{UP}.lora_svd_adapters.{part_of(part)}"
    with edited_adapter(folder) as (checkpoint, found):
        found[key] = found[key][1:].clone()
    with pytest.raises(LoraSVDError, match=r"up_proj\.lora_svd_\S+: has shape \(\d+.* in this adapter, expected \(\d+"):
        PeftModel.from_pretrained(LLAMA.build(), checkpoint)


@pytest.mark.parametrize("field", ["r", "rank_pattern", "compact_ranks"])
def test_adapter_config_cannot_ask_for_memory(field: str, folder: Path) -> None:
    path = folder / "checkpoint-6/adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    name = UP.removeprefix("base_model.model.")
    path.write_text(json.dumps({**config, field: 10**9 if field == "r" else {name: 10**9}}))
    if field == "compact_ranks":  # what is not below full rank is dense, and the tensors then say what is
        PeftModel.from_pretrained(LLAMA.build(), path.parent)
        return
    with pytest.raises(LoraSVDError, match=r"r: got 1000000000 for module .*, expected an integer in \[1, 1024\]"):
        PeftModel.from_pretrained(LLAMA.build(), path.parent)


def test_recipe_resumes_from_the_last_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_lm(tmp_path / "tiny")
    (tmp_path / "text").write_text("w1 w2 w3")
    recipe = "model: tiny\ntext: text\neval_text: text\noutput_dir: out\nr: 4\nrank_multiple: 1\n"
    recipe += "max_steps: 6\nsave_steps: 2\nuse_cpu: true\nreport_to: [none]\nresume_from_checkpoint: last\n"
    (tmp_path / "recipe.yaml").write_text(recipe)

    def train() -> None:
        model = load_model("tiny", "float32", torch.device("cpu"))
        torch.manual_seed(0)
        _train(model, torch.arange(3, 51).view(6, 8), read_recipe(tmp_path / "recipe.yaml"))

    train()  # from the beginning: there is nothing yet
    expected = state_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out/checkpoint-6")
    (tmp_path / "out/checkpoint-4" / ADAPTER).unlink()
    with pytest.warns(UserWarning, match="checkpoint-4"):
        train()
    assert_bit_equal(state_of(tmp_path / "out"), expected)
