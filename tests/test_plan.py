"""The plan of a run: its steps, the text that is held out, and its memory, estimated from below."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lm import make_text, save_tiny_lm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_svd import LoraSVDError
from lora_svd.cli import inputs
from lora_svd.cli.inputs import adapted, device_memory, hold_out, load_model
from lora_svd.cli.plan import Plan, make_plan, num_steps
from lora_svd.cli.recipe import Recipe, TrainArguments, read_recipe


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a tiny model and a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.txt").write_text(make_text(600))
    return save_tiny_lm(tmp_path / "tiny")


def recipe(*options: str) -> Recipe:
    given = ["--text", "train.txt", "--output", "small", "--block_length", "16", "--report_to", "none", "--use_cpu"]
    return read_recipe("tiny", [*given, *options])


@pytest.mark.parametrize(
    ("given", "blocks", "steps"),
    [
        ({}, 10, 30),
        ({}, 401, 101),
        ({}, 1_000_000, 500),
        ({"gradient_accumulation_steps": 2}, 401, 51),
        ({"per_device_train_batch_size": 8}, 401, 51),
        ({"num_train_epochs": 2}, 10, 6),
        ({"num_train_epochs": 0.5}, 40_000, 5000),
        ({"max_steps": 7, "num_train_epochs": 2}, 1_000_000, 7),
    ],
)
def test_steps(given: dict[str, Any], blocks: int, steps: int, tmp_path: Path) -> None:
    assert num_steps(TrainArguments(output_dir=str(tmp_path), use_cpu=True, **given), blocks) == steps


class TestHoldOut:
    @pytest.fixture
    def tokenizer(self, tiny: Path) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(tiny)

    @pytest.mark.parametrize(("words", "window", "held_out"), [(1000, 8, 100), (1000, 2, 64), (100, 20, 40)])
    def test_a_tenth_between_2_and_32_windows(
        self, words: int, window: int, held_out: int, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        text = make_text(words)
        head, end = hold_out(text, tokenizer, window)
        assert head + end == text
        assert len(end.split()) == pytest.approx(held_out, abs=2)

    def test_a_short_text_is_refused(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with pytest.raises(LoraSVDError, match="eval_text: none given, and 79 tokens are too few to hold out 40 of"):
            hold_out(make_text(79), tokenizer, 20)


def observed(plan_of: Recipe) -> Any:
    """The model of a recipe with its adapter, after one observed step."""
    model: Any = adapted(load_model("tiny", plan_of.run.dtype, torch.device("cpu")), plan_of.config)
    ids = torch.randint(3, 60, (4, 16))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    model.base_model.update_and_allocate(0, total_steps=10)
    return model


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ([], 0.85),
        (["--importance", "lora_diagonal"], 0.65),
        (["--importance", "none"], 1.0),
        (["--statistics_limit", "20000"], 0.9),
        (["--dtype", "bfloat16", "--bf16", "false"], 0.85),
    ],
)
@pytest.mark.filterwarnings("ignore:statistics_limit:UserWarning")
@pytest.mark.usefixtures("tiny")
def test_memory_is_at_most_and_nearly_what_is_taken(options: list[str], least: float) -> None:
    asked = recipe("--r", "4", *options)
    memory = make_plan(asked, 30).memory
    model = observed(asked)
    assert memory.weights == sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    assert memory.bypasses == sum(16 * p.numel() for p in model.parameters() if p.requires_grad)
    sums = {
        id(total): total.nbytes
        for adapter in model.base_model.run().adapters().values()
        for name, total in adapter.observer.items()
        if name != "counts"
    }
    assert least * sum(sums.values()) <= memory.statistics <= sum(sums.values())


@pytest.mark.usefixtures("tiny")
def test_trained_factors_take_the_room_of_half_of_the_statistics() -> None:
    plan = make_plan(recipe("--train_factors", "--param_ratio", "0.5"), 30)
    memory = plan.memory
    assert memory.factors == 16 * plan.kept == 8 * plan.targeted
    assert memory.factors > memory.statistics // 2
    assert plan.needs() == {
        torch.device("cpu"): memory.weights + memory.bypasses + memory.statistics // 2 + memory.factors
    }


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        ([], "30 steps of 64 tokens, 4.00 passes: 12 observe, 18 recover."),
        (
            ["--compression", "0.2"],
            "30 steps of 64 tokens, 4.00 passes: 12 observe, 6 compress, 12 recover.",
        ),
        (["--warmup", "9", "--max_steps", "9"], "9 steps of 64 tokens, 1.20 passes: 9 observe."),
        (["--param_ratio", "1"], "30 steps of 64 tokens, 4.00 passes: a LoRA is trained, nothing is cut."),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_phases(options: list[str], phases: str) -> None:
    assert str(make_plan(recipe(*options), 30)).splitlines()[1].replace(" over the text", "") == phases


@pytest.mark.usefixtures("tiny")
def test_statistics_on_the_host_are_counted_there(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(recipe("--statistics_device", "cpu"), 30)
    elsewhere = Plan(**{**vars(plan), "device": torch.device("cuda", 0)})
    memory = plan.memory
    without = memory.weights + memory.bypasses + memory.factors
    assert elsewhere.needs() == {torch.device("cuda", 0): without, torch.device("cpu"): memory.statistics}
    has = {"cuda": without, "cpu": memory.statistics}
    monkeypatch.setattr("lora_svd.cli.plan.device_memory", lambda device: has[device.type])
    elsewhere.check_memory()
    for name in has:
        has[name] -= 1
        with pytest.raises(LoraSVDError, match=rf"memory: the run takes at least .* on {name}"):
            elsewhere.check_memory()
        has[name] += 1
    monkeypatch.setattr("lora_svd.cli.plan.device_memory", lambda _: None)
    elsewhere.check_memory()


def test_memory_of_the_machine_and_of_its_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_CONTAINER_LIMIT", tmp_path / "memory.max")
    physical = device_memory(torch.device("cpu"))
    assert physical is not None
    assert physical > 2**28
    (tmp_path / "memory.max").write_text("max\n")
    assert device_memory(torch.device("cpu")) == physical
    (tmp_path / "memory.max").write_text("4096\n")
    assert device_memory(torch.device("cpu")) == 4096
    assert device_memory(torch.device("meta")) is None
    monkeypatch.delattr(os, "sysconf")
    assert device_memory(torch.device("cpu")) is None
