"""Metrics, their roots and their named failures."""

import pytest
import reference
import torch

from lora_svd.errors import NumericalError, NumericalWarning
from lora_svd.linalg import (
    INDEFINITE_TOLERANCE,
    Metrics,
    gram,
    metric_root,
    metric_times,
    root_transpose_solve,
    root_transpose_times,
    shrink,
)

N = 6


def positive(size=N):
    factor = torch.randn(size, 2 * size, dtype=torch.float64)
    return factor @ factor.T / size


def with_eigenvalues(values):
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))[0]
    matrix = basis @ torch.tensor(values, dtype=torch.float64).diag() @ basis.T
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("size", [1, 7, 192, 193, 400])
def test_gram_is_the_product(size):
    rows = torch.randn(11, size, dtype=torch.float64)
    assert reference.relative_error(gram(rows), rows.T @ rows) < 1e-14
    assert gram(rows.float()).dtype == torch.float32


METRICS = {
    "none": lambda: None,
    "diagonal": lambda: torch.rand(N, dtype=torch.float64) + 0.1,
    "full": positive,
    "singular": lambda: with_eigenvalues([1.0, 0.5, 0.1, 0.0, 0.0, 0.0]),
    "singular diagonal": lambda: torch.tensor([1.0, 0.5, 0.1, 0.0, 0.0, 0.0], dtype=torch.float64),
    "rounded": lambda: with_eigenvalues([1.0, 0.5, 0.1, 1e-9, -1e-9, -1e-8]),
}


def root_of(kind, metric):
    """Its root; where eigenvalues have to be raised it says so."""
    if kind in {"none", "diagonal", "full"}:
        return metric_root(metric)
    raised = 2 if kind == "rounded" else 3
    says = f"^a metric is singular: {raised} of its 6 eigenvalues were raised to 1e-12 of"
    with pytest.warns(NumericalWarning, match=says):
        return metric_root(metric)


@pytest.mark.parametrize("kind", METRICS)
def test_root_squares_to_the_metric(kind):
    metric = METRICS[kind]()
    root = reference.dense(None, N) if (root := root_of(kind, metric)) is None else root
    root = root.diag() if root.dim() == 1 else root
    assert reference.relative_error(root @ root.T, reference.dense(metric, N)) < (1e-7 if kind == "rounded" else 1e-11)


@pytest.mark.parametrize("kind", METRICS)
def test_times_and_solve_undo_each_other(kind):
    root, matrix = root_of(kind, METRICS[kind]()), torch.randn(N, 3, dtype=torch.float64)
    assert reference.relative_error(root_transpose_solve(root, root_transpose_times(root, matrix)), matrix) < 1e-7


def test_root_is_transposed():
    """R^T M and not R M: only a root that is not symmetric tells them apart."""
    metric, matrix = positive(), torch.randn(N, 3, dtype=torch.float64)
    root = metric_root(metric)
    product = root_transpose_times(root, matrix)
    assert reference.relative_error(product.T @ product, matrix.T @ metric @ matrix) < 1e-12
    assert reference.relative_error((root @ matrix).T @ (root @ matrix), matrix.T @ metric @ matrix) > 1e-3


@pytest.mark.parametrize("size", [192, 193, 400])
def test_triangular_root_by_blocks(size):
    root, matrix = torch.randn(size, size, dtype=torch.float64).tril(), torch.randn(size, 3, dtype=torch.float64)
    assert reference.relative_error(root_transpose_times(root, matrix), root.T @ matrix) < 1e-12


@pytest.mark.parametrize("kind", METRICS)
def test_metric_times_is_the_dense_product(kind):
    metrics, matrix = Metrics(row=METRICS[kind]()), torch.randn(N, 3, dtype=torch.float64)
    product = metric_times(metrics.row, matrix)
    assert reference.relative_error(product, reference.dense(metrics.row, N) @ matrix) < 1e-12
    assert torch.equal(product, metric_times(metrics.transposed.column, matrix))


@pytest.mark.parametrize("correlation", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("amount", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("kind", ["diagonal", "full", "singular"])
def test_shrinkage(kind, amount, correlation):
    metric = METRICS[kind]().float()
    before = metric.clone()
    matrix = reference.dense(metric, N)
    kept = (1 - correlation) * matrix + correlation * torch.diag(matrix.diagonal())
    expected = (1 - amount) * kept + amount * torch.trace(matrix) / N * torch.eye(N, dtype=torch.float64)
    shrunk = shrink(metric, amount, correlation)
    assert shrunk.dtype == torch.float64
    assert shrunk.dim() == metric.dim()
    assert reference.relative_error(reference.dense(shrunk, N), expected) < 1e-14
    assert torch.equal(metric, before)


def test_shrinkage_leaves_zero_and_the_identity_as_they_are():
    assert shrink(None, 0.1) is None
    assert torch.equal(shrink(torch.zeros(N), 0.1), torch.zeros(N, dtype=torch.float64))
    assert torch.equal(shrink(torch.zeros(N, N), 0.1), torch.zeros(N, N, dtype=torch.float64))


def test_metrics_that_are_zero_are_named_and_have_a_definite_form():
    metrics = Metrics(row=torch.zeros(N, N), column=positive())
    assert metrics.zero == ["row"]
    assert metrics.definite == Metrics(column=metrics.column)
    assert Metrics(elements=torch.zeros(N, 2)).zero == ["elements"]
    assert not Metrics(row=torch.eye(1, N)[0]).zero


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(N,), (N, N)])
def test_non_finite_metric_is_an_error(shape, bad):
    metric = torch.ones(shape)
    metric[-1] = bad
    total = metric.numel()
    with pytest.raises(NumericalError, match=rf"metric has {total // N} of {total} non-finite values"):
        shrink(metric, 0.01)


@pytest.mark.parametrize("smallest", [-1.0, -2 * INDEFINITE_TOLERANCE])
def test_indefinite_metric_is_an_error_that_says_how_much(smallest):
    metric = with_eigenvalues([1.0, 1.0, 0.5, 0.5, 0.1, smallest])
    with pytest.raises(NumericalError, match=rf"indefinite metric: eigenvalues from {smallest:.3g} to 1,"):
        metric_root(metric)


def test_negative_metric_is_an_error():
    for metric in (-positive(), torch.tensor([1.0, -1.0]), torch.zeros(2), torch.zeros(2, 2)):
        with pytest.raises(NumericalError, match="indefinite"):
            metric_root(metric)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gram_of_half_precision_is_float32(dtype):
    """As exact as of the same numbers in float32, and without a trace in how others multiply."""
    rows, other = (torch.randn(700, 300).to(dtype) for _ in range(2))
    before = other.float().T @ rows.float()
    found, sought = gram(rows), rows.double().T @ rows.double()
    assert found.dtype == torch.float32
    assert reference.relative_error(found, sought) < 3e-6
    assert torch.equal(other.float().T @ rows.float(), before)
    assert torch.backends.mkldnn.matmul.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "none"


def test_gram_that_was_accumulated_in_half_precision_is_refused():
    """Fewer tokens than features, rounded to bfloat16: eigenvalues that must be zero are not."""
    x = torch.randn(8, 64, dtype=torch.float64)
    gram = x.T @ x
    with pytest.warns(NumericalWarning, match="singular"):
        metric_root(shrink(gram.float(), 0.0))
    with pytest.raises(NumericalError, match="Accumulate statistics in float32"):
        metric_root(shrink(gram.bfloat16(), 0.0))
