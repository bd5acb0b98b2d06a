"""Weighted SVD, balanced factors and pivoted factors against dense references and their invariants."""

import pytest
import reference
import torch

from lora_svd.decompositions import DECOMPOSITIONS, Factors, balance, pivot
from lora_svd.decompositions.svd import weighted_spectrum, weighted_svd
from lora_svd.linalg import Metrics

SHAPES = [(5, 8), (8, 5), (6, 6)]
KINDS = ["none", "diagonal", "full"]


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def norm(error, metrics):
    return reference.loss(error, metrics.row, metrics.column)


def metric(kind, size):
    if kind == "none":
        return None
    if kind == "diagonal":
        return 10 ** (2 * torch.rand(size, dtype=torch.float64) - 1)
    factor = normal(size, size + 2) * (1 + torch.arange(size)[:, None])
    return factor @ factor.T


def with_spectrum(shape, values):
    U, V = (torch.linalg.qr(normal(size, len(values)))[0] for size in shape)
    return U @ torch.tensor(values, dtype=torch.float64).diag() @ V.T


def wilkinson(size, extra):
    """Gaussian elimination with partial pivoting exchanges no row here, and coefficients grow to 1.9^(size - 1)."""
    triangle = torch.eye(size, dtype=torch.float64) - 0.9 * torch.ones(size, size, dtype=torch.float64).tril(-1)
    return torch.cat([triangle, -0.9 * torch.ones(extra, size, dtype=torch.float64)])


WEIGHTS = {
    "random": lambda shape: normal(*shape),
    "ill-conditioned": lambda shape: with_spectrum(shape, [10.0 ** (-2 * i) for i in range(8)]),
    "low rank": lambda shape: with_spectrum(shape, [1.0, 0.5]),
    "zero": lambda shape: torch.zeros(shape, dtype=torch.float64),
    "one column": lambda shape: normal(*shape) * (torch.arange(shape[1]) == 3),
    "repeated rows": lambda shape: normal(4, shape[1]).repeat(-(-shape[0] // 4), 1)[: shape[0]],
    "tiny": lambda shape: 1e-30 * normal(*shape),
}


@pytest.fixture(params=SHAPES, ids=str)
def weight(request):
    return normal(*request.param)


@pytest.fixture(params=[(row, column) for row in KINDS for column in KINDS], ids="-".join)
def metrics(request, weight):
    return Metrics(*(metric(kind, size) for kind, size in zip(request.param, weight.shape, strict=True)))


def ranks(weight):
    return range(1, min(weight.shape) + 1)


# -- weighted SVD ------------------------------------------------------------------------------------------------------


def test_spectrum_equals_the_dense_svd(weight, metrics):
    expected = reference.spectrum(weight, metrics.row, metrics.column)
    assert weighted_spectrum(weight, metrics).shape == expected.shape
    assert reference.relative_error(weighted_spectrum(weight, metrics), expected) < 1e-12


def test_factors_equal_the_dense_truncation(weight, metrics):
    for rank in ranks(weight):
        factors = weighted_svd(weight, metrics, rank)
        assert factors.rank == rank
        assert (factors.left.shape, factors.right.shape) == ((weight.shape[0], rank), (rank, weight.shape[1]))
        expected = reference.truncate(weight, metrics.row, metrics.column, rank)
        assert reference.relative_error(factors.product(), expected) < 1e-8


def test_full_rank_reproduces_the_weight(weight, metrics):
    assert reference.relative_error(weighted_svd(weight, metrics, min(weight.shape)).product(), weight) < 1e-11


def test_error_falls_with_rank_and_is_the_discarded_spectrum(weight, metrics):
    squares = reference.spectrum(weight, metrics.row, metrics.column)
    errors = [norm(weight - weighted_svd(weight, metrics, rank).product(), metrics) for rank in ranks(weight)]
    tails = [float(squares[rank:].sum()) for rank in ranks(weight)]
    assert errors == pytest.approx(tails, rel=1e-9, abs=1e-12 * float(squares.sum()))
    assert errors == sorted(errors, reverse=True)


def test_nothing_of_that_rank_is_better(weight, metrics):
    """Random rows or columns with the best possible other factor, a perturbed optimum, and plain SVD."""
    rank = 2
    best = weighted_svd(weight, metrics, rank)
    least = norm(weight - best.product(), metrics)
    C, X = (reference.dense(m, n) for m, n in zip((metrics.row, metrics.column), weight.shape, strict=True))
    for _ in range(10):
        left, right = normal(weight.shape[0], rank), normal(rank, weight.shape[1])
        rivals = (
            left @ torch.linalg.solve(left.T @ C @ left, left.T @ C @ weight),
            weight @ X @ right.T @ torch.linalg.inv(right @ X @ right.T) @ right,
            (best.left + 1e-3 * left) @ (best.right + 1e-3 * right),
            reference.truncate(weight, None, None, rank),
        )
        assert all(norm(weight - rival, metrics) >= least * (1 - 1e-12) for rival in rivals)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_metric_beats_plain_svd_and_the_transpose_trap(shape):
    weight, metrics = normal(*shape), Metrics(metric("full", shape[0]), metric("full", shape[1]))
    arguments = (weight, metrics.row, metrics.column, 2)
    ours = norm(weight - weighted_svd(weight, metrics, 2).product(), metrics)
    assert ours < 0.99 * norm(weight - reference.truncate(weight, None, None, 2), metrics)
    assert ours < 0.99 * norm(weight - reference.truncate_with_transpose_trap(*arguments), metrics)


def test_scale_of_a_metric_does_not_change_the_factors(weight, metrics):
    scaled = Metrics(*(m if m is None else 1e-9 * m for m in (metrics.row, metrics.column)))
    assert (
        reference.relative_error(weighted_svd(weight, scaled, 2).product(), weighted_svd(weight, metrics, 2).product())
        < 1e-8
    )


# Rounding may leave it definite; test_fallbacks.py holds the warning.
@pytest.mark.filterwarnings("ignore:a metric is singular")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_metric_costs_nothing_in_its_null_space(shape):
    """Fewer tokens than features: what no token saw is free, what was seen is still optimal."""
    weight = normal(*shape)
    seen = [normal(3, size) for size in shape]
    metrics = Metrics(*(x.T @ x for x in seen))
    squares = reference.spectrum(weight, metrics.row, metrics.column)
    assert reference.relative_error(weighted_spectrum(weight, metrics), squares) < 1e-9
    for rank in (1, 2, 3):
        error = norm(weight - weighted_svd(weight, metrics, rank).product(), metrics)
        assert error == pytest.approx(float(squares[rank:].sum()), rel=1e-6, abs=1e-9 * float(squares.sum()))


def test_weight_of_low_precision_is_factorized_in_double(weight):
    factors = weighted_svd(weight.bfloat16(), Metrics(), 2)
    assert factors.left.dtype == factors.right.dtype == torch.float64
    assert reference.relative_error(factors.product(), reference.truncate(weight.bfloat16(), None, None, 2)) < 1e-10


@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_every_decomposition_keeps_the_contract(name, weight):
    """The spectrum is what each further rank removes from the error of the factors, in descending order."""
    decomposition = DECOMPOSITIONS[name]
    gains = decomposition.spectrum(weight, Metrics())
    split = decomposition.split(*weight.shape)
    assert bool((gains.diff() <= 0).all())
    assert len(gains) == split.full_rank
    for rank in range(1, split.full_rank + 1):
        factors = decomposition.factorize(weight, Metrics(), rank)
        assert (factors.left.shape, factors.right.shape) == ((split.shape[0], rank), (rank, split.shape[1]))
        error = norm(weight - factors.product(), Metrics())
        assert error == pytest.approx(float(gains[rank:].sum()), rel=1e-9, abs=1e-12 * float(gains.sum()))


# -- truncation of a sum of factors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", ["random", "zero", "parallel"])
def test_truncated_sum_equals_the_dense_truncation(extra, weight, metrics):
    """The second summand may be nothing, or lie in the first."""
    factors = weighted_svd(weight, metrics, 3)
    added = Factors(normal(weight.shape[0], 2), normal(2, weight.shape[1]))
    if extra == "zero":
        added = Factors(0 * added.left, added.right)
    if extra == "parallel":
        added = Factors(2 * factors.left[:, :2], added.right)
    total = factors.product() + added.product()
    found = DECOMPOSITIONS["svd"].absorb(factors, added, metrics)
    assert found.rank == 3
    expected = reference.truncate(total, metrics.row, metrics.column, 3)
    assert reference.relative_error(found.product(), expected) < 1e-7


@pytest.mark.parametrize("shape", [(10, 24), (24, 10)], ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_truncated_sum_of_difficult_weights(kind, shape):
    """A bypass that is still zero next to factors that may be zero, rank-deficient or far apart in size."""
    metrics = Metrics(metric("full", shape[0]), metric("full", shape[1]))
    factors = weighted_svd(WEIGHTS[kind](shape), metrics, 5)
    bypass = Factors(torch.zeros(shape[0], 2, dtype=torch.float64), normal(2, shape[1]))
    found = DECOMPOSITIONS["svd"].absorb(factors, bypass, metrics).product()
    left, right = (reference.symmetric_power(m, 0.5) for m in (metrics.row, metrics.column))
    assert reference.relative_error(left @ found @ right, left @ factors.product() @ right) < 1e-5


@pytest.mark.parametrize("unit", [1.0, 1e-12, 1e-18])
@pytest.mark.parametrize("shape", [(10, 24), (24, 10)], ids=str)
def test_truncated_sum_does_not_depend_on_the_unit_of_the_loss(shape, unit):
    """Gradients of a mean over many tokens square to 1e-12; and more columns than rows leave a singular Gram."""
    weight, metrics = normal(*shape), Metrics(unit * metric("full", shape[0]), metric("full", shape[1]))
    factors = weighted_svd(weight, metrics, 9)
    bypass = Factors(0.05 * normal(shape[0], 4), normal(4, shape[1]))
    total = factors.product() + bypass.product()
    found = DECOMPOSITIONS["svd"].absorb(factors, bypass, metrics).product()
    best = reference.truncate(total, metrics.row, metrics.column, 9)
    assert norm(total - found, metrics) == pytest.approx(norm(total - best, metrics), rel=1e-6)


# -- stored forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", KINDS)
@pytest.mark.parametrize("shape", [(10, 24), (24, 10), (12, 12)], ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_pivoted_and_plain_factors_agree(kind, shape, column):
    weight, metrics = WEIGHTS[kind](shape), Metrics(metric("diagonal", shape[0]), metric(column, shape[1]))
    for rank in (1, 5, 9):
        factors = weighted_svd(weight, metrics, rank)
        pivoted = pivot(factors)
        m, n = shape
        numbers = pivoted.rows.numel() + pivoted.coefficients.numel()
        assert numbers == reference.stored(m, n, rank, "pivoted") == rank * (m + n) - rank**2
        assert sorted(pivoted.order.tolist()) == list(range(m))
        assert float(pivoted.coefficients.abs().max()) <= 2.0
        product = torch.empty(shape, dtype=torch.float64)
        product[pivoted.order] = torch.cat([pivoted.rows, pivoted.coefficients @ pivoted.rows])
        assert reference.relative_error(product, factors.product()) < 1e-12


@pytest.mark.parametrize("kind", ["random", "ill-conditioned", "low rank"])
def test_rounding_of_the_stored_numbers_is_hardly_amplified(kind):
    weight = WEIGHTS[kind]((24, 10))
    factors = weighted_svd(weight, Metrics(), 6)
    pivoted, balanced = pivot(factors), balance(factors)
    product = torch.empty_like(weight)
    rows, coefficients = pivoted.rows.float().double(), pivoted.coefficients.float().double()
    product[pivoted.order] = torch.cat([rows, coefficients @ rows])
    assert reference.relative_error(product, factors.product()) < 1e-6
    assert reference.relative_error(balanced.left.float() @ balanced.right.float(), factors.product()) < 1e-6


@pytest.mark.parametrize("size", [8, 32, 64])
def test_pivots_are_exchanged_where_elimination_grows(size):
    left = wilkinson(size, 5)
    pivoted = pivot(Factors(left, torch.eye(size, dtype=torch.float64)))
    assert float(pivoted.coefficients.abs().max()) <= 2.0
    product = torch.empty_like(left)
    product[pivoted.order] = torch.cat([pivoted.rows, pivoted.coefficients @ pivoted.rows])
    assert reference.relative_error(product, left) < 1e-12


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("shape", [(10, 24), (24, 10)], ids=str)
def test_balanced_factors_have_the_same_product_and_equal_norms(kind, shape):
    factors = weighted_svd(WEIGHTS[kind](shape), Metrics(metric("full", shape[0]), metric("full", shape[1])), 5)
    balanced = balance(factors)
    assert reference.relative_error(balanced.product(), factors.product()) < 1e-12
    assert torch.isfinite(balanced.left).all()
    assert torch.isfinite(balanced.right).all()
    norms = factors.left.norm(dim=0) * factors.right.norm(dim=1)
    relevant = norms > 1e-12 * norms.max()
    assert torch.allclose(balanced.left.norm(dim=0)[relevant], balanced.right.norm(dim=1)[relevant], rtol=1e-10)
