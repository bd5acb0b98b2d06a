"""Rounding to few levels: against brute force and least squares, and what it must leave unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora_svd.compact.convert import compact_module, dense_weight
from lora_svd.compact.rounding import fit_scales, mix, nearest_levels, refit_left, round_weight
from lora_svd.decompositions import Factors, pivot
from lora_svd.decompositions.pivots import spread_rows
from lora_svd.decompositions.svd import weighted_svd
from lora_svd.linalg import Metrics

LEVELS = torch.tensor([0.4, -1.0, 0.0, 1.0, -0.2], dtype=torch.float64)  # in no order


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated_gram(size: int) -> Tensor:
    """Of inputs that vary in few directions, as those of real layers do."""
    basis = torch.linalg.qr(random(size, size, seed=2)).Q
    return basis @ torch.diag(torch.logspace(0, -3, size, dtype=torch.float64)) @ basis.T


def cost(error: Tensor, gram: Tensor) -> float:
    return float(((error @ gram) * error).sum())


def rounded(weight: Tensor, gram: Tensor | None = None) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True).expand_as(weight)
    return scale * LEVELS[round_weight(weight, scale, LEVELS, gram)]


def test_nearest_level_is_the_nearest() -> None:
    values = random(50, 7)
    expected = (values[..., None] - LEVELS).abs().argmin(-1)
    assert torch.equal(nearest_levels(values, LEVELS), expected)


@pytest.mark.parametrize("gram", [None, torch.diag(torch.arange(1.0, 141.0, dtype=torch.float64))])
def test_uncorrelated_inputs_leave_nothing_to_pass_on(gram: Tensor | None) -> None:
    weight = random(6, 140)
    scale = weight.abs().amax(1, keepdim=True).expand_as(weight)
    assert torch.equal(round_weight(weight, scale, LEVELS, gram), nearest_levels(weight / scale, LEVELS))


@pytest.mark.parametrize("size", [24, 300])  # within one block of columns, and over several
def test_correlated_inputs_cost_less_than_nearest(size: int) -> None:
    weight, gram = random(16, size), correlated_gram(size)
    assert cost(weight - rounded(weight, gram), gram) < 0.5 * cost(weight - rounded(weight), gram)


def test_a_weight_on_the_grid_stays() -> None:
    codes = torch.randint(5, (8, 20), generator=torch.Generator().manual_seed(3))
    scale = torch.full((8, 20), 0.7, dtype=torch.float64)
    assert torch.equal(round_weight(scale * LEVELS[codes], scale, LEVELS, correlated_gram(20)), codes)


def test_zero_blocks_and_dead_inputs_are_harmless() -> None:
    weight, gram = random(4, 12), correlated_gram(12)
    weight[:, 3], gram[3], gram[:, 3] = 0, 0, 0
    scale = weight.abs()
    found = scale * LEVELS[round_weight(weight, scale, LEVELS, gram)]
    assert torch.isfinite(found).all()
    assert not found[:, 3].any()


def test_refitted_left_is_the_least_squares_solution() -> None:
    left, right, gram = random(10, 4), random(4, 12, seed=4), correlated_gram(12)
    near = right + 0.1 * random(4, 12, seed=5)
    found = refit_left(left, right, near, gram)
    shrunk = 0.9 * gram + 0.1 * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    root = torch.linalg.cholesky(shrunk)
    expected = torch.linalg.lstsq((near @ root).T, (left @ right @ root).T).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(refit_left(left, right, right, gram), left, rtol=1e-6, atol=1e-7)


def test_mixing_keeps_the_product_and_makes_rounding_cheaper() -> None:
    U, _, Vh = torch.linalg.svd(random(40, 60), full_matrices=False)
    left, right = U, torch.logspace(0, -3, 40, dtype=torch.float64)[:, None] * Vh
    gram = correlated_gram(60)

    def error(left: Tensor, right: Tensor) -> float:
        near = rounded(right)
        refitted = refit_left(left, right, near, gram)
        return cost(left @ right - rounded(refitted, near @ gram @ near.T) @ near, gram)

    mixed = mix(left, right)
    torch.testing.assert_close(mixed[0] @ mixed[1], left @ right)
    assert error(*mixed) < 0.5 * error(left, right)


def test_fitted_scales_are_the_best_of_a_grid_by_brute_force() -> None:
    numbers = random(3, 50)  # the last block of 16 has 6 numbers
    found = fit_scales(numbers, LEVELS, 16)
    for block, scale in zip(numbers.flatten().split(16), found, strict=True):

        def error(scale: float, block: Tensor = block) -> float:
            return float((block[:, None] - scale * LEVELS).abs().amin(1).square().sum())

        shares = torch.linspace(0.75, 1.15, 9, dtype=torch.float64)
        assert error(float(scale)) == pytest.approx(min(error(float(share * block.abs().max())) for share in shares))
    assert not fit_scales(torch.zeros(2, 8), LEVELS, 16).any()


def test_fitted_scales_cost_less_than_the_largest_magnitude() -> None:
    levels = torch.linspace(-1, 1, 16, dtype=torch.float64)
    numbers = random(500, 64)
    errors = [
        (numbers - scale * levels[nearest_levels(numbers / scale, levels)]).square().mean()
        for scale in (fit_scales(numbers, levels, 64)[:, None], numbers.abs().amax(1, keepdim=True))
    ]
    assert errors[0] < 0.9 * errors[1]


# -- pivoted factors in half precision ---------------------------------------------------------------------------------


def steep(size: int, power: float, seed: int) -> Tensor:
    """A metric whose eigenvalues fall like a power, with a mean of 1 on its diagonal."""
    basis = torch.linalg.qr(random(size, size, seed=seed)).Q
    metric = basis @ torch.diag(torch.arange(1, size + 1, dtype=torch.float64) ** -power) @ basis.T
    return (metric + metric.T) / (2 * metric.diagonal().mean())


def in_metrics(error: Tensor, metrics: Metrics) -> float:
    return float(((metrics.row @ error) * (error @ metrics.column)).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "rank", "power"), [((576, 576), 320, 1.5), ((300, 120), 70, 1.5), ((120, 300), 70, 1.0)], ids=str
)
def test_pivoted_factors_round_as_little_as_balanced_ones(
    shape: tuple[int, int], rank: int, power: float, dtype: torch.dtype
) -> None:
    """Below 5 % of what truncation costs, in metrics whose eigenvalues fall like i^-1.5."""
    weight = random(*shape)
    metrics = Metrics(steep(shape[0], power, 3), steep(shape[1], power, 4))
    factors = weighted_svd(weight, metrics, rank)
    truncated = in_metrics(weight - factors.product(), metrics)
    base = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    errors = {
        kind: in_metrics(
            weight - dense_weight(compact_module(factors, base, base.weight, kind, lambda: metrics)), metrics
        )
        for kind in ("pivoted", "factors")
    }
    assert errors["pivoted"] < 1.05 * truncated
    assert errors["pivoted"] - truncated < 1.5 * (errors["factors"] - truncated)
    plain = pivot(factors)
    rows, coefficients = (part.to(dtype).double() for part in (plain.rows, plain.coefficients))
    nearest = torch.cat([rows, coefficients @ rows])[plain.order.argsort()]
    assert errors["pivoted"] - truncated < 0.3 * (in_metrics(weight - nearest, metrics) - truncated)


@pytest.mark.parametrize("kind", ["zero", "low rank", "zero rows", "equal rows"])
def test_pivots_of_weights_out_of_the_ordinary(kind: str) -> None:
    left, right = random(20, 6, seed=5), random(6, 9, seed=6)
    if kind == "zero":
        left = torch.zeros_like(left)
    elif kind == "low rank":
        left[:, 3:] = left[:, :3]
    elif kind == "zero rows":
        left[4:] = 0
    elif kind == "equal rows":
        left[6:] = left[:1]
    base = nn.Linear(9, len(left), bias=False, dtype=torch.bfloat16)
    compact = compact_module(Factors(left, right), base, base.weight, "pivoted")
    assert sorted(compact.order.tolist()) == list(range(len(left)))
    assert (dense_weight(compact) - left @ right).norm() <= 0.01 * (left @ right).norm()


@pytest.mark.parametrize("count", [1, 5, 30])
def test_rows_that_are_left_out_are_those_that_cost_least(count: int) -> None:
    """One by one, by brute force."""
    basis = torch.linalg.qr(random(40, 40 - count, seed=7)).Q * random(40, 1, seed=8).exp()
    kept = list(range(40))

    def trace(rows: list[int]) -> float:
        return float(torch.linalg.inv(basis[rows].T @ basis[rows]).trace())

    for _ in range(count):
        kept = min(([*kept[:i], *kept[i + 1 :]] for i in range(len(kept))), key=trace)
    order = spread_rows(basis)
    found = order[: 40 - count].tolist()
    assert sorted(order.tolist()) == list(range(40))
    assert found == sorted(found)
    assert trace(found) < 1.05 * trace(kept)
