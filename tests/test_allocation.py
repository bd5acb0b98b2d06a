"""Ranks meet the budget, waste less than a rounding step of it, and leave no more error than trying everything."""

import re

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_svd import allocation as allocations
from lora_svd.allocation import (
    ALLOCATIONS,
    FACTOR_FORMATS,
    Choice,
    LayerShape,
    budget_of,
    candidate_ranks,
    given_ranks,
    kept_parameters,
    stored_parameters,
)
from lora_svd.errors import LoraSVDError

# The same examples in every run, on a machine of any speed.
examples = settings(max_examples=300, deadline=None, derandomize=True, database=None)


@st.composite
def problems(draw, most_layers=4):
    """Layers with spectra of different scale and decay (equal layers and flat, zero and rank-1 spectra among them)."""
    layers = {}
    extra = draw(st.sampled_from([0, 0, 2]))
    for index in range(draw(st.integers(1, most_layers))):
        m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
        scale, decay = draw(st.sampled_from([0.0, 1e-6, 1.0, 1.0, 1e4])), draw(st.sampled_from([1.0, 0.9, 0.5, 0.0]))
        squares = scale * decay ** torch.arange(min(m, n), dtype=torch.float64)
        layers[f"layer{index}"] = (LayerShape(m, n, extra), squares)
    return layers, {
        "param_ratio": draw(st.floats(0.05, 1.0)),
        "factor_format": draw(st.sampled_from(FACTOR_FORMATS)),
        "rank_multiple": draw(st.sampled_from([1, 2, 4])),
    }


def dense_options(layers, chosen):
    return [
        reference.options(
            squares, s.out_features, s.in_features, chosen["factor_format"], chosen["rank_multiple"], s.extra_rank
        )
        for s, squares in layers.values()
    ]


def allocate(layers, chosen, allocation="global"):
    units = {name: [Choice(None, 0.0, {name: squares}, {name: shape})] for name, (shape, squares) in layers.items()}
    return allocations.allocate(units, allocation=allocation, **chosen).ranks


def measure(layers, ranks, factor_format):
    """What is stored, and the error that is left, counted from the ranks alone."""
    kept = error = 0
    for name, (shape, squares) in layers.items():
        m, n, rank = shape.out_features, shape.in_features, ranks[name]
        cost = reference.stored(m, n, rank, factor_format, shape.extra_rank)
        kept, error = kept + cost, error + (0.0 if rank >= min(m, n) else float(squares[rank:].sum()))
    return kept, error


# -- what a rank costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("factor_format", FACTOR_FORMATS)
@pytest.mark.parametrize(("m", "n"), [(10, 24), (24, 10), (12, 12), (1, 9), (1, 1)])
def test_cost_counts_what_is_stored(m, n, factor_format, extra):
    shape = LayerShape(m, n, extra)
    for rank in range(1, shape.full_rank + 1):
        assert stored_parameters(shape, rank, factor_format) == reference.stored(m, n, rank, factor_format, extra)
    for multiple in (1, 4, 8):
        expected = reference.options(torch.zeros(shape.full_rank), m, n, factor_format, multiple, extra)
        assert candidate_ranks(shape, factor_format, multiple) == list(expected)


def test_pivoted_never_costs_more_than_dense_and_always_less_than_factors():
    shape = LayerShape(40, 24)
    for rank in range(1, 24):
        pivoted = stored_parameters(shape, rank, "pivoted")
        assert pivoted < min(shape.parameters, stored_parameters(shape, rank, "factors"))
    break_even = 40 * 24 / (40 + 24)
    assert all(rank < break_even for rank in candidate_ranks(shape, "factors", 1)[:-1])
    assert candidate_ranks(shape, "pivoted", 1) == list(range(1, 25))


def test_budget_is_met_where_one_parameter_decides():
    """Rank 1 of a 2 x 3 matrix takes 5 numbers, the matrix 6: the price that tells them apart must not be a tie."""
    for error in torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
        layers = {"layer": (LayerShape(2, 3), torch.tensor([1.0, float(error)], dtype=torch.float64))}
        assert allocate(layers, {"param_ratio": 0.84, "factor_format": "factors", "rank_multiple": 1}) == {"layer": 1}


def test_kept_bypass_is_counted():
    plain, kept = LayerShape(40, 24), LayerShape(40, 24, extra_rank=4)
    for factor_format in FACTOR_FORMATS:
        assert stored_parameters(kept, 8, factor_format) == stored_parameters(plain, 12, factor_format)
        assert stored_parameters(kept, 20, factor_format) == plain.parameters
    squares, chosen = 0.5 ** torch.arange(24.0), {"param_ratio": 0.6, "rank_multiple": 1}
    ranks = [allocate({"layer": (shape, squares)}, chosen)["layer"] for shape in (plain, kept)]
    assert ranks[0] == ranks[1] + 4


# -- the budget --------------------------------------------------------------------------------------------------------


@examples
@given(problems(), st.sampled_from(sorted(ALLOCATIONS)))
def test_budget_is_met_or_refused_with_the_smallest_that_is_feasible(problem, allocation):
    layers, chosen = problem
    shapes = {name: shape for name, (shape, _) in layers.items()}
    total = sum(shape.parameters for shape in shapes.values())
    budget = chosen["param_ratio"] * total
    curves = dense_options(layers, chosen)
    least = sum(min(cost for cost, _ in curve.values()) for curve in curves)
    if least > budget + 1e-6:
        with pytest.raises(LoraSVDError, match=rf"allows {int(budget + 1e-6)} parameters, .* {least}\. ") as caught:
            allocate(layers, chosen, allocation)
        feasible = float(re.search(r"at least ([\d.]+),", str(caught.value))[1])
        assert least / total <= feasible < least / total + 1.01e-4
        chosen = {**chosen, "param_ratio": feasible}
        budget = feasible * total
    ranks = allocate(layers, chosen, allocation)
    kept, _ = measure(layers, ranks, chosen["factor_format"])
    assert kept == kept_parameters(ranks, shapes, chosen["factor_format"]) <= budget + 1e-6
    assert all(rank in curve for rank, curve in zip(ranks.values(), curves, strict=True))


@examples
@given(problems())
def test_global_leaves_less_than_a_rounding_step(problem):
    layers, chosen = problem
    curves = dense_options(layers, chosen)
    budget = int(chosen["param_ratio"] * sum(shape.parameters for shape, _ in layers.values()) + 1e-6)
    if reference.least_error(curves, budget) == float("inf"):
        return
    ranks = allocate(layers, chosen)
    kept, error = measure(layers, ranks, chosen["factor_format"])
    if error > 0:  # with no error left, a larger rank would be waste, as is one that gains nothing
        for rank, curve in zip(ranks.values(), curves, strict=True):
            larger = [cost for cost, left in curve.values() if cost > curve[rank][0] and left < curve[rank][1]]
            assert kept - curve[rank][0] + min(larger, default=float("inf")) > budget


@examples
@given(problems())
def test_uniform_gives_every_layer_its_share(problem):
    layers, chosen = problem
    curves = dict(zip(layers, dense_options(layers, chosen), strict=True))
    ratio = chosen["param_ratio"]
    if any(min(c for c, _ in curves[n].values()) > ratio * s.parameters for n, (s, _) in layers.items()):
        return
    for name, rank in allocate(layers, chosen, "uniform").items():
        share = ratio * layers[name][0].parameters + 1e-6
        costs = [cost for cost, _ in curves[name].values()]
        assert curves[name][rank][0] == max(cost for cost in costs if cost <= share)


def test_uniform_pays_for_layers_too_small_for_their_share():
    """A matrix of rank-1 cost 17 of 72 cannot have a tenth; the large one gives what that takes."""
    layers = {"small": (LayerShape(9, 8), torch.ones(8)), "large": (LayerShape(64, 64), torch.ones(64))}
    ranks = allocate(layers, {"param_ratio": 0.1, "rank_multiple": 1}, "uniform")
    assert ranks["small"] == 1
    kept, _ = measure(layers, ranks, "pivoted")
    assert kept <= budget_of({name: shape for name, (shape, _) in layers.items()}, 0.1)


@pytest.mark.parametrize("allocation", sorted(ALLOCATIONS))
@pytest.mark.parametrize("factor_format", FACTOR_FORMATS)
def test_whole_budget_keeps_everything(allocation, factor_format):
    layers = {f"layer{i}": (LayerShape(12, 8 + i), 0.5 ** torch.arange(8.0 + i)) for i in range(3)}
    ranks = allocate(layers, {"param_ratio": 1.0, "factor_format": factor_format}, allocation)
    assert ranks == {name: shape.full_rank for name, (shape, _) in layers.items()}


# -- the error ---------------------------------------------------------------------------------------------------------


@examples
@given(problems(most_layers=3))
def test_global_is_as_good_as_trying_everything_but_for_one_jump(problem):
    layers, chosen = problem
    curves = dense_options(layers, chosen)
    budget = int(chosen["param_ratio"] * sum(shape.parameters for shape, _ in layers.values()) + 1e-6)
    if reference.least_error(curves, budget) == float("inf"):
        return
    _, error = measure(layers, allocate(layers, chosen), chosen["factor_format"])
    within_a_jump = reference.least_error(curves, budget - reference.largest_jump(curves))
    assert reference.least_error(curves, budget) <= error * (1 + 1e-9) + 1e-12
    assert error <= within_a_jump * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("decay", [1.0, 0.95])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_equal_layers_jump_to_dense_one_by_one(count, decay):
    """A flat spectrum loses by every factor pair: what is best is one layer dense and the others at rank 1."""
    squares = decay ** torch.arange(8, dtype=torch.float64)
    layers = {f"layer{i}": (LayerShape(8, 8), squares) for i in range(count)}
    chosen = {"param_ratio": (64 + 16 * (count - 1)) / (64 * count), "factor_format": "factors", "rank_multiple": 1}
    ranks = allocate(layers, chosen)
    kept, error = measure(layers, ranks, "factors")
    assert error == pytest.approx(reference.least_error(dense_options(layers, chosen), kept), rel=1e-12)
    assert sorted(ranks.values()) == [1] * (count - 1) + [8]


@pytest.mark.parametrize("factor_format", FACTOR_FORMATS)
@pytest.mark.parametrize("param_ratio", [0.3, 0.6, 0.8])
def test_global_beats_uniform_on_unequal_layers(param_ratio, factor_format):
    layers = {
        f"layer{i}": (LayerShape(*shape), 10.0 ** (i % 3) * (0.6 + 0.05 * i) ** torch.arange(float(min(shape))))
        for i, shape in enumerate([(64, 48), (48, 64), (64, 64), (96, 32), (32, 96), (64, 64)])
    }
    chosen = {"param_ratio": param_ratio, "factor_format": factor_format, "rank_multiple": 8}
    errors = {name: measure(layers, allocate(layers, chosen, name), factor_format)[1] for name in ALLOCATIONS}
    assert errors["global"] < 0.8 * errors["uniform"]


def test_error_falls_as_the_budget_grows_and_pivoting_is_free_quality():
    shapes = {f"layer{i}": LayerShape(32, 24 + 8 * i) for i in range(3)}
    layers = {name: (shape, 0.9 ** torch.arange(float(shape.full_rank))) for name, shape in shapes.items()}
    errors = {
        factor_format: [
            measure(layers, allocate(layers, {"param_ratio": x, "factor_format": factor_format}), factor_format)[1]
            for x in (0.2, 0.4, 0.6, 0.8, 1.0)
        ]
        for factor_format in FACTOR_FORMATS
    }
    for falling in errors.values():
        assert falling == sorted(falling, reverse=True)
        assert falling[-1] == 0
    assert all(p <= f for p, f in zip(errors["pivoted"], errors["factors"], strict=True))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_unit_of_the_loss_does_not_matter(scale):
    layers = {
        f"layer{i}": (LayerShape(24, 32), 10.0**i * 0.7 ** torch.arange(24.0, dtype=torch.float64)) for i in range(3)
    }
    scaled = {name: (shape, scale * squares) for name, (shape, squares) in layers.items()}
    assert allocate(scaled, {"param_ratio": 0.5}) == allocate(layers, {"param_ratio": 0.5})


def test_unknown_allocation_lists_the_names():
    layers = {"layer": (LayerShape(8, 8), torch.ones(8))}
    with pytest.raises(
        LoraSVDError, match=r"allocation: unknown value 'best', expected one of \['global', 'uniform'\]"
    ):
        allocate(layers, {"param_ratio": 0.5}, "best")


# -- ranks that the user gives -----------------------------------------------------------------------------------------

GIVEN = {"a": LayerShape(8, 8), "b": LayerShape(8, 16)}


def test_given_ranks_are_taken_and_cut_to_full_rank():
    assert given_ranks({"a": 2, "b": 99, "other": 1}, GIVEN, 1.0, "pivoted") == {"a": 2, "b": 8}


def test_missing_rank_names_the_layer():
    with pytest.raises(LoraSVDError, match=r"compact_ranks: no rank for b \(1 of 2 missing\)"):
        given_ranks({"a": 2}, GIVEN, 1.0, "pivoted")


def test_given_ranks_have_to_meet_the_budget():
    kept = reference.stored(8, 8, 4, "pivoted") + reference.stored(8, 16, 4, "pivoted")
    total = 8 * 8 + 8 * 16
    assert given_ranks({"a": 4, "b": 4}, GIVEN, kept / total, "pivoted") == {"a": 4, "b": 4}
    with pytest.raises(LoraSVDError, match=rf"compact_ranks: .* {kept / total:.4f} .* param_ratio=0.5;"):
        given_ranks({"a": 4, "b": 4}, GIVEN, 0.5, "pivoted")
