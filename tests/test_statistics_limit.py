"""Statistics under a limit in bytes: what is kept as a sketch, what that costs, and a run with it in every phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import ARCHITECTURES, LLAMA, assert_bit_equal, make_trainer, settings, tensors, wrap
from peft import PeftModel, get_peft_model
from reference import relative_error
from test_resume import SCHEDULES, assert_resumes
from torch import Tensor, nn
from transformers import TrainerCallback

from lora_svd import LoraSVDCallback, LoraSVDConfig, LoraSVDError
from lora_svd.cli.report import TrainedRun
from lora_svd.decompositions.svd import weighted_svd
from lora_svd.importance import IMPORTANCES
from lora_svd.linalg import Metrics, gram, shrink
from lora_svd.statistics import STATISTICS
from lora_svd.statistics.limit import choose_sketches, statistics_bytes
from lora_svd.statistics.sketch import between, expand, sketched_gram

LIMITED = r"statistics_limit: in \d+ bytes"
ignore_limited = pytest.mark.filterwarnings(r"ignore:statistics_limit")
LARGE = {"up": (256, 64), "down": (64, 256), "wide": (64, 256), "square": (64, 64)}
GRAMS = ("output_gram", "input_gram")


# -- which -------------------------------------------------------------------------------------------------------------


@given(
    shapes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=8),
    importance=st.sampled_from(sorted(IMPORTANCES)),
    share=st.floats(0, 1.1),
)
def test_the_limit_is_kept_and_nothing_is_given_up_in_vain(
    shapes: list[tuple[int, int]], importance: str, share: float
) -> None:
    named, kept = {f"layer{i}": shape for i, shape in enumerate(shapes)}, IMPORTANCES[importance].statistics
    limit = int(share * statistics_bytes(named, kept))
    try:
        sketches = choose_sketches(named, kept, limit)
    except LoraSVDError:
        diagonals = {layer: {name: 0 for name in kept if STATISTICS[name].gram} for layer in named}
        assert statistics_bytes(named, kept, diagonals) > limit
        return
    assert statistics_bytes(named, kept, sketches) <= limit
    for layer, ranks in sketches.items():
        for name in ranks:
            others = {**sketches, layer: {of: rank for of, rank in ranks.items() if of != name}}
            assert statistics_bytes(named, kept, others) > limit


def test_output_grams_go_first_then_the_widest_inputs_and_the_deepest_layers() -> None:
    size = statistics_bytes(LARGE, GRAMS)
    assert choose_sketches(LARGE, GRAMS, None) == choose_sketches(LARGE, GRAMS, size) == {}
    assert choose_sketches(LARGE, GRAMS, size - 4) == {"up": {"output_gram": 16}}
    inputs, size = ("input_gram",), statistics_bytes(LARGE, ("input_gram",))
    assert choose_sketches(LARGE, inputs, size - 4) == {"wide": {"input_gram": 16}}
    assert choose_sketches(LARGE, inputs, size - 4 * 239 * 256 - 4) == {
        layer: {"input_gram": 16} for layer in ("down", "wide")
    }


def test_smaller_sketches_where_a_sixteenth_does_not_fit() -> None:
    shapes = {"a": (64, 640), "b": (64, 640)}
    for divisor, rank in ((16, 40), (64, 10), (256, 2), (2**62, 0)):
        limit = 2 * (4 * (640 // divisor + 1) * 640 + 24)
        assert choose_sketches(shapes, ("input_gram",), limit) == {key: {"input_gram": rank} for key in shapes}
    with pytest.raises(LoraSVDError, match=f"statistics_limit: got 5167, expected at least {2 * (4 * 640 + 24)} bytes"):
        choose_sketches(shapes, ("input_gram",), 5167)


# -- sketches ----------------------------------------------------------------------------------------------------------


def correlated(size: int, num_tokens: int, decay: float) -> Tensor:
    """Rows whose standard deviations in a random basis fall like ``i^-decay``, features of different scales."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    deviations = torch.arange(1, size + 1).float() ** -decay
    rows = (torch.randn(num_tokens, size, generator=generator) * deviations) @ basis.T
    return rows * torch.exp(0.7 * torch.randn(size, generator=generator))


def test_sketch_of_a_matrix_of_its_rank_is_exact() -> None:
    rows, A = torch.randn(5, 40), torch.randn(3, 40)
    exact = rows.double().T @ rows.double()
    sketch = sketched_gram(rows, 8)
    assert sketch.shape == (9, 40)
    assert relative_error(expand(sketch), exact) < 1e-5
    assert relative_error(between(A, sketch), A.double() @ exact @ A.double().T) < 1e-5


@pytest.mark.parametrize("rank", [0, 1, 6])
def test_sketch_stands_for_a_metric_with_the_right_diagonal(rank: int) -> None:
    rows, A = correlated(48, 500, 0.5), torch.randn(4, 48)
    exact, found = gram(rows).double(), expand(sketched_gram(rows, rank))
    assert relative_error(found.diagonal(), exact.diagonal()) < 1e-6
    assert float(torch.linalg.eigvalsh(found)[0]) > 0
    assert relative_error(between(A, sketched_gram(rows, rank)), A.double() @ found @ A.double().T) < 1e-9
    if rank == 0:
        assert torch.equal(found, found.diagonal().diag())
    assert not expand(torch.zeros(rank + 1, 48)).any()


def test_sketches_are_sums_over_tokens_and_the_same_on_every_machine() -> None:
    rows = torch.randn(30, 40)
    parts = sketched_gram(rows[:10], 4) + sketched_gram(rows[10:], 4)
    assert relative_error(parts, sketched_gram(rows, 4)) < 1e-6
    assert sketched_gram(torch.eye(5), 2)[:-1].tolist() == [[1, 1, 1, -1, 1], [-1, -1, -1, -1, 1]]


@pytest.mark.parametrize(("decay", "most"), [(0.5, 1.4), (1.0, 2.5)])
def test_factorization_with_a_sketch_is_near_the_best_and_with_the_diagonal_it_is_not(
    decay: float, most: float
) -> None:
    rows, weight = correlated(512, 4096, decay), torch.randn(128, 512).double()
    exact = gram(rows).double()

    def error(column: Tensor) -> float:
        rest = weight - weighted_svd(weight, Metrics(column=shrink(column, 1e-2)), 60).product()
        return float(((rest @ exact) * rest).sum())

    least, sketch, diagonal = (error(m) for m in (exact, expand(sketched_gram(rows, 32)), exact.diagonal().clone()))
    assert least <= sketch < most * least
    assert diagonal > 1.4 * sketch


# -- runs --------------------------------------------------------------------------------------------------------------


def kept_bytes(model: nn.Module) -> int:
    """Of the statistics, each layer's counted."""
    buffers = model.named_buffers(remove_duplicate=False)
    kept = [buffer for name, buffer in buffers if ".observer." in name]
    return sum(buffer.numel() * buffer.element_size() for buffer in kept)


class MostKept(TrainerCallback):
    """:func:`kept_bytes` at the end of the step that leaves most."""

    def __init__(self) -> None:
        self.bytes = 0

    def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.bytes = max(self.bytes, kept_bytes(model))


@pytest.mark.parametrize("importance", ["lora_activation", "kronecker"])
def test_statistics_of_a_run_stay_under_the_limit(importance: str, tmp_path: Path) -> None:
    most = MostKept()
    make_trainer(wrap(importance=importance), tmp_path, callbacks=[LoraSVDCallback(), most]).train()
    limit = int(0.8 * most.bytes)
    with pytest.warns(UserWarning, match=LIMITED) as caught:
        model = wrap(importance=importance, statistics_limit=limit, statistics_device="cpu")
    (said,) = {text for text in (str(warning.message) for warning in caught) if text.startswith("statistics_limit")}
    kept = MostKept()
    trainer = make_trainer(model, tmp_path, callbacks=[LoraSVDCallback(), kept])
    trainer.train()
    assert 0.5 * limit < kept.bytes <= limit
    trained = TrainedRun(model.base_model, trainer.state)
    share = sum(trained.sketched().values())
    assert 0 < share < 0.6
    assert f"with {share:.1%} of the targeted parameters" in said
    for name, layer in model.base_model.run().layers.items():
        is_sketched = any(t.dim() == 2 and t.shape[0] < t.shape[1] for t in layer.statistics("default").sums.values())
        assert is_sketched == (name in trained.sketched()) == (name in said)
    for param_ratio in (0.9, 0.4):
        model.base_model.set_param_ratio(param_ratio)
        assert param_ratio - 0.01 < model.base_model.current_param_ratio() <= param_ratio
    model.merge_and_unload()


def test_sketch_is_that_of_the_inputs() -> None:
    """Of the tokens that the whole statistics are of."""
    found = {}
    for limit in (None, 2000):
        torch.manual_seed(0)
        config = LoraSVDConfig(target_modules=["0"], importance="kronecker", statistics_limit=limit, param_ratio=0.5)
        base = nn.Sequential(nn.Linear(48, 32))
        if limit is None:
            model = get_peft_model(base, config)
        else:
            with pytest.warns(UserWarning, match=LIMITED):
                model = get_peft_model(base, config)
        x, mask = torch.randn(3, 30, 48), torch.arange(30) < 20
        (model(x).square().sum(-1) * mask).sum().backward()
        model.base_model.update_and_allocate(0, total_steps=10)
        found[limit] = model.base_model.model[0].statistics("default")
    assert found[2000].counts == found[None].counts == {"token": 60, "sample": 3, "step": 1}
    seen = x[:, :20].flatten(0, 1)
    assert relative_error(found[2000].sums["input_gram"], sketched_gram(seen, 3)) < 1e-5
    whole, sketched = (found[limit].mean("output_gram") for limit in (None, 2000))
    assert found[2000].sums["output_gram"].shape == (3, 32)
    assert relative_error(sketched.diagonal(), whole.diagonal()) < 1e-5


@ignore_limited
@pytest.mark.parametrize("importance", ["lora_activation", "kronecker"])
def test_resumed_run_with_sketches_ends_bit_equal(importance: str, tmp_path: Path) -> None:
    assert_resumes(tmp_path, importance=importance, statistics_limit=60_000, **SCHEDULES["one-shot"])


@ignore_limited
def test_adapter_with_sketches_is_loaded_and_needs_its_limit(tmp_path: Path) -> None:
    model = wrap(statistics_limit=60_000, **SCHEDULES["one-shot"])
    make_trainer(model, tmp_path, steps=12, save_strategy="steps", save_steps=4).train()
    start = tmp_path / "checkpoint-4"
    again = PeftModel.from_pretrained(LLAMA.build(), start, is_trainable=True)
    assert again.peft_config["default"].statistics_limit == 60_000
    assert kept_bytes(again) <= 60_000
    again.add_adapter("second", settings(statistics_limit=60_000))
    assert any(layer.adapter("second").observer.is_sketched for layer in again.base_model.run("second").layers.values())
    with pytest.raises(LoraSVDError, match=r"observer.signed_output_gram: has shape \(3, 32\) .* \(32, 32\)"):
        wrap(**SCHEDULES["one-shot"]).load_adapter(start, "default", is_trainable=True)
    other = wrap(ARCHITECTURES["llama"], **SCHEDULES["one-shot"], statistics_limit=60_000)
    make_trainer(other, tmp_path / "other", steps=12).train(resume_from_checkpoint=str(start))
    assert_bit_equal(tensors(other), tensors(model))


def test_statistics_device_holds_sums_and_not_counts() -> None:
    """The meta device stands for an accelerator."""
    for chosen, expected in (("cpu", "cpu"), (None, "meta")):
        config = LoraSVDConfig(target_modules=["0"], statistics_device=chosen)
        with torch.device("meta"):
            layer = get_peft_model(nn.Sequential(nn.Linear(5, 3)), config).base_model.model[0]
        adapter = layer.adapter("default")
        adapter.observer.add("gradient_rows", torch.ones(3, device="meta" if chosen is None else "cpu"), layer.shared)
        adapter.observer.count("step", 1, adapter.A.device)
        assert adapter.observer["gradient_rows"].device.type == expected
        assert adapter.observer["counts"].device.type == "meta"


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("statistics_limit", 0, "statistics_limit: got 0, expected a positive integer"),
        ("statistics_limit", 1.5, "statistics_limit: got 1.5, expected a positive integer"),
        ("statistics_device", "cuda", "statistics_device: got 'cuda', expected 'cpu' or None"),
    ],
)
def test_bad_values_are_refused(field: str, value: object, says: str) -> None:
    with pytest.raises(LoraSVDError, match=says):
        LoraSVDConfig(**{field: value})
