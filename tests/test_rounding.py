"""Rounding to few levels: against brute force and least squares, and what it must leave unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_svd.rounding import fit_scales, mix, nearest_levels, refit_left, round_weight

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
