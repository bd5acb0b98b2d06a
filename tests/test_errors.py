"""Bad input gets one clear error that names the field or module, the value and the mend, and loses nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import LLAMA, assert_bit_equal, linear_sizes, logits, make_trainer, settings, tensors, trained, wrap
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import TrainerCallback, TrainerControl, TrainerState

from lora_svd import LoraSVDCallback, LoraSVDConfig, LoraSVDError, NumericalError
from lora_svd.compact import parameter_report
from lora_svd.config import COMPENSATIONS
from lora_svd.importance import IMPORTANCES

UP = "model.layers.0.mlp.up_proj"
DOWN = UP.replace("up", "down")  # no other layer has its input


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, _: Any, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def stopped(folder: Path, **changes: Any) -> PeftModel:
    """A Trainer run of ten steps that ends after four."""
    model = wrap(**changes)
    make_trainer(model, folder, steps=10, callbacks=[LoraSVDCallback(), StopAfter(4)]).train()
    return model


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("param_ratio", 0, r"got 0, expected a number in \(0, 1\]"),
        ("param_ratio", 1.2, r"got 1\.2, expected a number in \(0, 1\]"),
        ("param_ratio", -0.5, r"got -0\.5"),
        ("param_ratio", math.nan, "got nan"),
        ("param_ratio", "0.6", r"got '0\.6', expected a number"),
        ("warmup", -1, "got -1, expected a fraction of the run or steps"),
        ("compression", -0.1, r"got -0\.1, expected"),
        ("compression_interval", 0, "got 0, expected a positive integer"),
        ("rank_multiple", 0, "got 0, expected a positive integer"),
        ("r", 0, "got 0, expected a positive integer"),
        ("r", 2.5, r"got 2\.5, expected a positive integer"),
        ("r", np.int64(4), r"got np.int64\(4\), expected a positive integer"),
        ("lora_dropout", 1.5, r"got 1\.5, expected a number in \[0, 1\]"),
        ("row_shrinkage", 2, r"got 2, expected a number in \[0, 1\]"),
        ("column_shrinkage", None, "got None, expected a number"),
        ("importance", "magnitude", "unknown value 'magnitude', expected one of .*"),
        ("allocation", "greedy", r"unknown value 'greedy', expected one of \['global', 'uniform'\]"),
        ("decomposition", "qr", r"unknown value 'qr', expected one of \['elementwise', 'kronecker', 'svd'\]"),
        ("factor_format", "dense", r"unknown value 'dense', expected one of \['factors', 'pivoted'\]"),
        (
            "compensation",
            "drop",
            rf"unknown value 'drop', expected one of \{sorted(COMPENSATIONS)}".replace("]", r"\]"),
        ),
        ("bias", "some", r"unknown value 'some', expected one of \['all', 'lora_svd_only', 'none'\]"),
        ("compact_ranks", {UP: 0}, rf"{UP}: got 0, expected a positive integer"),
    ],
)
def test_config_field_out_of_range(field: str, value: object, says: str) -> None:
    with pytest.raises(LoraSVDError, match=f"^{field}: {says}"):
        LoraSVDConfig(**{field: value})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"decomposition": "kronecker"},
            "factor_format: got 'pivoted' with decomposition='kronecker', expected 'factors': a sum of Kronecker",
        ),
        (
            {"decomposition": "elementwise"},
            "importance: got 'lora_activation' with decomposition='elementwise', which weighs every element on its own:"
            r" expected one of \['fisher_elementwise'\]",
        ),
        (
            {"importance": "fisher_elementwise"},
            "importance: got 'fisher_elementwise' with decomposition='svd', which weighs rows and columns: expected",
        ),
        (
            {"decomposition": "kronecker", "factor_format": "factors", "compensation": "keep"},
            "compensation: got 'keep' with decomposition='kronecker', expected 'absorb': a bypass of rank r is no sum",
        ),
    ],
)
def test_forms_that_do_not_go_together(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(LoraSVDError, match=f"^{says}"):
        LoraSVDConfig(**fields)


@pytest.mark.parametrize("pattern", ["layers", "(layers|h)", ["(layers|h)"]])
def test_layers_pattern_is_a_regular_expression_as_a_whole(pattern: str | list[str]) -> None:
    assert LoraSVDConfig(layers_to_transform=[0], layers_pattern=pattern).layers_pattern == pattern
    with pytest.raises(LoraSVDError, match=r"^layers_pattern: got '\(h', expected a regular expression"):
        LoraSVDConfig(layers_to_transform=[0], layers_pattern="(h")


def test_every_field_of_ours_is_checked() -> None:
    ours = {entry.name for entry in fields(LoraSVDConfig)} - {entry.name for entry in fields(PeftConfig)}
    assert ours - {entry.name for entry in fields(LoraSVDConfig) if "check" in entry.metadata} == set()


def test_unknown_importance_lists_every_preset() -> None:
    with pytest.raises(LoraSVDError) as caught:
        LoraSVDConfig(importance="magnitude")
    assert all(f"'{name}'" in str(caught.value) for name in IMPORTANCES)


def test_targets_that_match_nothing() -> None:
    with pytest.raises(ValueError, match=r"Target modules \{'query_key_value'\} not found"):
        get_peft_model(LLAMA.build(), settings(target_modules=["query_key_value"]))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_contradict_each_other(field: str) -> None:
    """The first one would count, and the order is another one after saving."""
    with pytest.raises(
        LoraSVDError, match=rf"^{field}: \{{'up_proj': 2, .*: 3\}} all match model\.layers\.0\.mlp\.up_proj"
    ):
        get_peft_model(LLAMA.build(), settings(**{field: {"up_proj": 2, r"layers\.0\.mlp\..*": 3}}))
    get_peft_model(LLAMA.build(), settings(**{field: {"up_proj": 2, r"layers\.0\.mlp\..*": 2}}))


def test_unsupported_module_is_named() -> None:
    with pytest.raises(TypeError, match=r"target_modules: model\.norm is LlamaRMSNorm, .* expected .*exclude_modules"):
        get_peft_model(LLAMA.build(), settings(target_modules=["model.norm"]))


def smallest(**changes: Any) -> PeftModel:
    """Rank 1 everywhere takes about 5 % of the tiny Llama."""
    return wrap(param_ratio=0.01, warmup=1, total_steps=3, **changes)


@pytest.mark.parametrize("how", ["first step", "merge", "set_param_ratio"])
def test_budget_below_rank_one_says_the_smallest_feasible(how: str) -> None:
    model = smallest(importance="none") if how != "set_param_ratio" else wrap(importance="none")
    before = tensors(model)
    calls: dict[str, Callable[[], object]] = {
        "first step": lambda: backward(model).base_model.update_and_allocate(0),
        "merge": model.merge_and_unload,
        "set_param_ratio": lambda: model.base_model.set_param_ratio(0.01),
    }
    with pytest.raises(
        LoraSVDError, match=r"param_ratio: 0\.01 allows 153 .*Raise param_ratio to at least 0\.\d+"
    ) as caught:
        calls[how]()
    assert_bit_equal(tensors(model), before)
    least = float(str(caught.value).partition("at least ")[2].partition(",")[0])
    model.base_model.set_param_ratio(least)
    assert parameter_report(model.merge_and_unload()).param_ratio <= least


def backward(model: PeftModel, scale: float = 1.0) -> PeftModel:
    (model(**LLAMA.inputs()).loss * scale).backward()
    return model


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        ({UP: 2}, r"compact_ranks: no rank for model\.layers\.\d\.\S+ \(13 of 14 missing\)"),
        (dict.fromkeys(linear_sizes(LLAMA.build()), 30), r"compact_ranks: .* keep 0\.9\d+ .* param_ratio=0\.6; lower"),
    ],
)
def test_given_ranks_that_are_incomplete_or_too_large(ranks: dict[str, int], says: str) -> None:
    model = wrap(compact_ranks=ranks, total_steps=3)
    with pytest.raises(LoraSVDError, match=says):
        backward(model).base_model.update_and_allocate(0)


@pytest.mark.parametrize("importance", sorted(IMPORTANCES.keys() - {"none"}))
def test_merging_before_anything_was_observed(importance: str) -> None:
    model = wrap(importance=importance)
    before = tensors(model)
    with pytest.raises(LoraSVDError, match=rf"{UP[:12]}.*nothing was observed for importance='{importance}' .*Train"):
        model.merge_and_unload()
    assert_bit_equal(tensors(model), before)
    assert model.peft_config["default"].compact_ranks is None
    with pytest.raises(LoraSVDError, match="nothing was observed"):
        model.base_model.set_param_ratio(0.5)
    assert model.peft_config["default"].param_ratio == 0.6


def test_plain_svd_needs_no_observation() -> None:
    assert parameter_report(wrap(importance="none").merge_and_unload()).param_ratio <= 0.6


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["gradient_rows", "signed_output_gram", "input_gram"])
def test_non_finite_statistic_loses_nothing(name: str, value: float, tmp_path: Path) -> None:
    model = stopped(tmp_path, warmup=8, importance="lora_diagonal" if name == "gradient_rows" else "lora_activation")
    buffer = model.get_submodule(f"base_model.model.{DOWN}").adapter("default").observer[name]
    whole = buffer.clone()
    buffer.view(-1)[0] = value
    expected, before = logits(model), tensors(model)
    with (
        pytest.warns(UserWarning, match="training ended before"),
        pytest.raises(NumericalError, match=rf"{DOWN}: {name} has 1 of {buffer.numel()} non-finite values.*Lower"),
    ):
        model.merge_and_unload()
    found = tensors(model)
    assert found.keys() == before.keys()
    torch.testing.assert_close(found, before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(logits(model), expected)
    buffer.copy_(whole)
    with pytest.warns(UserWarning, match="training ended before"):
        assert parameter_report(model.merge_and_unload()).param_ratio <= 0.6


@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("compressed", [True, False])
def test_non_finite_bypass_loses_nothing(compensation: str, compressed: bool, tmp_path: Path) -> None:
    model = stopped(tmp_path, compensation=compensation, r=2, warmup=1 if compressed else 8)
    weight = model.get_submodule(f"base_model.model.{UP}").adapter("default").B.data
    whole = weight.clone()
    weight[0, 0] = math.nan
    before = tensors(model)
    with pytest.raises(NumericalError, match=f"{UP}: the LoRA bypass has non-finite values"):
        model.merge_and_unload()
    torch.testing.assert_close(tensors(model), before, rtol=0, atol=0, equal_nan=True)
    weight.copy_(whole)
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("importance", ["lora", "kronecker", "none"])
@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_non_finite_loss_names_module_and_step(importance: str, scale: float) -> None:
    model = wrap(importance=importance, total_steps=20)
    backward(model).base_model.update_and_allocate(0)
    model.zero_grad()
    with pytest.raises(
        NumericalError, match=r"model\.layers\.\d\.\S+: the gradient .* not finite at step 1; .*Lower the"
    ):
        backward(model, scale).base_model.update_and_allocate(1)


def test_first_step_without_any_gradient_is_no_error() -> None:
    """Saturated layers, or labels that are all ignored in a loss that is zero then: the next step is observed."""
    model = wrap(total_steps=20)
    backward(model, 0.0).base_model.update_and_allocate(0)
    model.zero_grad()
    backward(model).base_model.update_and_allocate(1)
    model.base_model.set_param_ratio(0.6)
    assert parameter_report(model.merge_and_unload()).param_ratio <= 0.6


def test_non_finite_statistic_of_a_step_names_the_module() -> None:
    model = wrap(total_steps=20, importance="lora_diagonal")
    backward(model)
    model.get_submodule(f"base_model.model.{DOWN}").adapter("default").observer["input_gram"][0, 0] = math.nan
    with pytest.raises(NumericalError, match=rf"^{DOWN}: metric has \d+ of 16 non-finite values"):
        model.base_model.update_and_allocate(0)


def test_non_finite_loss_stops_a_trainer(tmp_path: Path) -> None:
    model = wrap()
    trainer = make_trainer(model, tmp_path, steps=8)
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (
        compute_loss(*args, **kwargs) * (math.nan if trainer.state.global_step == 2 else 1)
    )
    with pytest.raises(NumericalError, match="not finite at step 2"):
        trainer.train()


@pytest.mark.parametrize("schedule", [{"warmup": 8}, {"warmup": 2, "compression": 6, "compression_interval": 2}])
def test_training_that_ends_early_is_finished_with_one_warning(schedule: dict[str, int], tmp_path: Path) -> None:
    model = stopped(tmp_path, **schedule)
    with pytest.warns(UserWarning, match=r"compressing to param_ratio=0\.6 now") as caught:
        compact = model.merge_and_unload()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert 0.59 < parameter_report(compact).param_ratio <= 0.6


def test_finished_training_does_not_warn(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    trained(tmp_path, warmup=2, compression=2).merge_and_unload()
    assert not [warning for warning in recwarn if "lora_svd" in warning.filename or "compress" in str(warning.message)]


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ({"warmup": 4, "compression": 3}, r"warmup and compression: 4 and 3 are 4 \+ 3 steps, but the run has only 5"),
        ({"warmup": 0.9, "compression": 0.9}, r"warmup and compression: 0\.9 and 0\.9"),
    ],
)
def test_schedule_that_does_not_fit_fails_before_the_first_step(
    schedule: dict[str, float], says: str, tmp_path: Path
) -> None:
    trainer = make_trainer(wrap(**schedule), tmp_path)
    with pytest.raises(LoraSVDError, match=says):
        trainer.train()
    assert trainer.state.global_step == 0


def test_hand_written_loop_without_its_length() -> None:
    with pytest.raises(LoraSVDError, match="total_steps: got None, expected the number of optimizer steps"):
        backward(wrap()).base_model.update_and_allocate(0)


def test_update_in_the_wrong_place() -> None:
    with pytest.raises(
        LoraSVDError, match=r"update_and_allocate\(7\): no bypass has a gradient.* after loss\.backward"
    ):
        wrap(total_steps=10).base_model.update_and_allocate(7)


def test_trainer_whose_model_is_not_ours(tmp_path: Path) -> None:
    trainer = make_trainer(LLAMA.build(), tmp_path, callbacks=[LoraSVDCallback()])
    with pytest.raises(LoraSVDError, match="LoraSVDCallback: LlamaForCausalLM has no LoraSVD adapter; make it with"):
        trainer.train()


@pytest.mark.parametrize("value", [0, 1.5, math.nan, True, None, "0.5"])
def test_set_param_ratio_out_of_range(value: Any, tmp_path: Path) -> None:
    model = trained(tmp_path)
    before = tensors(model)
    with pytest.raises(LoraSVDError, match=rf"param_ratio: got {value!r}, expected a number in \(0, 1\]"):
        model.base_model.set_param_ratio(value)
    assert_bit_equal(tensors(model), before)
