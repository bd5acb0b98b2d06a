"""Element-wise weighted factorization: a local minimum of the written objective, and what it is worth."""

from __future__ import annotations

from pathlib import Path

import pytest
import reference
import torch
from models import assert_bit_equal, assert_kept, logits, tensors, trained
from torch import Tensor

from lora_svd.compact import LowRankLinear, parameter_report
from lora_svd.decompositions import DECOMPOSITIONS, Factors, elementwise
from lora_svd.decompositions.svd import weighted_svd
from lora_svd.errors import NumericalError
from lora_svd.linalg import Metrics

ELEMENTWISE = DECOMPOSITIONS["elementwise"]
SHAPES = [(9, 14), (14, 9)]


def problem(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A weight, and weights of its elements that no row metric describes."""
    return torch.randn(*shape, dtype=torch.float64), torch.randn(*shape, dtype=torch.float64).square() + 0.01


def loss(weight: Tensor, F: Tensor, factors: Factors) -> float:
    return float((F * (weight - factors.product()).square()).sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_sweep_lowers_the_objective(shape: tuple[int, int]) -> None:
    weight, F = problem(shape)
    start = weighted_svd(weight, Metrics(row=F.mean(1)), 4)
    ridge = elementwise.RIDGE * float(start.left.norm() * start.right.norm()) / 4
    unit = F / F.mean()
    objectives = [reference.elementwise_objective(weight, unit, start.left, start.right, ridge)]
    for factors, objective in elementwise.sweeps(weight, F, start):
        objectives.append(objective)
        found = reference.elementwise_objective(weight, unit, factors.left, factors.right, ridge)
        assert objective == pytest.approx(found, rel=1e-12)
    assert objectives == sorted(objectives, reverse=True)
    assert len(objectives) == 1 + elementwise.SWEEPS
    assert objectives[-1] < 0.8 * objectives[0]


def test_rows_are_the_solutions_of_their_own_regressions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only some rows are solved at a time."""
    weight, F = problem((9, 14))
    right = torch.randn(14, 4, dtype=torch.float64)
    expected = torch.stack(
        [
            torch.linalg.solve(
                right.T @ F[i].diag() @ right + 0.3 * torch.eye(4).double(), right.T @ F[i].diag() @ weight[i]
            )
            for i in range(9)
        ]
    )
    assert reference.relative_error(elementwise._solve_rows(weight, F, right, 0.3), expected) < 1e-12
    monkeypatch.setattr(elementwise, "_ENTRIES", 2 * 4**2)
    assert reference.relative_error(elementwise._solve_rows(weight, F, right, 0.3), expected) < 1e-12


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_ends_below_the_row_wise_solution_where_neither_factor_gains(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, F = problem(shape)
    monkeypatch.setattr(elementwise, "SWEEPS", 2000)
    monkeypatch.setattr(elementwise, "TOLERANCE", 1e-9)
    best = ELEMENTWISE.factorize(weight, Metrics(elements=F), 4)
    least = loss(weight, F, best)
    assert least < 0.8 * loss(weight, F, weighted_svd(weight, Metrics(row=F.mean(1)), 4))
    left, right = best.left.clone().requires_grad_(), best.right.clone().requires_grad_()
    (F * (weight - left @ right).square()).sum().backward()
    scale = float((F * weight).norm() * best.left.norm())
    assert float(left.grad.norm() + right.grad.norm()) < 1e-2 * scale  # but for the ridge


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_that_are_equal_within_rows_give_the_row_wise_solution(shape: tuple[int, int]) -> None:
    weight, _ = problem(shape)
    row = torch.rand(shape[0], dtype=torch.float64) + 0.1
    found = ELEMENTWISE.factorize(weight, Metrics(elements=row[:, None].expand(shape)), 3)
    expected = reference.truncate(weight, row, None, 3)
    assert reference.relative_error(found.product(), expected) < 1e-2
    gains = ELEMENTWISE.spectrum(weight, Metrics(elements=row[:, None].expand(shape)))
    assert reference.relative_error(gains, reference.spectrum(weight, row, None)) < 1e-10


def test_scale_does_not_matter_and_zero_stays_zero() -> None:
    weight, F = problem((9, 14))
    plain = ELEMENTWISE.factorize(weight, Metrics(elements=F), 3).product()
    scaled = ELEMENTWISE.factorize(1e-12 * weight, Metrics(elements=1e-9 * F), 3).product()
    assert reference.relative_error(1e12 * scaled, plain) < 1e-8
    assert not ELEMENTWISE.factorize(0 * weight, Metrics(elements=F), 3).product().any()
    rank_one = torch.outer(weight[:, 0], weight[0])
    assert reference.relative_error(ELEMENTWISE.factorize(rank_one, Metrics(elements=F), 3).product(), rank_one) < 1e-2


def test_absorbed_bypass_is_the_solution_for_the_sum() -> None:
    weight, F = problem((9, 14))
    factors = ELEMENTWISE.factorize(weight, Metrics(elements=F), 3)
    bypass = Factors(torch.randn(9, 2), torch.randn(2, 14))
    total = factors.product() + bypass.product().double()
    found = ELEMENTWISE.absorb(factors, bypass, Metrics(elements=F))
    assert found.rank == 3
    assert loss(total, F, found) < loss(total, F, weighted_svd(total, Metrics(row=F.mean(1)), 3))


def test_what_did_not_converge_and_what_has_no_solution_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, F = problem((9, 14))
    monkeypatch.setattr(elementwise, "SWEEPS", 2)
    with pytest.warns(
        UserWarning, match=r"weight of \(9, 14\) at rank 4 still gained more than 0.003 in the last of 2"
    ):
        ELEMENTWISE.factorize(weight, Metrics(elements=F), 4)
    F[2] = -50.0
    F[3] = 100.0
    with pytest.raises(NumericalError, match=r"weights of the elements: got a smallest one of -50, expected"):
        ELEMENTWISE.factorize(weight, Metrics(elements=F), 4)


@pytest.mark.filterwarnings("ignore:alternating least squares")
@pytest.mark.parametrize("changes", [{}, {"compensation": "keep", "factor_format": "factors"}, {"train_factors": True}])
def test_trains_merges_saves_and_loads(changes: dict[str, object], tmp_path: Path) -> None:
    model = trained(tmp_path, importance="fisher_elementwise", **changes)
    model.base_model.set_param_ratio(0.5)
    compact = model.merge_and_unload()
    assert_kept(compact, 0.5)
    assert any(isinstance(module, LowRankLinear) for module in compact.modules())
    compact.save_pretrained(tmp_path / "compact")
    again = type(compact).from_pretrained(tmp_path / "compact")
    assert_bit_equal(tensors(again), tensors(compact))
    assert parameter_report(again) == parameter_report(compact)
    assert torch.equal(logits(again), logits(compact))
