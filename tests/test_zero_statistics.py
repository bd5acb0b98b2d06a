"""What was never seen to matter costs nothing: the least rank, named, and factors that are sound all the same."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import settings
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from lora_svd.allocation import LayerShape
from lora_svd.compact import parameter_report
from lora_svd.compact.rounding import refit_left, round_weight
from lora_svd.compression import choose_size, compute_spectra, factorize, size_choices
from lora_svd.errors import NumericalWarning
from lora_svd.importance import IMPORTANCES
from lora_svd.inputs import CompressionSettings, LayerInput, units_of
from lora_svd.statistics import STATISTICS, LayerStatistics

LAYERS, DEAD, SIZE = 7, 3, 48
COUNTS = {"token": 10, "sample": 4, "step": 2}


class Parallel(nn.Module):
    """Equal layers of one input, of which one has a part in the loss that is too small for its square."""

    def __init__(self, dead: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS))
        self.shares = [dead if index == DEAD else 1.0 for index in range(LAYERS)]

    def forward(self, x: Tensor) -> Tensor:
        return sum(share * layer(x) for share, layer in zip(self.shares, self.layers, strict=True))


def observed(importance: str, dead: float, **changes: object) -> PeftModel:
    torch.manual_seed(0)
    targets = [f"layers.{index}" for index in range(LAYERS)]
    chosen = {"target_modules": targets, "importance": importance, "param_ratio": 0.5, "total_steps": 10, **changes}
    model = get_peft_model(Parallel(dead), settings(**chosen))
    for step in range(2):
        model.zero_grad()
        model(torch.randn(8, 32, SIZE)).square().mean().backward()
        model.base_model.update_and_allocate(step)
    return model


OF_GRADIENTS = [name for name in IMPORTANCES if name not in {"none", "activation", "activation_scale"}]


@pytest.mark.parametrize("importance", OF_GRADIENTS)
def test_layer_without_gradients_gets_the_least_rank(importance: str) -> None:
    model = observed(importance, 1e-30)
    with pytest.warns(NumericalWarning, match=r"^layers\.3: \w+ was zero in every observed step, .*the least rank"):
        model.base_model.set_param_ratio(0.5)
    ranks = dict(model.peft_config["default"].compact_ranks)
    assert ranks.pop(f"layers.{DEAD}") == 1
    assert min(ranks.values()) >= SIZE // 4
    for adapter in model.base_model.run().adapters().values():
        nn.init.normal_(adapter.B, std=0.1)
    with pytest.warns(NumericalWarning, match=r"^layers\.3: "):
        compact = model.merge_and_unload()  # absorbs the bypass in the metrics
    assert all(tensor.isfinite().all() for tensor in compact.state_dict().values())
    assert 0.49 < parameter_report(compact).param_ratio <= 0.5


def test_gradient_of_exactly_zero_under_a_preset_of_steps() -> None:
    """LoRA's gradients are there, and zero: such a layer is observed, step by step."""
    model = observed("lora", 0.0)
    with pytest.warns(NumericalWarning, match=r"^layers\.3: lora_rows was zero"):
        model.base_model.set_param_ratio(0.5)
    assert model.peft_config["default"].compact_ranks[f"layers.{DEAD}"] == 1


def test_uniform_ranks_are_the_share_of_each_and_the_dead_layer_keeps_its_weight() -> None:
    """As good as plain SVD can: no direction of the outputs is better than another, but those of the inputs are."""
    model = observed("kronecker", 1e-30, allocation="uniform")
    with pytest.warns(NumericalWarning, match=r"^layers\.3: output_gram was zero"):
        model.base_model.set_param_ratio(0.5)
    ranks = dict(model.peft_config["default"].compact_ranks)
    assert len(set(ranks.values())) == 1
    layer = model.base_model.model.layers[DEAD]
    weight = layer.base_layer.weight.detach()
    error = (layer.factors("default").product() - weight).norm() / weight.norm()
    tail = torch.linalg.svdvals(weight)[ranks[f"layers.{DEAD}"] :].norm() / weight.norm()
    assert error < 1.2 * tail


def layer(dead: str, form: str) -> LayerInput:
    """A layer of which a statistic, or a part of it, is zero."""
    generator = torch.Generator().manual_seed(1)
    sums = {}
    for name, statistic in STATISTICS.items():
        shape = statistic.shape(12, 8)
        rows = torch.rand(20, shape[-1], generator=generator)
        rows[:, : 5 if form == "partly" else 0] = 0
        total = rows.T @ rows if statistic.gram else rows[0].expand(shape).clone()
        sums[name] = torch.zeros(shape) if form == "whole" and name == dead else total
    weight = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    return LayerInput(LayerShape(12, 8), lambda: weight, lambda: LayerStatistics(sums, COUNTS))


def chosen(importance: str, decomposition: str = "svd", **changes: float) -> CompressionSettings:
    form = "elementwise" if IMPORTANCES[importance].elementwise else decomposition
    shrinkage = {"row_shrinkage": 1e-2, "correlation_shrinkage": 0.3, "column_shrinkage": 1e-2, **changes}
    return CompressionSettings(importance, "global", form, "factors", 1, **shrinkage)


CASES = [(name, read) for name, preset in IMPORTANCES.items() for read in preset.statistics]


@pytest.mark.parametrize("decomposition", ["svd", "kronecker"])
@pytest.mark.parametrize(("importance", "dead"), CASES)
def test_every_statistic_may_be_zero(importance: str, dead: str, decomposition: str) -> None:
    """Rows, columns and elements: no cost, and at any rank factors that are finite and exact at the full one."""
    settings, layers = chosen(importance, decomposition), {"block.up": layer(dead, "whole")}
    with pytest.warns(NumericalWarning, match=f"^block.up: {dead} was zero in every observed step"):
        assert not compute_spectra(layers, settings)["block.up"].any()
    for rank in (1, 7):
        with pytest.warns(NumericalWarning, match="^block.up: "):
            ((_, factors),) = factorize(layers, {"block.up": rank}, settings)
        product = factors.product()
        assert product.isfinite().all()
        assert rank < 7 or (product - layers["block.up"].weight()).norm() < 0.5 * layers["block.up"].weight().norm()


@pytest.mark.parametrize(("importance", "dead"), CASES)
def test_a_statistic_that_is_zero_in_part_is_no_zero_statistic(importance: str, dead: str) -> None:
    settings, layers = chosen(importance), {"block.up": layer(dead, "partly")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectrum = compute_spectra(layers, settings)["block.up"]
        ((_, factors),) = factorize(layers, {"block.up": 5}, settings)
    assert spectrum[0] > 0
    assert factors.product().isfinite().all()


def test_all_layers_dead_gives_all_the_least_rank() -> None:
    settings, layers = chosen("kronecker"), {f"block.{i}": layer("output_gram", "whole") for i in range(3)}
    with pytest.warns(NumericalWarning, match=r"^block\.\d: "):
        choices = dict(size_choices(units_of(layers, {}), {}, settings))
    assert set(choose_size(choices, 0.9, settings).ranks.values()) == {1}


def test_rounding_in_a_metric_that_is_zero_is_rounding_to_nearest() -> None:
    weight, levels = torch.randn(4, 6, dtype=torch.float64), torch.linspace(-1, 1, 5, dtype=torch.float64)
    scale = weight.abs().max().expand_as(weight)
    zero = torch.zeros(6, 6, dtype=torch.float64)
    assert torch.equal(round_weight(weight, scale, levels, zero), round_weight(weight, scale, levels))
    assert not refit_left(weight, torch.eye(6), torch.zeros(6, 6)).any()
