"""Weights in every form and the features that processes hold, against whole matrices; no engine runs."""

from __future__ import annotations

import pytest
import torch
from lora_svd_vllm.division import Span, features_here
from lora_svd_vllm.weights import FusedProduct, Weight
from torch import Tensor, nn

OUT, IN, RANK = 12, 10, 4
FORMS = ("dense", "factors", "pivoted")


def weight(form: str, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    if form == "dense":
        return Weight(torch.randn(OUT, IN, generator=generator))
    right = torch.randn(RANK, IN, generator=generator)
    if form == "factors":
        return Weight(right, torch.randn(OUT, RANK, generator=generator))
    left = torch.randn(OUT - RANK, RANK, generator=generator)
    return Weight(right, left, torch.randperm(OUT, generator=generator))


def linear(matrix: Tensor) -> nn.Linear:
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    layer.weight = nn.Parameter(matrix)
    return layer


@pytest.mark.parametrize("form", FORMS)
def test_rows_and_columns(form: str) -> None:
    """Some in another order, and zeros in the place of some."""
    given = weight(form)
    whole = given.matrix()
    rows, columns = torch.tensor([7, -1, 0, 11, -1]), torch.tensor([-1, 3, 9])
    expected = whole[rows][:, columns]
    expected[[1, 4]] = 0
    expected[:, 0] = 0
    torch.testing.assert_close(given.rows(rows).columns(columns).matrix(), expected)
    torch.testing.assert_close(given.expanded().rows(rows).columns(columns).matrix(), expected)


def test_a_process_has_the_pivoted_coefficients_of_its_rows_alone() -> None:
    given = weight("pivoted")
    part = given.rows(torch.arange(0, 6))
    own = int((given.order[:6] >= RANK).sum())
    assert part.left.shape == (own, RANK)
    assert own < OUT - RANK


def test_expansion_costs_the_square_of_the_rank() -> None:
    given, expanded = weight("pivoted"), weight("pivoted").expanded()
    assert expanded.order is None
    assert expanded.left.numel() - given.left.numel() == RANK**2


@pytest.mark.parametrize("forms", [*[(form,) for form in FORMS], ("pivoted", "dense", "factors"), ("dense", "factors")])
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_fused_product(forms: tuple[str, ...], shape: tuple[int, ...]) -> None:
    weights = [weight(form, seed) for seed, form in enumerate(forms)]
    x = torch.randn(*shape, IN)
    expected = torch.cat([x @ of.matrix().T for of in weights], dim=-1)
    torch.testing.assert_close(FusedProduct(weights, linear)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("forms", [("factors",), ("pivoted",)])
def test_sum_over_processes_before_left(forms: tuple[str, ...]) -> None:
    (form,) = forms
    given, x = weight(form), torch.randn(3, IN)
    halves = [torch.arange(0, 5), torch.arange(5, 10)]
    products = [FusedProduct([given.columns(half)], linear) for half in halves]
    hidden = sum(product.stem(x[:, half]) for product, half in zip(products, halves, strict=True))
    products[0].reduce = lambda _: hidden
    torch.testing.assert_close(products[0](x[:, halves[0]]), x @ given.matrix().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("kept", "chunks"), [(24, 1), (6, 1), (24, 2), (12, 2)])
def test_processes_have_every_feature_once(count: int, kept: int, chunks: int) -> None:
    """Narrow, each has the like of the others; whole, zeros stand where features are gone."""
    dense = 24
    starts = range(0, dense, dense // chunks)
    spans = [[Span(start, dense // chunks, index, count) for start in starts] for index in range(count)]
    narrow = [features_here(dense, kept, chunks, of, narrow=True) for of in spans]
    assert sorted(torch.cat(narrow).tolist()) == list(range(kept))
    assert len({len(part) for part in narrow}) == 1
    whole = [features_here(dense, kept, chunks, of, narrow=False) for of in spans]
    stored = torch.cat(whole)
    assert len(stored) == dense
    assert sorted(stored[stored >= 0].tolist()) == list(range(kept))
    per_chunk = kept // chunks
    expected = [[*range(i * per_chunk, (i + 1) * per_chunk), *[-1] * ((dense - kept) // chunks)] for i in range(chunks)]
    for chunk in range(chunks):
        width = dense // chunks // count
        joined = torch.cat([part[chunk * width : (chunk + 1) * width] for part in whole])
        assert joined.tolist() == expected[chunk]
