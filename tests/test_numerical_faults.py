"""Steps, batches, layers and weights that are out of the ordinary: handled, or reported with the module's name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LLAMA, TIED, assert_bit_equal, logits, make_trainer, settings, tensors, wrap
from peft import PeftModel, get_peft_model
from reference import relative_error
from torch import Tensor, nn
from transformers import Trainer

from lora_svd import LoraSVDError, NumericalError
from lora_svd.compact import parameter_report
from lora_svd.importance import IMPORTANCES
from lora_svd.tuner.layer import LoraSVDLinear

UP = "model.layers.0.mlp.up_proj"
ALL = sorted(IMPORTANCES.keys() - {"none"})


def backward(model: PeftModel, scale: float = 1.0) -> None:
    model.zero_grad()
    (model(**LLAMA.inputs()).loss * scale).backward()


def statistics(model: PeftModel) -> dict[str, Tensor]:
    found = {name: tensor for name, tensor in tensors(model).items() if "lora_svd_" in name}
    return {name: tensor for name, tensor in found.items() if not name.endswith((".A", ".B"))}


@pytest.mark.parametrize("importance", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_step_that_failed_can_be_dropped(importance: str, bad: float) -> None:
    """The statistics are those of a run that did not have it; the first step is the worst one to fail."""
    model, expected = (wrap(importance=importance, total_steps=20).train() for _ in range(2))
    for step, scale in enumerate([bad, 1.0, bad, 0.5]):
        backward(model, scale)
        if not math.isfinite(scale):
            with pytest.raises(NumericalError, match=rf"layers\.\d\.\S+: the gradient .* not finite at step {step}"):
                model.base_model.update_and_allocate(step)
            continue
        model.base_model.update_and_allocate(step)
        backward(expected, scale)
        expected.base_model.update_and_allocate(step)
    assert_bit_equal(statistics(model), statistics(expected))
    assert parameter_report(finish(model)).param_ratio <= 0.6


def finish(model: PeftModel) -> nn.Module:
    with pytest.warns(UserWarning, match="training ended before the schedule did"):
        return model.merge_and_unload()


def scaled_trainer(model: PeftModel, folder: Path, overflow: set[int], **arguments: Any) -> Trainer:
    """A run with the gradient scaler of float16, which accelerate makes for accelerators only, and overflows."""
    trainer = make_trainer(model, folder, steps=8, **arguments)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.accelerator.native_amp = True
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (
        compute_loss(*args, **kwargs) * (math.inf if trainer.state.global_step in overflow else 1)
    )
    return trainer


@pytest.mark.parametrize("importance", ["lora_activation", "kronecker"])
@pytest.mark.parametrize("train_factors", [False, True])
def test_overflow_that_the_scaler_skips(importance: str, train_factors: bool, tmp_path: Path) -> None:
    """In observation, at the factorization (before step 3) and in the recovery."""
    model = wrap(importance=importance, train_factors=train_factors, warmup=4)
    trainer = scaled_trainer(model, tmp_path, {0, 3, 6})
    with pytest.warns(
        UserWarning, match=r"not finite at step \d, which the gradient scaler skips; .*not obs"
    ) as caught:
        trainer.train()
    said = [str(warning.message) for warning in caught if "the gradient scaler skips" in str(warning.message)]
    assert [step for step in range(8) if any(f"at step {step}," in line for line in said)] == [0, 3, 6]
    counts = model.get_submodule(f"base_model.model.{UP}").adapter("default").observer["counts"]
    assert int(counts[2]) == 2  # of four steps in the warm-up
    assert trainer.accelerator.scaler.get_scale() == 1024 / 8
    assert all(tensor.isfinite().all() for tensor in tensors(model).values())
    assert parameter_report(model.merge_and_unload()).param_ratio <= 0.6


@pytest.mark.parametrize(
    ("importance", "statistic"), [("lora_activation", "signed_output_gram"), ("kronecker", "output_gram")]
)
def test_scaled_losses_are_observed_like_others(importance: str, statistic: str, tmp_path: Path) -> None:
    """However the scale changes: here it grows with every other step."""
    plain, scaled = (wrap(importance=importance, warmup=8) for _ in range(2))
    make_trainer(plain, tmp_path / "plain", steps=8).train()
    trainer = scaled_trainer(scaled, tmp_path / "scaled", set())
    trainer.accelerator.scaler.set_growth_interval(2)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 1024 * 2**4
    found, expected = (
        model.get_submodule(f"base_model.model.{UP}").statistics("default").mean(statistic) for model in (scaled, plain)
    )
    assert relative_error(found, expected) < 0.1


def test_layer_that_is_called_with_a_single_token() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), settings(target_modules=["0"], total_steps=9))
    model(torch.randn(6)).square().sum().backward()
    model.base_model.update_and_allocate(0)
    assert model.base_model.model[0].adapter("default").observer["counts"].tolist() == [1, 1, 1]


@TIED
def test_overflow_in_a_tied_head(tmp_path: Path) -> None:
    model = wrap(warmup=4, target_modules=["embed_tokens"])
    with pytest.warns(UserWarning, match="not finite at step 0, which the gradient scaler skips"):
        scaled_trainer(model, tmp_path, {0}).train()
    assert all(tensor.isfinite().all() for tensor in tensors(model).values())
    assert parameter_report(model.merge_and_unload()).param_ratio <= 0.6


def test_overflow_in_every_observed_step_is_an_error(tmp_path: Path) -> None:
    trainer = scaled_trainer(wrap(warmup=2), tmp_path, {0, 1})
    with (
        pytest.warns(UserWarning, match="the step is not observed"),
        pytest.raises(LoraSVDError, match=r"nothing was observed for importance='lora_activation'"),
    ):
        trainer.train()


def ignored(rows: list[dict[str, Tensor]], which: range) -> list[dict[str, Tensor]]:
    return [
        {**row, "labels": torch.full_like(row["labels"], -100)} if i in which else row for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("distillation", [0.0, 0.5])
@pytest.mark.parametrize(("accumulate", "empty"), [(1, [2]), (1, [0, 4]), (2, [1, 6])])
def test_batch_of_nothing_but_padding(distillation: float, accumulate: int, empty: list[int], tmp_path: Path) -> None:
    """Its loss is 0 / 0, but its gradients are zero: it is not observed, in whatever phase, and changes nothing."""
    model = wrap(distillation=distillation, warmup=3, importance="kronecker")
    options = {"gradient_accumulation_steps": accumulate, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(model, tmp_path, steps=5 if accumulate == 1 else 4, **options)
    data, labels = LLAMA.data(), torch.full((8,), -100)
    trainer.train_dataset = [{**row, "labels": labels} if i // 2 in empty else row for i, row in enumerate(data)]
    trainer.train()
    seen = 3 * accumulate - sum(batch < 3 * accumulate for batch in empty)
    counts = model.get_submodule(f"base_model.model.{UP}").adapter("default").observer["counts"]
    assert counts.tolist() == [seen * 2 * 7, seen * 2, 3]  # batches of two samples of seven labels
    assert all(tensor.isfinite().all() for tensor in tensors(model).values())
    assert parameter_report(model.merge_and_unload()).param_ratio <= 0.6


@pytest.mark.parametrize("importance", ALL)
def test_first_step_without_any_gradient(importance: str) -> None:
    """A loss that no token has a part in is not the same as none: gradients are there, and zero."""
    model = wrap(importance=importance, total_steps=20).train()
    for step, scale in enumerate([0.0, 1.0]):
        backward(model, scale)
        model.base_model.update_and_allocate(step)
    assert all(tensor.isfinite().all() for tensor in statistics(model).values())
    assert parameter_report(finish(model)).param_ratio <= 0.6


class Unused(nn.Module):
    """Two layers of which only the first has a part in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("importance", ALL)
def test_layer_without_a_gradient_is_refused_in_the_first_step(importance: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Unused(), settings(importance=importance, target_modules=["used", "unused"], total_steps=4))
    before = tensors(model)
    model(torch.randn(4, 8)).square().sum().backward()
    says = r"^target_modules: unused had no part in the loss of the first steps .* exclude_modules=\['unused'\]"
    with pytest.raises(LoraSVDError, match=says):
        model.base_model.update_and_allocate(0)
    assert all(torch.equal(tensors(model)[name], tensor) for name, tensor in before.items())
    without = settings(
        importance=importance, target_modules=["used", "unused"], exclude_modules=["unused"], total_steps=4
    )
    model = get_peft_model(Unused(), without)
    model(torch.randn(4, 8)).square().sum().backward()
    model.base_model.update_and_allocate(0)
    assert isinstance(finish(model).unused, nn.Linear)


def test_layer_without_a_gradient_is_named_where_nothing_is_measured() -> None:
    model = get_peft_model(Unused(), settings(importance="none", target_modules=["used", "unused"], total_steps=4))
    model(torch.randn(4, 8)).square().sum().backward()
    with pytest.warns(UserWarning, match=r"^unused had no part in the loss .* exclude_modules=\['unused'\]"):
        model.base_model.update_and_allocate(0)
    assert parameter_report(finish(model)).param_ratio <= 0.6


class Experts(nn.Module):
    """Two layers, of which the second is called with those rows of the input that are positive, if there are any."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.some = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 0
        return self.all(x).index_add(0, chosen.nonzero()[:, 0], self.some(x[chosen]))


@pytest.mark.parametrize("importance", [name for name in ALL if name not in {"lora", "lora_minnorm"}])
def test_expert_without_tokens_in_a_batch(importance: str) -> None:
    """What the batch shows of it is nothing, and no error."""
    torch.manual_seed(0)
    model = get_peft_model(Experts(), settings(importance=importance, target_modules=["all", "some"], total_steps=9))
    for step, sign in enumerate((1, -1)):
        x = torch.randn(4, 8)
        x[:, 0] = sign
        model.zero_grad()
        model(x).square().sum().backward()
        model.base_model.update_and_allocate(step)
    counts = {
        name: layer.adapter("default").observer["counts"].tolist()
        for name, layer in model.base_model.model.named_children()
    }
    assert counts == {"all": [8, 8, 2], "some": [4, 4, 2]}
    assert all(tensor.isfinite().all() for tensor in statistics(model).values())
    assert isinstance(finish(model).all, nn.Module)


class Net(nn.Module):
    """Two linear layers whose weights and inputs can be chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def low_rank(weight: Tensor, rank: int) -> None:
    left, values, right = torch.linalg.svd(weight.data, full_matrices=False)
    weight.data = left[:, :rank] * values[:rank] @ right[:rank]


def observed(importance: str, prepare: Callable[[Net], object], x: Tensor, **changes: Any) -> tuple[Net, PeftModel]:
    """A network and the same with an adapter that has seen inputs twice; its bypass is still zero."""
    torch.manual_seed(1)
    net = Net()
    with torch.no_grad():
        prepare(net)
    before = Net()
    before.load_state_dict(net.state_dict())
    chosen = {"target_modules": ["first", "second"], "total_steps": 20, "importance": importance, **changes}
    model = get_peft_model(net, settings(**chosen))
    for step in range(2):
        model.zero_grad()
        model(x).square().mean().backward()
        model.base_model.update_and_allocate(step)
    return before, model


PRESETS = ["lora_activation", "kronecker", "activation", "none"]


@pytest.mark.parametrize("importance", PRESETS)
@pytest.mark.parametrize("factor_format", ["pivoted", "factors"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_weights_of_exactly_low_rank_are_kept_exactly(importance: str, factor_format: str, rank: int) -> None:
    """Zero weights among them."""
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(2))
    before, model = observed(
        importance, lambda net: (low_rank(net.first.weight, rank), low_rank(net.second.weight, max(rank, 1))), x,
        factor_format=factor_format, param_ratio=0.6,
    )  # fmt: skip
    compact = finish(model)
    assert all(tensor.isfinite().all() for tensor in tensors(compact).values())
    torch.testing.assert_close(compact(x), before(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("importance", PRESETS)
@pytest.mark.parametrize("kind", ["dead feature", "constant activation", "zero input"])
def test_inputs_without_variety(importance: str, kind: str) -> None:
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(2))
    if kind == "dead feature":
        x[:, 3] = 0
    elif kind == "constant activation":
        x[:] = x[0]
    before, model = observed(importance, lambda net: net.first.weight.zero_() if kind == "zero input" else None, x)
    compact = finish(model)
    assert all(tensor.isfinite().all() for tensor in tensors(compact).values())
    assert parameter_report(compact).param_ratio <= 0.6
    distance = (compact(x) - before(x)).norm() / before(x).norm()
    assert distance < (1e-2 if kind == "constant activation" and importance != "none" else 0.9)


def test_input_that_is_always_zero_is_named() -> None:
    x = torch.zeros(8, 12)
    _, model = observed("activation", lambda net: net.first.bias.fill_(1.0), x)
    with pytest.warns(UserWarning, match="first: input_gram was zero in every observed step"):
        finish(model)


def test_llama_with_a_zero_layer(tmp_path: Path) -> None:
    base = LLAMA.build()
    with torch.no_grad():
        base.get_submodule(UP).weight.zero_()
        low_rank(base.get_submodule("model.layers.1.mlp.gate_proj").weight, 2)
    model = get_peft_model(base, settings(param_ratio=0.6))
    make_trainer(model, tmp_path).train()
    compact = model.merge_and_unload()
    assert torch.isfinite(logits(compact)).all()
    assert parameter_report(compact).param_ratio <= 0.6
    assert not any(isinstance(module, LoraSVDLinear) for module in compact.modules())
