"""Statistics, an importance, an allocation and a decomposition from outside: a function and a record each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import LLAMA, assert_kept, logits, make_trainer, settings, tensors
from peft import PeftModel, get_peft_model
from reference import relative_error
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lora_svd import LoraSVDError
from lora_svd.allocation import ALLOCATIONS
from lora_svd.decompositions import DECOMPOSITIONS, Decomposition, Factors
from lora_svd.importance import IMPORTANCES, Importance
from lora_svd.linalg import Metrics
from lora_svd.statistics import STATISTICS, LayerStatistics, statistic

REGISTRIES = (STATISTICS, IMPORTANCES, ALLOCATIONS, DECOMPOSITIONS)


@pytest.fixture(autouse=True)
def extended() -> Iterator[None]:
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


def register() -> dict[str, str]:
    """One of each; what a config says to use them."""

    @statistic("output_abs", side="rows", per="token")
    def output_abs(seen) -> Tensor:
        return seen.g.abs().sum((0, 1))

    @statistic("costly_input_gram", side="columns", per="token", needs={"gradients"}, gram=True)
    def costly_input_gram(seen, rank: int | None) -> Tensor:
        rows = (seen.x * seen.g.norm(dim=-1, keepdim=True)).flatten(0, 1)
        assert rank is None
        return rows.T @ rows

    @statistic("step_rows", side="rows", per="step", needs={"weight", "input_gram"})
    def step_rows(step) -> Tensor:
        return step.weight.abs().sum(1) * step.input_sketch.trace().float()

    def costly(seen: LayerStatistics) -> Metrics:
        return Metrics(seen.mean("output_abs") * (1 + seen.mean("step_rows")), seen.mean("costly_input_gram"))

    def cheapest_first(options, shapes, param_ratio: float) -> dict[str, int]:
        """The same index for all layers, the largest for which there is room."""
        budget = param_ratio * sum(shape.parameters for shape in shapes.values())
        fits = [
            index
            for index in range(min(len(option.ranks) for option in options.values()))
            if sum(option.costs[index] for option in options.values()) <= budget
        ]
        return dict.fromkeys(options, max(fits))

    def leading_rows(weight: Tensor, metrics: Metrics, rank: int) -> Factors:
        """The rows that cost most, and the others as their combinations."""
        rows = weight[(metrics.row * weight.square().sum(1)).argsort(descending=True)[:rank]]
        return Factors(torch.linalg.lstsq(rows.T, weight.T).solution.T, rows)

    IMPORTANCES["costly"] = Importance(("output_abs", "costly_input_gram", "step_rows"), costly)
    ALLOCATIONS["cheapest_first"] = cheapest_first
    DECOMPOSITIONS["leading_rows"] = Decomposition(DECOMPOSITIONS["svd"].spectrum, leading_rows)
    return {"importance": "costly", "allocation": "cheapest_first", "decomposition": "leading_rows"}


def test_one_of_each_from_outside(tmp_path: Path) -> None:
    """Through training, merge, saving and loading; the compact model knows nothing of the registries."""
    model = get_peft_model(LLAMA.build(), settings(warmup=2, **register()))
    make_trainer(model, tmp_path, steps=4).train()
    ranks = model.peft_config["default"].compact_ranks
    assert min(ranks.values()) == max(ranks.values())  # no full rank has the same index in layers of all shapes
    compact = model.merge_and_unload()
    assert_kept(compact, 0.6)
    expected = logits(compact)
    compact.save_pretrained(tmp_path / "compact")
    for registry in REGISTRIES:
        registry.clear()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "compact")), expected)


def test_statistics_from_outside_are_sums_over_tokens_that_are_saved(tmp_path: Path) -> None:
    """With the adapter; also of a layer that was there before the statistic was."""
    plain = {"target_modules": ["0"], "param_ratio": 0.9, "total_steps": 9}
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), settings(**plain))
    model.add_adapter("new", settings(**plain, **register()))
    model.set_adapter("new")
    x, g = torch.randn(3, 4, 6), torch.randn(3, 4, 5)
    (model(x) * g).sum().backward()
    model.base_model.update_and_allocate(0)
    seen = model.base_model.model[0].statistics("new")
    rows = x.double().flatten(0, 1) * g.double().flatten(0, 1).norm(dim=1, keepdim=True)
    assert relative_error(seen.total("output_abs"), g.abs().sum((0, 1))) < 1e-6
    assert relative_error(seen.mean("costly_input_gram"), rows.T @ rows / 12) < 1e-6
    A = model.base_model.model[0].adapter("new").A.detach().double()
    through = (A @ x.double().flatten(0, 1).T).square().sum() / 12
    weight = model.base_model.model[0].base_layer.weight.double()
    assert relative_error(seen.mean("step_rows"), weight.abs().sum(1) * through) < 1e-6
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = PeftModel.from_pretrained(nn.Sequential(nn.Linear(6, 5)), tmp_path / "new", is_trainable=True)
    found = {name: tensor for name, tensor in tensors(loaded).items() if "output_abs" in name or "costly" in name}
    assert len(found) == 2
    for name, tensor in found.items():
        assert torch.equal(tensor, tensors(model)[name.replace(".default", ".new")])
    model.set_adapter("default")
    model.delete_adapter("new")
    assert not any("costly" in name for name in model.state_dict())


def test_records_that_do_not_fit_are_refused() -> None:
    register()
    with pytest.raises(LoraSVDError, match="importance: unknown statistic 'output_absolute', expected some of"):
        Importance(("output_absolute",), lambda _: Metrics())
    for choices, message in (
        ({"name": "output_abs"}, "'output_abs' is registered already"),
        ({"side": "outputs"}, r"got side='outputs', expected one of \('rows', 'columns', 'elements'\)"),
        ({"per": "batch"}, r"got per='batch', expected one of \('token', 'sample', 'step'\)"),
        ({"side": "elements", "gram": True}, "got gram=True, expected a sum over tokens or samples, of rows or"),
    ):
        with pytest.raises(LoraSVDError, match=message):
            statistic(**{"name": "other", "side": "rows", "per": "token", **choices})
