"""The pipeline on values: each stage against its dense reference, and errors that name module and statistic."""

import pytest
import reference
import torch

from lora_svd.allocation import LayerShape
from lora_svd.compression import absorb, choose_size, compute_spectra, factorize, size_choices
from lora_svd.decompositions import Factors
from lora_svd.errors import LoraSVDError, NumericalError
from lora_svd.importance import IMPORTANCES
from lora_svd.inputs import CompressionSettings, LayerInput, layer_metrics, units_of
from lora_svd.statistics import STATISTICS, LayerStatistics

COUNTS = {"token": 30, "sample": 6, "step": 3}
SHAPES = {"block.0.up": (12, 8), "block.0.down": (8, 12), "block.1.up": (12, 8)}


def settings(importance="kronecker", **changes):
    form = "elementwise" if IMPORTANCES[importance].elementwise else "svd"
    chosen = {"allocation": "global", "decomposition": form, "factor_format": "pivoted", "rank_multiple": 1}
    return CompressionSettings(
        **{
            "importance": importance,
            "row_shrinkage": 0.0,
            "correlation_shrinkage": 0.0,
            "column_shrinkage": 0.0,
            **chosen,
            **changes,
        }
    )


def observed(m, n, scale=1.0):
    """Sums as tokens make them: the square ones are Grams of more tokens than features."""
    sums = {}
    for name, statistic in STATISTICS.items():
        shape = statistic.shape(m, n)
        tokens = torch.randn(30, shape[0]) * (1 + torch.arange(shape[0]))
        sums[name] = scale * (tokens.T @ tokens if len(shape) == 2 else tokens.square().sum(0))
        if name == "weight_gradient_square":
            sums[name] = scale * torch.randn(shape).square()
    return LayerStatistics(sums, COUNTS)


def layer(m, n, seen=None, weight=None):
    weight = torch.randn(m, n, dtype=torch.float64) if weight is None else weight
    seen = observed(m, n) if seen is None else seen
    return LayerInput(shape=LayerShape(m, n), weight=lambda: weight, statistics=lambda: seen)


@pytest.fixture
def layers():
    return {name: layer(m, n, observed(m, n, 10.0**i)) for i, (name, (m, n)) in enumerate(SHAPES.items())}


@pytest.mark.parametrize("importance", [name for name, preset in IMPORTANCES.items() if not preset.elementwise])
def test_spectra_and_factors_of_every_preset_are_those_of_its_metrics(layers, importance):
    chosen = settings(importance)
    spectra, factors = compute_spectra(layers, chosen), dict(factorize(layers, dict.fromkeys(layers, 3), chosen))
    for name, given in layers.items():
        metrics = layer_metrics(name, given, chosen)
        arguments = (given.weight(), metrics.row, metrics.column)
        assert reference.relative_error(spectra[name], reference.spectrum(*arguments)) < 1e-9
        assert reference.relative_error(factors[name].product(), reference.truncate(*arguments, 3)) < 1e-6


def test_metrics_are_shrunk_towards_their_mean(layers):
    name, given = next(iter(layers.items()))
    chosen = settings(row_shrinkage=0.25, correlation_shrinkage=0.4, column_shrinkage=0.5)
    metrics = layer_metrics(name, given, chosen)
    seen = given.statistics()
    row, column = seen.total("output_gram"), seen.mean("input_gram")
    for found, metric, amount, correlation in ((metrics.row, row, 0.25, 0.4), (metrics.column, column, 0.5, 0.0)):
        kept = (1 - correlation) * metric + correlation * torch.diag(metric.diagonal())
        expected = (1 - amount) * kept + amount * metric.diagonal().mean() * torch.eye(len(metric), dtype=torch.float64)
        assert reference.relative_error(found, expected) < 1e-12


def test_global_ranks_follow_the_loss_and_dense_layers_have_no_factors():
    """The layer whose error costs a million times as much stays dense; the others pay for it."""
    layers = {"dear": layer(8, 8, observed(8, 8, 1e3)), "cheap": layer(8, 8), "cheaper": layer(8, 8)}
    ranks = choose_size(dict(size_choices(units_of(layers, {}), {}, settings())), 0.7, settings()).ranks
    assert ranks["dear"] == 8 > ranks["cheap"]
    factors = dict(factorize(layers, ranks, settings()))
    assert factors["dear"] is None
    assert factors["cheap"].rank == ranks["cheap"]


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)], ids=str)
def test_absorbed_bypass_is_the_truncation_of_the_sum(shape):
    given, chosen = layer(*shape), settings()
    metrics = layer_metrics("up", given, chosen)
    factors = dict(factorize({"up": given}, {"up": 4}, chosen))["up"]
    bypass = Factors(0.1 * torch.randn(shape[0], 2), torch.randn(2, shape[1]))
    absorbed = absorb("up", given, factors, bypass, chosen)
    total = factors.product() + bypass.product()
    assert absorbed.rank == 4
    assert (
        reference.relative_error(absorbed.product(), reference.truncate(total, metrics.row, metrics.column, 4)) < 1e-6
    )
    assert reference.loss(total - absorbed.product(), metrics.row, metrics.column) < reference.loss(
        total - factors.product(), metrics.row, metrics.column
    )


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)], ids=str)
def test_nothing_to_absorb_changes_nothing(shape):
    given, chosen = layer(*shape), settings()
    factors = dict(factorize({"down": given}, {"down": 3}, chosen))["down"]
    absorbed = absorb("down", given, factors, Factors(torch.zeros(shape[0], 2), torch.randn(2, shape[1])), chosen)
    assert reference.relative_error(absorbed.product(), factors.product()) < 1e-9


# -- bad input ---------------------------------------------------------------------------------------------------------

NEEDY = [name for name, preset in IMPORTANCES.items() if preset.statistics]


@pytest.mark.parametrize("importance", NEEDY)
def test_nothing_observed_names_module_preset_and_statistic(importance):
    nothing = layer(8, 12, LayerStatistics({}, dict.fromkeys(COUNTS, 0)))
    statistic = IMPORTANCES[importance].statistics[0]
    message = rf"block.down: nothing was observed for importance='{importance}' \({statistic} is missing\)"
    with pytest.raises(LoraSVDError, match=message):
        compute_spectra({"block.down": nothing}, settings(importance))


@pytest.mark.parametrize("importance", NEEDY)
def test_statistic_that_saw_nothing_is_an_error_that_says_so(importance):
    """A layer whose output never had a gradient, next to layers that did: sums and counts are zero."""
    statistic = IMPORTANCES[importance].statistics[0]
    unit = STATISTICS[statistic].per
    empty = {name: torch.zeros(STATISTICS[name].shape(8, 12)) for name in IMPORTANCES[importance].statistics}
    silent = layer(8, 12, LayerStatistics(empty, {**COUNTS, unit: 0}))
    with pytest.raises(LoraSVDError, match=rf"block.down: nothing was observed for importance='{importance}'"):
        compute_spectra({"block.down": silent}, settings(importance))


def test_plain_svd_needs_no_observation():
    nothing = layer(8, 12, LayerStatistics({}, dict.fromkeys(COUNTS, 0)))
    spectrum = compute_spectra({"down": nothing}, settings("none"))["down"]
    assert reference.relative_error(spectrum, torch.linalg.svdvals(nothing.weight()).square()) < 1e-10


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("importance", NEEDY)
def test_non_finite_statistic_names_module_and_statistic(importance, bad):
    for statistic in IMPORTANCES[importance].statistics:
        seen = observed(8, 12)
        seen.sums[statistic].view(-1)[:2] = bad
        size = seen.sums[statistic].numel()
        with pytest.raises(NumericalError, match=rf"block.down: {statistic} has 2 of {size} non-finite values"):
            compute_spectra({"block.down": layer(8, 12, seen)}, settings(importance))


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)], ids=str)
def test_indefinite_metric_names_the_module(shape):
    """Whichever metric needs a root; the healthy layer before it does not hide it."""
    seen = observed(*shape)
    seen.sums["output_gram" if shape[0] < shape[1] else "input_gram"][0, 0] *= -1
    bad = {"good": layer(*shape), "block.bad": layer(*shape, seen)}
    with pytest.raises(NumericalError, match=r"^block.bad: .*indefinite.*eigenvalue"):
        compute_spectra(bad, settings())
    with pytest.raises(NumericalError, match=r"^block.bad: .*indefinite"):
        list(factorize(bad, {"good": 2, "block.bad": 2}, settings()))


def test_non_finite_weight_names_the_module():
    weight = torch.full((8, 12), float("nan"), dtype=torch.float64)
    with pytest.raises(NumericalError, match=r"^block.bad: "):
        compute_spectra({"block.bad": layer(8, 12, weight=weight)}, settings())
