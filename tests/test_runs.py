"""A run of an adapter belongs to that adapter: a new, copied, reloaded or merged one is what a user of PEFT expects."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from models import ARCHITECTURES, LLAMA, assert_bit_equal, logits, make_trainer, settings, tensors, trained, wrap
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from lora_svd import LoraSVDCallback, LoraSVDConfig, LoraSVDError, attach
from lora_svd.compact import parameter_report

AGAIN = pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
FOUND = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")


def copy_by_name(model: PeftModel, name: str) -> None:
    """What trainers of DPO, GRPO, KTO and RLOO do for a reference: an adapter of the same config, filled by name."""
    model.add_adapter(name, model.peft_config["default"])
    for key, parameter in model.named_parameters():
        if ".default." in key:
            model.get_parameter(key.replace(".default.", f".{name}.")).data.copy_(parameter.data)


@pytest.mark.parametrize("train_factors", [False, True])
def test_adapter_filled_by_parameter_name_equals_the_original(train_factors: bool, tmp_path: Path) -> None:
    model = trained(tmp_path, warmup=2, train_factors=train_factors)
    assert model.peft_config["default"].compressed
    expected, base = logits(model), logits(LLAMA.build())
    copy_by_name(model, "ref")
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(expected, base, atol=1e-3)


def test_preference_loss_of_a_copy_starts_at_ln_2(tmp_path: Path) -> None:
    model = trained(tmp_path, warmup=2)
    copy_by_name(model, "ref")
    likelihood = {}
    for name in ("default", "ref"):
        model.set_adapter(name)
        likelihood[name] = logits(model).log_softmax(-1).amax(-1).sum(-1)
    margin = (likelihood["default"] - likelihood["ref"]).diff()
    assert float(nn.functional.softplus(-margin).mean()) == pytest.approx(math.log(2), abs=1e-6)


def test_factors_that_nobody_filled_refuse_to_compute(tmp_path: Path) -> None:
    model = trained(tmp_path, warmup=2)
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    with pytest.raises(LoraSVDError, match="compressed: got True for an adapter whose factors are all zero"):
        logits(model)
    model.set_adapter("default")
    logits(model)


def test_inactive_factors_are_not_trained(tmp_path: Path) -> None:
    model = trained(tmp_path, warmup=2, train_factors=True)
    copy_by_name(model, "ref")
    model.set_adapter("default")
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("default.factors.left" in name for name in trains)
    assert not any(".ref." in name for name in trains)


@AGAIN
@FOUND
def test_second_adapter_on_a_used_base_is_new(tmp_path: Path) -> None:
    """Of the same name, with other targets and another importance: as on a base that nobody has used."""

    def run(base: nn.Module) -> tuple[PeftModel, dict[str, Any]]:
        torch.manual_seed(3)
        model = get_peft_model(base, settings(importance="kronecker", target_modules=["q_proj", "down_proj"], warmup=2))
        make_trainer(model, tmp_path / "second", steps=4).train()
        counts = {name: adapter.observer.num_observed() for name, adapter in model.base_model.run().adapters().items()}
        return model, counts

    for first in ({"warmup": 5}, {"warmup": 2}, {"warmup": 2, "distillation": 0.5}):
        base = LLAMA.build()
        used = get_peft_model(base, settings(**first))
        make_trainer(used, tmp_path / "first", steps=5).train()
        model, counts = run(base)
        expected, expected_counts = run(LLAMA.build())
        assert counts == expected_counts
        assert model.peft_config["default"].compact_ranks == expected.peft_config["default"].compact_ranks
        assert torch.equal(logits(model), logits(expected))


def test_copied_model_goes_its_own_way(tmp_path: Path) -> None:
    model = trained(tmp_path, warmup=2)
    other = copy.deepcopy(model)
    before = tensors(model)
    other.base_model.set_param_ratio(0.4)
    assert_bit_equal(tensors(model), before)
    assert model.peft_config["default"].param_ratio == 0.6
    assert other.base_model.current_param_ratio() <= 0.4 < model.base_model.current_param_ratio()
    assert parameter_report(other.merge_and_unload()).param_ratio <= 0.4


def test_second_merge_changes_nothing(tmp_path: Path) -> None:
    model = trained(tmp_path, warmup=2)
    compact = model.merge_and_unload()
    ranks, state = dict(compact.config.quantization_config.ranks), tensors(compact)
    assert model.merge_and_unload() is compact
    assert compact.config.quantization_config.ranks == ranks
    assert_bit_equal(tensors(compact), state)
    compact.save_pretrained(tmp_path / "compact")
    assert torch.equal(logits(LLAMA.model.from_pretrained(tmp_path / "compact")), logits(compact))


def test_merge_after_unload_leaves_the_base_dense(tmp_path: Path) -> None:
    model = trained(tmp_path, warmup=2)
    base = model.unload()
    assert model.merge_and_unload() is base
    assert getattr(base.config, "quantization_config", None) is None
    assert_bit_equal(tensors(base), tensors(LLAMA.build()))


def test_after_a_merge_size_is_refused_and_evaluation_works(tmp_path: Path) -> None:
    model = wrap(warmup=2)
    trainer = make_trainer(model, tmp_path)
    trainer.train()
    compact = model.merge_and_unload()
    with pytest.raises(LoraSVDError, match=r"set_param_ratio: the adapter default has no layers .* merged or unloaded"):
        model.base_model.set_param_ratio(0.5)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.state.log_history[-1]["param_ratio"] == parameter_report(compact).param_ratio


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_that_nobody_steps_is_warned_of(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = wrap(architecture, importance="none")
    with pytest.warns(UserWarning, match="the adapter trains, but update_and_allocate is not called.*LoraSVDCallback"):
        make_trainer(model, tmp_path, architecture, steps=3, callbacks=[]).train()
    with pytest.warns(UserWarning, match="update_and_allocate is not called: compressing to param_ratio=0.6 now"):
        assert parameter_report(model.merge_and_unload()).param_ratio <= 0.6


def test_gradient_accumulation_is_no_missed_step(tmp_path: Path) -> None:
    make_trainer(wrap(warmup=2), tmp_path, steps=4, gradient_accumulation_steps=4).train()  # warnings are errors


@pytest.mark.parametrize("train_factors", [False, True])
def test_size_that_was_reached_is_kept_when_training_goes_on(train_factors: bool, tmp_path: Path) -> None:
    model = trained(tmp_path, warmup=2, compression=4, compression_interval=1, steps=8, train_factors=train_factors)
    ranks, sizes = dict(model.peft_config["default"].compact_ranks), []

    class Sizes(TrainerCallback):
        def on_step_end(self, *_: Any, **given: Any) -> None:
            sizes.append(given["model"].base_model.current_param_ratio())

    before = logits(model)
    make_trainer(model, tmp_path, steps=8, learning_rate=1e-9, callbacks=[LoraSVDCallback(), Sizes()]).train()
    assert max(sizes) <= 0.6
    assert model.peft_config["default"].compact_ranks == ranks
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)


def test_budget_goes_on_falling_where_it_was(tmp_path: Path) -> None:
    """An adapter that was saved half way, with a lower target, falls to that."""
    model = trained(tmp_path, warmup=2)
    model.peft_config["default"].param_ratio = 0.4
    make_trainer(model, tmp_path).train()
    assert model.base_model.current_param_ratio() <= 0.4


def test_resuming_with_another_format_meets_the_budget(tmp_path: Path) -> None:
    """Ranks of pivoted factors cost more as plain factors."""
    first = wrap(warmup=2, factor_format="pivoted")
    make_trainer(first, tmp_path, steps=8, save_strategy="steps", save_steps=4).train()
    model = wrap(warmup=2, factor_format="factors")
    make_trainer(model, tmp_path, steps=8).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert 0.5 < model.base_model.current_param_ratio() <= 0.6
    assert parameter_report(model.merge_and_unload()).param_ratio <= 0.6


@pytest.mark.filterwarnings("ignore:training ended before the schedule did")
@pytest.mark.parametrize(("warmup", "train_factors"), [(2, False), (2, True), (6, False)])
def test_state_dict_restores_a_fresh_model(warmup: int, train_factors: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"warmup": warmup, "train_factors": train_factors, "importance": "kronecker"}
    model = wrap(**options)
    make_trainer(model, tmp_path, steps=6, callbacks=[LoraSVDCallback(), StopsAfter(5)]).train()
    for strict in (True, False):
        fresh = wrap(**options)
        outcome = fresh.load_state_dict(tensors(model), strict=strict)
        assert (outcome.missing_keys, outcome.unexpected_keys) == ([], [])
        assert_bit_equal(tensors(fresh), tensors(model))
        assert fresh.peft_config["default"].compressed == model.peft_config["default"].compressed
        assert fresh.peft_config["default"].compact_ranks == model.peft_config["default"].compact_ranks
        assert torch.equal(logits(fresh), logits(model))
        assert_bit_equal(tensors(fresh.merge_and_unload()), tensors(copy.deepcopy(model).merge_and_unload()))


def test_accelerate_restores_a_fresh_model(tmp_path: Path) -> None:
    model = trained(tmp_path, warmup=2)
    saving = Accelerator(cpu=True)
    saving.prepare(model)
    saving.save_state(str(tmp_path / "state"))
    fresh, loading = wrap(warmup=2), Accelerator(cpu=True)
    loading.prepare(fresh)
    loading.load_state(str(tmp_path / "state"))
    assert torch.equal(logits(fresh), logits(model))
    assert parameter_report(fresh.merge_and_unload()).param_ratio <= 0.6


def test_state_of_other_shapes_is_refused_by_name(tmp_path: Path) -> None:
    state = tensors(trained(tmp_path, warmup=2))
    fresh = wrap(warmup=2, r=3)
    with pytest.raises(LoraSVDError, match=r"q_proj.lora_svd_adapters.A: has shape \(4, 32\) .* expected \(3, 32\)"):
        fresh.load_state_dict(state)


class StopsAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, _args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.steps


class Sees(TrainerCallback):
    """A logger: what it is told."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        self.logs.append(dict(logs or {}))


@pytest.mark.parametrize("callbacks", [[], [LoraSVDCallback()]])
def test_attached_callback_is_seen_by_loggers_and_saves(callbacks: list[TrainerCallback], tmp_path: Path) -> None:
    sees, model = Sees(), wrap(warmup=2)
    trainer = make_trainer(
        model,
        tmp_path,
        callbacks=[sees, *callbacks],
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="steps",
        save_steps=3,
    )
    assert attach(trainer) is trainer
    trainer.train()
    assert [round(log["param_ratio"], 1) for log in sees.logs] == [1.0, 0.6, 0.6, 0.6, 0.6, 0.6]
    assert sum(isinstance(callback, LoraSVDCallback) for callback in trainer.callback_handler.callbacks) == 1
    assert model.peft_config["default"].compressed


def test_a_layer_holds_one_mapping_by_adapter() -> None:
    layer = wrap().get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert isinstance(layer, BaseTunerLayer)
    assert [name for name, part in vars(layer).items() if isinstance(part, dict) and "default" in part] == []
    assert [name for name, child in layer.named_children() if "default" in dict(child.named_children())] == [
        "lora_svd_adapters"
    ]


def test_users_config_is_never_changed(tmp_path: Path) -> None:
    config = settings(warmup=2, target_modules=["q_proj"])
    before = config.to_dict()
    model = get_peft_model(LLAMA.build(), config)
    make_trainer(model, tmp_path, steps=4).train()
    model.base_model.set_param_ratio(0.5)
    assert isinstance(config, LoraSVDConfig)
    assert {**config.to_dict(), "base_model_name_or_path": None} == {**before, "base_model_name_or_path": None}


def test_last_step_of_trained_factors_counts_at_another_size(tmp_path: Path) -> None:
    """Compressed in the last step, the factors are trained once, and what they learned goes along."""
    model = wrap(warmup=5, train_factors=True)
    make_trainer(model, tmp_path, steps=5).train()
    factors = {name: layer.factors("default") for name, layer in model.base_model.run().layers.items()}
    learned = model.base_model.run().trained_factors()
    assert learned.keys() == {name for name, pair in factors.items() if pair is not None}
    assert all(torch.equal(learned[name].left, pair.left) for name, pair in factors.items() if pair is not None)
