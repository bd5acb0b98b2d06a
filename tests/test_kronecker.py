"""Sums of Kronecker products against torch.kron, and a run with them from training to another process's reload."""

from __future__ import annotations

from pathlib import Path

import pytest
import reference
import torch
from models import (
    ARCHITECTURES,
    assert_bit_equal,
    assert_kept,
    assert_plain,
    logits,
    make_trainer,
    tensors,
    trained,
    wrap,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig

from lora_svd import LoraSVDError
from lora_svd.analysis.weights import folder_weights, model_weights
from lora_svd.compact import LowRankLinear, densify, parameter_report, save_compact
from lora_svd.compact.convert import factored_output
from lora_svd.decompositions import DECOMPOSITIONS, Factors, Split
from lora_svd.decompositions.kronecker import kronecker_split, split_metrics
from lora_svd.linalg import Metrics

KRONECKER = DECOMPOSITIONS["kronecker"]
FORM = {"decomposition": "kronecker", "factor_format": "factors"}
SHAPES = [(8, 12), (12, 8), (16, 16), (7, 5), (1, 6)]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def positive(size: int, kind: str = "full") -> torch.Tensor | None:
    root = normal(size, size + 2) * (1 + torch.arange(size))[:, None]
    return {"none": None, "diagonal": root[:, 0].square() + 0.1, "full": root @ root.T}[kind]


def error(difference: torch.Tensor, metrics: Metrics) -> float:
    return reference.loss(difference, metrics.row, metrics.column)


# -- mathematics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "split", [Split(4, 3, 2, 4), Split(2, 1, 4, 12), Split(1, 12, 8, 1), Split.none(8, 12)], ids=str
)
def test_rank_k_of_the_rearranged_matrix_is_a_sum_of_k_products(split: Split) -> None:
    left, right = normal(split.shape[0], 3), normal(3, split.shape[1])
    terms = [torch.kron(left[:, i].view(split.m1, split.n1), right[i].view(split.m2, split.n2)) for i in range(3)]
    weight = Factors(left, right, split).product()
    assert reference.relative_error(weight, sum(terms)) < 1e-14
    assert reference.relative_error(split.rearranged(weight), left @ right) == 0
    x, bias = normal(2, 5, 12), normal(8)
    expected = 3 * x @ weight.T + bias
    assert reference.relative_error(factored_output(x, Factors(left, right, split), bias, 3.0), expected) < 1e-13


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_of_as_many_terms_is_better(shape: tuple[int, int]) -> None:
    """The best by singular values of the rearranged matrix, written with loops, and random ones are worse."""
    weight, split = normal(*shape), kronecker_split(*shape)
    matrix = reference.rearranged(weight, split.m1, split.n1)
    squares = torch.linalg.svdvals(matrix).square()
    assert reference.relative_error(KRONECKER.spectrum(weight, Metrics()), squares) < 1e-10
    for rank in range(1, split.full_rank + 1):
        best = KRONECKER.factorize(weight, Metrics(), rank)
        left = float((weight - best.product()).square().sum())
        assert left == pytest.approx(float(squares[rank:].sum()), rel=1e-9, abs=1e-12)
        rival = Factors(best.left + 1e-3 * normal(*best.left.shape), best.right, split)
        assert float((weight - rival.product()).square().sum()) > left


@pytest.mark.parametrize("row", ["none", "diagonal", "full"])
@pytest.mark.parametrize("column", ["none", "diagonal", "full"])
def test_metrics_that_are_products_are_honoured_exactly(row: str, column: str) -> None:
    shape = (12, 16)
    split = kronecker_split(*shape)
    outer = {"row": positive(split.m1, row), "column": positive(split.n1, column)}
    inner = {"row": positive(split.m2, row), "column": positive(split.n2, column)}
    metrics = Metrics(**{side: None if outer[side] is None else torch.kron(outer[side], inner[side]) for side in outer})
    weight = normal(*shape)
    gains = KRONECKER.spectrum(weight, metrics)
    for rank in (1, 3, 6):
        found = error(weight - KRONECKER.factorize(weight, metrics, rank).product(), metrics)
        assert found == pytest.approx(float(gains[rank:].sum()), rel=1e-8)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_other_metrics_keep_their_trace_and_still_help(kind: str) -> None:
    weight = normal(16, 16)
    metrics = Metrics(positive(16, kind), positive(16, kind))
    split = kronecker_split(16, 16)
    near = split_metrics(metrics, split)
    traces = [reference.dense(m, 16).trace() for m in (metrics.row, metrics.column)]
    found = [reference.dense(m, size).trace() for m, size in zip((near.row, near.column), split.shape, strict=True)]
    assert float(found[0] * found[1]) == pytest.approx(float(traces[0] * traces[1]))
    errors = [error(weight - KRONECKER.factorize(weight, metrics, rank).product(), metrics) for rank in (2, 6, 12, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12 * errors[0]
    plain = KRONECKER.factorize(weight, Metrics(), 6).product()
    assert errors[1] < error(weight - plain, metrics)


def test_absorbed_bypass_is_the_best_sum_of_as_many_terms() -> None:
    weight, bypass = normal(16, 12), Factors(normal(16, 2), normal(2, 12))
    factors = KRONECKER.factorize(weight, Metrics(), 4)
    found = KRONECKER.absorb(factors, bypass, Metrics())
    total = factors.product() + bypass.product()
    assert found.rank == 4
    assert reference.relative_error(found.product(), KRONECKER.factorize(total, Metrics(), 4).product()) < 1e-12


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((384, 384), Split(192, 2, 2, 192)),
        ((1536, 384), Split(768, 1, 2, 384)),
        ((384, 1536), Split(384, 2, 1, 768)),
        ((576, 1536), Split(576, 2, 1, 768)),
        ((7, 5), Split.none(7, 5)),
        ((1, 1), Split.none(1, 1)),
    ],
)
def test_a_term_is_cheap_and_made_of_few_blocks(shape: tuple[int, int], expected: Split) -> None:
    assert kronecker_split(*shape) == expected
    assert sum(expected.shape) <= sum(shape)


# -- in a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_trains_merges_saves_and_loads(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = trained(tmp_path, architecture, train_factors=name == "gpt2", **FORM, **architecture.settings)
    expected = logits(model, architecture)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(architecture.build(), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, architecture), expected, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, architecture), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    compact = model.merge_and_unload()
    assert_plain(compact)
    assert_kept(compact, 0.6)
    low_rank = {name: module for name, module in compact.named_modules() if isinstance(module, LowRankLinear)}
    assert low_rank
    for module in low_rank.values():
        m1, n1 = module.split
        m2, n2 = module.out_features // m1, module.in_features // n1
        assert module.left.weight.numel() + module.right.weight.numel() == module.rank * (m1 * n1 + m2 * n2)
    answers = logits(compact, architecture)
    save_compact(compact, tmp_path / "compact")
    loaded = type(compact).from_pretrained(tmp_path / "compact")
    assert_bit_equal(tensors(loaded), tensors(compact))
    assert parameter_report(loaded) == parameter_report(compact)
    torch.testing.assert_close(logits(loaded, architecture), answers, rtol=1e-6, atol=1e-6)
    weights = folder_weights(tmp_path / "compact")
    assert {key: weights[key].rank for key in low_rank} == {key: module.rank for key, module in low_rank.items()}
    dense = densify(loaded)
    torch.testing.assert_close(logits(dense, architecture), answers, rtol=1e-4, atol=1e-5)
    written = model_weights(dense)
    assert all(reference.relative_error(written[key].read(), weights[key].read()) < 1e-6 for key in low_rank)


def test_another_size_and_a_resumed_run(tmp_path: Path) -> None:
    straight = wrap(train_factors=True, **FORM)
    make_trainer(straight, tmp_path / "straight", steps=6).train()
    stopped = wrap(train_factors=True, **FORM)
    make_trainer(stopped, tmp_path / "run", steps=6, save_strategy="steps", save_steps=4).train()
    resumed = wrap(train_factors=True, **FORM)
    make_trainer(resumed, tmp_path / "run", steps=6).train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    torch.testing.assert_close(logits(resumed), logits(straight), rtol=1e-4, atol=1e-5)
    resumed.base_model.set_param_ratio(0.4)
    assert_kept(resumed.merge_and_unload(), 0.4)


def test_a_lora_trains_on_it(tmp_path: Path) -> None:
    compact = trained(tmp_path, **FORM).merge_and_unload()
    before = logits(compact)
    lora = get_peft_model(compact, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    changed = logits(lora)
    assert not torch.allclose(changed, before, atol=1e-3)
    torch.testing.assert_close(logits(lora.merge_and_unload()), changed, rtol=1e-4, atol=1e-4)


def test_four_bits_are_refused(tmp_path: Path) -> None:
    model = trained(tmp_path, **FORM)
    with pytest.raises(LoraSVDError, match="decomposition: got 'kronecker' with a quantization_config"):
        model.merge_and_unload(quantization_config=BitsAndBytesConfig(load_in_4bit=True))


@pytest.mark.parametrize(
    ("split", "says"),
    [([5, 2], r"is split by \[5, 2\], expected divisors of"), ([0, 2], r"is split by \[0, 2\], expected two positive")],
)
def test_damaged_split(split: list[int], says: str, tmp_path: Path) -> None:
    compact = trained(tmp_path, **FORM).merge_and_unload()
    splits = compact.config.quantization_config.splits
    name = next(iter(splits))
    splits[name] = split
    compact.save_pretrained(tmp_path / "compact")
    with pytest.raises(LoraSVDError, match=f"^{name}: the compact checkpoint {says}"):
        type(compact).from_pretrained(tmp_path / "compact")
