"""Every fallback that changes an answer is said, by module, and reaches the report."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from models import LLAMA, make_trainer, settings
from peft import get_peft_model
from torch import nn

from lora_svd import NumericalError
from lora_svd.cli.report.messages import recorded_messages
from lora_svd.compact.convert import compact_module
from lora_svd.decompositions import DECOMPOSITIONS, Factors, elementwise, pivot
from lora_svd.decompositions.svd import truncate, weighted_spectrum, weighted_svd
from lora_svd.errors import NumericalWarning, in_module, warn_numerical
from lora_svd.linalg import Metrics, metric_root
from lora_svd.statistics.sketch import between, expand

UP = "model.layers.1.mlp.up_proj"


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_warnings_name_the_innermost_module() -> None:
    def work() -> None:
        warn_numerical("nowhere")
        with in_module("outer"):
            warn_numerical("one")
            with in_module("inner"):
                warn_numerical("two")
            with pytest.raises(NumericalError, match=r"^inner: three"), in_module("inner"):
                raise NumericalError("three")
            warn_numerical("four")

    with pytest.warns(NumericalWarning) as caught:
        work()
    assert [str(warning.message) for warning in caught] == ["nowhere", "outer: one", "inner: two", "outer: four"]


@pytest.mark.parametrize("metric", [torch.tensor([1.0, 0.0, 2.0]).double(), torch.ones(3, 3).double()])
def test_raised_eigenvalues(metric: torch.Tensor) -> None:
    with in_module("block.up"), pytest.warns(NumericalWarning, match=r"^block\.up: a metric is singular: \d of its 3"):
        metric_root(metric)


@pytest.mark.parametrize("side", ["row", "column"])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_indefinite_metric_of_either_side_is_an_error(side: str, shape: tuple[int, int]) -> None:
    """Also that of the longer side, of which no root is taken."""
    weight, size = normal(*shape), shape[side == "column"]
    basis = torch.linalg.qr(normal(size, size)).Q
    values = torch.linspace(1, -1, size, dtype=torch.float64)
    metrics = Metrics(**{side: basis @ values.diag() @ basis.T})
    with pytest.raises(NumericalError, match=r"^block\.up: indefinite metric: eigenvalues from"), in_module("block.up"):
        weighted_spectrum(weight, metrics)
    with pytest.raises(NumericalError, match=r"^block\.up: indefinite metric: eigenvalues from"), in_module("block.up"):
        weighted_svd(weight, metrics, 2)


def test_truncation_of_dependent_factors_is_exact_and_no_fallback() -> None:
    """A bypass within the factors' span leaves a direction that is none of the product."""
    left, right = normal(9, 3), normal(3, 7)
    doubled = Factors(torch.cat([left, left], dim=1), torch.cat([right, right]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = truncate(doubled, Metrics(), 3)
    torch.testing.assert_close(kept.product(), 2 * left @ right)


def test_pivots_that_run_out_of_exchanges() -> None:
    """Where they are few for the bound that is asked for; what they led to is still the same weight."""
    factors = Factors(normal(40, 20), normal(20, 30))
    with (
        in_module("block.up"),
        pytest.warns(NumericalWarning, match=r"^block\.up: pivoted factors of rank 20 .* 0\.5: "),
    ):
        stuck = pivot(factors, growth=0.5, exchanges=3)
    product = torch.cat([stuck.rows, stuck.coefficients @ stuck.rows])[stuck.order.argsort()]
    torch.testing.assert_close(product, factors.product())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(pivot(factors).coefficients.abs().max()) <= 2


def test_least_squares_that_do_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "SWEEPS", 1)
    metrics = Metrics(elements=torch.rand(12, 8).double() ** 8)
    with in_module("block.up"), pytest.warns(NumericalWarning, match=r"^block\.up: alternating least squares"):
        DECOMPOSITIONS["elementwise"].factorize(normal(12, 8), metrics, 3)


def test_sketch_of_no_gram_matrix_is_an_error() -> None:
    sketch = torch.cat([-torch.rand(3, 8), torch.ones(1, 8)])
    for use in (lambda: expand(sketch), lambda: between(torch.ones(2, 8), sketch)):
        with pytest.raises(NumericalError, match=r"^block\.up: indefinite metric"), in_module("block.up"):
            use()


@pytest.mark.parametrize("factor_format", ["pivoted", "factors"])
def test_factors_that_overflow_are_an_error(factor_format: str) -> None:
    base = nn.Linear(6, 5, dtype=torch.float16)
    factors = Factors(1e5 * normal(5, 2), 1e6 * normal(2, 6))
    with pytest.raises(NumericalError, match=r"^up: its factors have numbers that torch\.float16 can"), in_module("up"):
        compact_module(factors, base, base.weight, factor_format)


def test_fallbacks_are_in_the_report(tmp_path: Path) -> None:
    """In a run whose metrics are singular, since one feature of the inputs is always zero and nothing is shrunk."""
    model = get_peft_model(
        LLAMA.build(),
        settings(importance="kronecker", target_modules=["up_proj"], warmup=2, row_shrinkage=0.0, column_shrinkage=0.0),
    )
    layer = model.get_submodule(f"base_model.model.{UP}")
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * (torch.arange(32) != 5), *inputs[1:]))
    with warnings.catch_warnings(record=True), recorded_messages() as messages:
        warnings.simplefilter("always")
        make_trainer(model, tmp_path, steps=4).train()
        model.merge_and_unload()
    said = [text for (category, text), _ in messages.items() if category == "NumericalWarning"]
    assert said
    assert all(text.split(": ")[0].endswith("up_proj") and "a metric is singular" in text for text in said)
