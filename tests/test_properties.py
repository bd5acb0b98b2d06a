"""Whatever is asked for either works to the end or is refused with a reason: generated models and configurations.

A few hundred cases in every run; ``make test-extended`` generates more than ten thousand.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import transformers as tf
from hypothesis import event, given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, assert_bit_equal
from peft import PeftModel, get_peft_model
from strategies import Case, Net, cases, refusals
from tiny_net import TinyNet, TinyNetConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_svd import LoraSVDCallback, LoraSVDConfig, LoraSVDError, NumericalError
from lora_svd.allocation import ALLOCATIONS, FACTOR_FORMATS, Choice, LayerShape, allocate, budget_of, kept_parameters
from lora_svd.compact import LowRankLinear, parameter_report
from lora_svd.compact.description import LoraSVDCompactConfig
from lora_svd.decompositions import pivot
from lora_svd.decompositions.svd import truncate, weighted_spectrum, weighted_svd
from lora_svd.linalg import Metrics

SEED = torch.default_generator.manual_seed  # torch.manual_seed asks for accelerators, which takes longer than a step
DATA = torch.tensor([[0, 1, 2], [3, 4, 0], [1, 3, 3]])
KNOWN_WARNINGS = (
    "was zero in every observed step",
    "a metric is singular",
    "r = 1 leaves nothing of the gradient",
    "alternating least squares of a weight of",
    "(rank|alpha)_pattern keys did not match any targeted module",  # the rest are PEFT's
    "no modules were excluded",
    "a tied layer is part of the adapter, but no implementation exists to tie the adapters",
    r"and the tied_target_modules=\['lm_head'\] are part of the adapter",
    "Input and output embeddings are no longer tied after merging",
    "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`",
)


def build(net: Net) -> tf.PreTrainedModel:
    """The same model every time."""
    SEED(0)
    if net.family == "llama":
        small = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 12}
        return ARCHITECTURES["llama"].build(hidden_size=8, tie_word_embeddings=net.tied, **small)
    if net.family == "gpt2":
        config = tf.GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=net.tied)
        return tf.GPT2LMHeadModel(config).eval()
    blocks: Any = copy.deepcopy(net.blocks)
    model = TinyNet(TinyNetConfig(net.width, blocks, tie_word_embeddings=net.tied)).eval()
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.weight.data = _weight(module.weight.data, net.weights)
    return model.to(getattr(torch, net.dtype))


def _weight(weight: Tensor, kind: str) -> Tensor:
    if kind == "rank one":
        return weight[:1] * torch.linspace(-1, 1, len(weight))[:, None]
    return weight * {"random": 1.0, "zero": 0.0, "tiny": 1e-20, "large": 1e3}[kind]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=DATA).logits.float()


def train(model: PeftModel, case: Case, folder: Path) -> None:
    """All optimizer steps of the run, by hand or in a Trainer."""
    steps = case.fields["total_steps"]
    if case.trainer:
        arguments = tf.TrainingArguments(
            str(folder / "run"),
            max_steps=steps,
            learning_rate=1e-2,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            report_to=[],
        )
        data = [{"input_ids": row, "labels": row} for row in DATA]
        tf.Trainer(model, arguments, train_dataset=data, callbacks=[LoraSVDCallback()]).train()
        return
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        rows = DATA.roll(step, dims=0)[:2]
        model(input_ids=rows, labels=rows).loss.backward()
        model.base_model.update_and_allocate(step, optimizer=optimizer)
        optimizer.step()
        optimizer.zero_grad()


def run(case: Case, folder: Path) -> None:
    """Train, save and load the adapter, choose another size, merge, save and load the compact model."""
    SEED(case.seed)
    model = get_peft_model(build(case.net), LoraSVDConfig(**copy.deepcopy(case.fields)))
    train(model, case, folder)
    if case.resumed:
        trained = logits(model)
        model.save_pretrained(folder / "adapter")
        model = PeftModel.from_pretrained(build(case.net), folder / "adapter", is_trainable=True)
        close(logits(model), trained, 1e-5)
    if case.resized is not None:
        model.base_model.set_param_ratio(case.resized)
    trained = logits(model)
    compact = model.merge_and_unload(compact=case.compact)
    merged = logits(compact)
    assert all(torch.isfinite(value).all() for value in compact.state_dict().values())
    asked = case.fields["param_ratio"] if case.resized is None else case.resized
    assert parameter_report(compact).param_ratio <= (asked + 1e-9 if case.compact else 1)
    low_rank = [name for name, module in compact.named_modules() if isinstance(module, LowRankLinear)]
    assert not low_rank or (case.compact and asked < 1)
    is_kept = asked == 1 or (case.compact and case.fields["compensation"] == "keep")
    if is_kept and case.net.dtype == "float32":
        close(merged, trained, 2e-3)
    compact.save_pretrained(folder / "compact")
    again, info = type(compact).from_pretrained(folder / "compact", output_loading_info=True)
    assert not any(info.values())
    assert_bit_equal(again.state_dict(), compact.state_dict())
    close(logits(again), merged, 1e-5)
    assert parameter_report(again) == parameter_report(compact)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal but for rounding, which depends on where tensors lie in memory; relative to the largest number."""
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max()) + 1e-6


def outcome(case: Case) -> ValueError | None:
    """The error with which the case is refused; nothing else may be raised, and no unknown warning given."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        for known in KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message=f".*{known}")
        try:
            run(case, Path(folder))
        except ValueError as error:
            return error
    return None


def explains(error: ValueError, fields: dict[str, Any]) -> bool:
    """Whether a field is named together with its value; PEFT's own errors name the field."""
    text = str(error).lower().replace("target modules", "target_modules")
    named = [name for name in fields if re.search(rf"\b{name}\b", text)]
    if not isinstance(error, LoraSVDError):
        return bool(named)
    return any(isinstance(fields[name], dict) or str(fields[name]).lower() in text for name in named)


def check(case: Case) -> None:
    error = outcome(case)
    event("accepted" if error is None else "refused")
    if error is None:
        return
    if isinstance(error, NumericalError):  # numbers whose squares leave float32, in a layer that is named
        reasonable = case.net.weights in ("tiny", "large") and "blocks." in str(error)
    elif "had no part in the loss" in str(error):  # of layers that are named, behind numbers that saturate
        reasonable = case.net.weights in ("zero", "large") and "blocks." in str(error)
    else:
        reasonable = any(explains(error, fields) for fields in (case.fields, {"param_ratio": case.resized}))
    if not reasonable:
        raise error


@given(cases())
def test_a_valid_configuration_works_to_the_end_or_says_why_not(case: Case) -> None:
    check(case)


@settings(max_examples=settings().max_examples // 10)
@given(cases(families=("llama", "gpt2")))
def test_a_language_model_works_to_the_end_or_says_why_not(case: Case) -> None:
    check(case)


@settings(max_examples=settings().max_examples * 3 // 2)
@given(refusals())
def test_a_wrong_value_is_refused_by_field_and_value(case: Case) -> None:
    assert case.expected is not None
    name, value = case.expected
    with pytest.raises(ValueError, match="(?i)" + name.replace("_", "[_ ]")) as caught:
        raise outcome(case) or AssertionError(f"{name}={value!r} was accepted")
    event(f"{name}: {type(caught.value).__name__}")
    if isinstance(caught.value, LoraSVDError):
        assert str(value) in str(caught.value)


# -- pure functions ----------------------------------------------------------------------------------------------------


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Metrics]:
    """A weight with some decay of its spectrum, and metrics of every kind."""
    SEED(draw(st.integers(0, 10**6)))
    out_features, in_features = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    scale = draw(st.sampled_from([1e-12, 1.0, 1e9]))
    decay = draw(st.sampled_from([1.0, 0.5, 0.1])) ** torch.arange(in_features, dtype=torch.float64)
    weight = scale * torch.randn(out_features, in_features, dtype=torch.float64) * decay
    kinds = st.sampled_from(["none", "diagonal", "full"])
    return weight, Metrics(_metric(draw(kinds), out_features), _metric(draw(kinds), in_features))


def _metric(kind: str, size: int) -> Tensor | None:
    if kind == "none":
        return None
    root = torch.randn(size, size + 2, dtype=torch.float64)
    return root[:, 0].square() + 0.01 if kind == "diagonal" else root @ root.T / size + 0.01 * torch.eye(size)


@given(weights(), st.data())
def test_truncations_leave_the_tail_of_the_spectrum(given_weight: tuple[Tensor, Metrics], data: st.DataObject) -> None:
    weight, metrics = given_weight
    spectrum = weighted_spectrum(weight, metrics)
    rank = data.draw(st.integers(1, len(spectrum)))
    best = weighted_svd(weight, metrics, rank)
    whole = weighted_svd(weight, metrics, len(spectrum))
    for factors in (best, truncate(whole, metrics, rank)):
        assert factors.rank == rank
        error = reference.loss(weight - factors.product(), metrics.row, metrics.column)
        assert error == pytest.approx(float(spectrum[rank:].sum()), rel=1e-6, abs=1e-11 * float(spectrum.sum()))


@given(weights(), st.data())
def test_pivoted_factors_are_the_same_weight_in_fewer_numbers(
    given_weight: tuple[Tensor, Metrics], data: st.DataObject
) -> None:
    weight, metrics = given_weight
    rank = data.draw(st.integers(1, min(weight.shape)))
    factors = weighted_svd(weight, metrics, rank)
    pivoted = pivot(factors)
    assert sorted(pivoted.order.tolist()) == list(range(len(weight)))
    assert not pivoted.coefficients.numel() or float(pivoted.coefficients.abs().max()) < 2.01
    assert pivoted.rows.numel() + pivoted.coefficients.numel() == rank * sum(weight.shape) - rank**2
    stored = torch.cat([pivoted.rows, pivoted.coefficients @ pivoted.rows])
    scale = float(weight.abs().max())
    torch.testing.assert_close(stored / scale, factors.product()[pivoted.order] / scale, rtol=0, atol=1e-9)


TEXT = st.text('ab._0é"\\\n ', max_size=8)


@st.composite
def budgets(draw: st.DrawFn) -> tuple[dict[str, LayerShape], dict[str, Tensor], dict[str, Any]]:
    shapes, spectra = {}, {}
    for index in range(draw(st.integers(1, 6))):
        shape = LayerShape(draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.sampled_from([0, 0, 3])))
        decay = draw(st.floats(0, 1)) ** torch.arange(shape.full_rank, dtype=torch.float64)
        shapes[f"layer{index}"], spectra[f"layer{index}"] = shape, 10 ** draw(st.floats(-6, 6)) * decay
    choices = {"factor_format": FACTOR_FORMATS, "allocation": tuple(ALLOCATIONS), "rank_multiple": (1, 4, 8)}
    return shapes, spectra, {name: draw(st.sampled_from(values)) for name, values in choices.items()}


@given(budgets(), st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_larger_budget_keeps_no_more_than_it_is_and_no_less(
    problem: tuple[dict[str, LayerShape], dict[str, Tensor], dict[str, Any]], first: float, second: float
) -> None:
    shapes, spectra, chosen = problem
    units = {name: [Choice(None, 0.0, {name: spectra[name]}, {name: shape})] for name, shape in shapes.items()}
    errors = []
    for share in sorted((first, second)):
        try:
            ranks = allocate(units, param_ratio=share, **chosen).ranks
        except LoraSVDError as error:
            assert f"param_ratio: {share} allows" in str(error)  # noqa: PT017 - a smaller budget may be met all the same
            assert not errors
            continue
        assert kept_parameters(ranks, shapes, chosen["factor_format"]) <= budget_of(shapes, share)
        dense = {name for name, shape in shapes.items() if ranks[name] >= shape.full_rank}
        errors.append(sum(float(spectra[name][ranks[name] :].sum()) for name in shapes if name not in dense))
    assert len(errors) < 2 or errors[1] <= errors[0] * (1 + 1e-9)


@given(
    st.dictionaries(TEXT, st.integers(1, 10**6)),
    st.sampled_from(FACTOR_FORMATS),
    st.integers(0, 2**63),
    st.lists(TEXT),
)
def test_what_a_checkpoint_says_of_itself_survives_json(
    ranks: dict[str, int], factor_format: str, numbers: int, names: list[str]
) -> None:
    config = LoraSVDCompactConfig(ranks, factor_format, numbers, numbers // 2, {"importance": "none"}, None, names)
    again = LoraSVDCompactConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
