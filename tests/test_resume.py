"""Interrupt and resume: a run taken up from a checkpoint of any phase ends bit-equal to an uninterrupted one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, LLAMA, assert_bit_equal, linear_sizes, logits, make_trainer, tensors, wrap
from peft import PeftModel
from transformers import EarlyStoppingCallback

STEPS, EVERY = 12, 2
SCHEDULES = {
    "one-shot": {"warmup": 5},
    "cubic": {"warmup": 3, "compression": 6, "compression_interval": 2},
}


def run(folder: Path, architecture: str = "llama", resume: Path | None = None, **changes: Any) -> PeftModel:
    model = wrap(ARCHITECTURES[architecture], lora_dropout=0.1, **changes)
    saving = {"save_strategy": "steps", "save_steps": EVERY}
    trainer = make_trainer(model, folder, ARCHITECTURES[architecture], steps=STEPS, **saving)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model


def assert_resumes(folder: Path, architecture: str = "llama", **changes: Any) -> None:
    """From every checkpoint: bypass, statistics, factors, ranks, and the compact model are those of the full run."""
    whole = run(folder, architecture, **changes)
    expected, ranks = tensors(whole), whole.peft_config["default"].compact_ranks
    compact = tensors(whole.merge_and_unload())
    phases = set()
    for step in range(EVERY, STEPS, EVERY):
        start = folder / f"checkpoint-{step}"
        resumed = run(folder / f"from-{step}", architecture, start, **changes)
        assert_bit_equal(tensors(resumed), expected)
        assert resumed.peft_config["default"].compact_ranks == ranks
        phases.add(
            PeftModel.from_pretrained(ARCHITECTURES[architecture].build(), start).peft_config["default"].compressed
        )
        assert_bit_equal(tensors(resumed.merge_and_unload()), compact)
    assert phases == {False, True}  # checkpoints before and after the first factorization


@pytest.mark.parametrize("importance", ["lora_diagonal", "lora_activation", "kronecker"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resumed_run_ends_bit_equal(schedule: str, importance: str, tmp_path: Path) -> None:
    assert_resumes(tmp_path, importance=importance, **SCHEDULES[schedule])


def test_resumed_run_of_conv1d_with_kept_bypass_ends_bit_equal(tmp_path: Path) -> None:
    assert_resumes(tmp_path, "gpt2", compensation="keep", factor_format="factors", r=2, **SCHEDULES["one-shot"])


def test_given_ranks_survive_an_interruption(tmp_path: Path) -> None:
    ranks = {name: 2 + i for i, name in enumerate(linear_sizes(LLAMA.build())) if name != "lm_head"}
    assert_resumes(tmp_path, compact_ranks=ranks, **SCHEDULES["cubic"])


# The last factorization is that of step 9; given ranks are those of the first one, of step 3.
@pytest.mark.parametrize(("best", "given", "found"), [(2, False, 10), (2, True, 4), (12, False, 12), (12, True, 12)])
def test_best_model_of_the_final_size_replaces_the_last(best: int, given: bool, found: int, tmp_path: Path) -> None:
    names = linear_sizes(LLAMA.build()).keys() - {"lm_head"}
    ranks = dict.fromkeys(names, 5) if given else None
    model = wrap(compact_ranks=ranks, **SCHEDULES["cubic"])
    saving = {"save_strategy": "steps", "save_steps": EVERY, "eval_strategy": "steps", "eval_steps": EVERY}
    choice = {"load_best_model_at_end": True, "metric_for_best_model": "distance", "greater_is_better": False}
    trainer = make_trainer(model, tmp_path, steps=STEPS, **saving, **choice)
    evaluations = itertools.count(EVERY, EVERY)
    trainer.compute_metrics = lambda _: {"distance": abs(next(evaluations) - best)}
    trainer.train()
    saved = PeftModel.from_pretrained(LLAMA.build(), tmp_path / f"checkpoint-{found}", is_trainable=True)
    assert_bit_equal(tensors(model), tensors(saved))
    assert torch.equal(logits(model), logits(saved))
    assert model.peft_config["default"].compact_ranks == saved.peft_config["default"].compact_ranks
    assert_bit_equal(tensors(model.merge_and_unload()), tensors(saved.merge_and_unload()))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("step", [2, 6])
def test_checkpoint_of_an_earlier_phase_replaces_the_last(step: int, given: bool, tmp_path: Path) -> None:
    """As Trainer loads one: statistics, factors and ranks are those that it has, and a merge finishes the schedule."""
    ranks = dict.fromkeys(linear_sizes(LLAMA.build()).keys() - {"lm_head"}, 5) if given else None
    model = run(tmp_path, compact_ranks=ranks, **SCHEDULES["cubic"]).eval()
    model.load_adapter(str(tmp_path / f"checkpoint-{step}"), "default", is_trainable=True)
    saved = PeftModel.from_pretrained(LLAMA.build(), tmp_path / f"checkpoint-{step}", is_trainable=True)
    assert_bit_equal(tensors(model), tensors(saved))
    assert torch.equal(logits(model), logits(saved))
    assert model.peft_config["default"].compressed == (step != 2)
    assert model.peft_config["default"].compact_ranks == saved.peft_config["default"].compact_ranks
    for unfinished in (model, saved):
        if given and step == 6:  # the given ranks are in force already
            unfinished.merge_and_unload()
            continue
        with pytest.warns(UserWarning, match="training ended before the schedule did"):
            unfinished.merge_and_unload()
    assert_bit_equal(tensors(model.base_model.model), tensors(saved.base_model.model))


def test_early_stopping_waits_for_the_recovery(tmp_path: Path) -> None:
    model = wrap(**SCHEDULES["cubic"])
    saving = {"save_strategy": "steps", "save_steps": EVERY, "eval_strategy": "steps", "eval_steps": EVERY}
    choice = {"load_best_model_at_end": True, "metric_for_best_model": "step", "greater_is_better": False}
    trainer = make_trainer(model, tmp_path, steps=STEPS, **saving, **choice)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    evaluations = itertools.count(EVERY, EVERY)
    trainer.compute_metrics = lambda _: {"step": next(evaluations)}  # the first is the best of all
    trainer.train()
    assert trainer.state.global_step == 12
    assert model.base_model.current_param_ratio() <= 0.6
