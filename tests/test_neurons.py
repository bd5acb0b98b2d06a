"""Neurons priced with ranks: the mathematics against dense references, the groups that are found, and the product."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    ARCHITECTURES,
    LLAMA,
    assert_bit_equal,
    assert_kept,
    assert_plain,
    logits,
    make_trainer,
    settings,
    tensors,
    trained,
    wrap,
)
from peft import PeftModel, get_peft_model
from reference import relative_error
from torch import Tensor, nn

from lora_svd import LoraSVDError
from lora_svd.allocation import Choice, LayerShape, allocate, budget_of, kept_parameters
from lora_svd.compact import densify, parameter_report
from lora_svd.compression import choose_size
from lora_svd.decompositions.svd import weighted_spectrum
from lora_svd.groups import GroupSearch, found_groups
from lora_svd.inputs import CompressionSettings
from lora_svd.linalg import Metrics
from lora_svd.neurons import GroupWeights, NeuronGroup, eliminate, eliminate_heads, refit, width_spectra, widths

GROUP = NeuronGroup("down", ("gate", "up"))


def definite(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * size, size, dtype=torch.float64, generator=generator)
    return rows.T @ rows / size + 0.1 * torch.eye(size, dtype=torch.float64)


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def diagonal(size: int, seed: int) -> Tensor:
    return definite(size, seed).diagonal().clone()


def cost_of_set(weight: Tensor, metrics: Metrics, gone: Tensor) -> float:
    """What leaving out a set costs at best, by least squares over everything."""
    row = torch.eye(len(weight), dtype=torch.float64) if metrics.row is None else metrics.row
    row = torch.diag(row) if row.dim() == 1 else row
    column = metrics.column
    assert column is not None
    column = torch.diag(column) if column.dim() == 1 else column
    kept = torch.tensor([i for i in range(weight.shape[1]) if i not in gone.tolist()])
    best = torch.zeros_like(weight)
    best[:, kept] = torch.linalg.lstsq(column[kept][:, kept], (weight @ column)[:, kept].T).solution.T
    error = weight - best
    return float((row @ error @ column @ error.T).trace())


METRICS = [
    pytest.param(Metrics(diagonal(7, 1), definite(150, 2)), id="diagonal rows"),
    pytest.param(Metrics(definite(7, 1), definite(150, 2)), id="full"),
    pytest.param(Metrics(None, definite(150, 2)), id="inputs alone"),
    pytest.param(Metrics(definite(7, 1), diagonal(150, 2)), id="diagonal inputs"),
]


@pytest.mark.parametrize("metrics", METRICS)
def test_costs_of_the_steps_add_up_to_the_cost_of_the_set(metrics: Metrics) -> None:
    """Over several blocks of 64, at which whole matrices are brought up to date."""
    weight = matrix(7, 150, 3)
    found = eliminate(weight, metrics, 4)
    assert len(found.order) == len(found.order.unique()) == 146
    for number in (1, 5, 64, 65, 130, 146):
        expected = cost_of_set(weight, metrics, found.order[:number])
        assert float(found.costs[:number].sum()) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("metrics", METRICS)
def test_each_step_leaves_out_the_cheapest(metrics: Metrics) -> None:
    weight = matrix(7, 150, 3)
    found = eliminate(weight, metrics, 147)
    for step in range(3):
        before = found.order[:step]
        left = [j for j in range(150) if j not in before.tolist()]
        costs = {j: cost_of_set(weight, metrics, torch.tensor([*before.tolist(), j])) for j in left}
        assert min(costs, key=lambda j: costs[j]) == int(found.order[step])


def test_refit_is_the_least_squares_weight() -> None:
    weight, metric = matrix(5, 12, 1), definite(12, 2)
    kept = torch.tensor([0, 3, 4, 9])
    expected = torch.linalg.lstsq(metric[kept][:, kept], (weight @ metric)[:, kept].T).solution.T
    assert relative_error(refit(weight, metric, kept), expected) < 1e-12
    assert torch.equal(refit(weight, metric.diagonal(), kept), weight[:, kept])


@pytest.mark.parametrize("full_rows", [False, True])
def test_spectra_are_those_of_what_is_left(full_rows: bool) -> None:
    rows = definite if full_rows else diagonal
    weights = {"gate": matrix(40, 6, 1), "up": matrix(80, 6, 2), "down": matrix(8, 40, 3)}
    metrics = {
        "gate": Metrics(rows(40, 4), definite(6, 5)),
        "up": Metrics(rows(80, 6), definite(6, 5)),
        "down": Metrics(rows(8, 7), definite(40, 8)),
    }
    found = eliminate(weights["down"], metrics["down"], 4)
    for width, error, spectra in width_spectra(GroupWeights(GROUP, weights, metrics), found, [4, 24, 40]):
        kept = found.kept(width, 40)
        assert len(kept) == width
        assert error == pytest.approx(float(found.costs[: 40 - width].sum()), rel=1e-12)
        for name in GROUP.producers:
            index = GROUP.features(kept, len(weights[name]), 40)
            assert torch.equal(index % 40, kept.repeat(len(weights[name]) // 40))
            expected = weighted_spectrum(weights[name][index], metrics[name].narrowed(rows=index))
            assert relative_error(spectra[name], expected) < 1e-10
        narrow = metrics["down"].narrowed(columns=kept)
        expected = weighted_spectrum(refit(weights["down"], metrics["down"].column, kept), narrow)
        assert relative_error(spectra["down"], expected) < 1e-10


@pytest.mark.parametrize(
    "metrics",
    [
        Metrics(definite(7, 1), definite(24, 2)),
        Metrics(None, definite(24, 2)),
        Metrics(diagonal(7, 1), diagonal(24, 2)),
    ],
)
def test_heads_are_left_out_as_sets_of_features(metrics: Metrics) -> None:
    weight = matrix(7, 24, 3)
    found = eliminate_heads(weight, metrics, heads=6, least=1)
    parts = torch.arange(24).view(6, 4)
    for number in range(1, 6):
        before, head = found.order[: number - 1].tolist(), int(found.order[number - 1])
        costs = {i: cost_of_set(weight, metrics, parts[[*before, i]].flatten()) for i in {*range(6)} - {*before}}
        assert min(costs, key=lambda i: costs[i]) == head
        assert float(found.costs[:number].sum()) == pytest.approx(costs[head], rel=1e-9)
    row = Metrics(row=metrics.row).row
    removed = found.removed if row is None else (row.diag() if row.dim() == 1 else row) @ found.removed
    assert float((removed * found.removed).sum()) == pytest.approx(float(found.costs.sum()), rel=1e-9)


def test_spectra_of_heads_are_those_of_what_is_left() -> None:
    group = NeuronGroup("out", ("key", "query"), heads=3)
    weights = {"key": matrix(6, 5, 1), "query": matrix(12, 5, 2), "out": matrix(8, 12, 3)}
    metrics = {name: Metrics(definite(len(of), 4), definite(of.shape[1], 5)) for name, of in weights.items()}
    given = GroupWeights(group, weights, metrics)
    found = given.eliminated(1)
    for width, _, spectra in width_spectra(given, found, [1, 2, 3]):
        kept = found.kept(width, 3)
        for name, block in (("key", 2), ("query", 4)):
            index = torch.cat([torch.arange(block * i, block * (i + 1)) for i in kept.tolist()])
            assert torch.equal(group.features(kept, len(weights[name]), 3), index)
            expected = weighted_spectrum(weights[name][index], metrics[name].narrowed(rows=index))
            assert relative_error(spectra[name], expected) < 1e-10
        columns = group.features(kept, 12, 3)
        left = refit(weights["out"], metrics["out"].column, columns)
        expected = weighted_spectrum(left, metrics["out"].narrowed(columns=columns))
        assert relative_error(spectra["out"], expected) < 1e-10


def test_widths_are_multiples_and_few() -> None:
    assert widths(1536, 8) == list(range(128, 1537, 128))
    assert widths(4864, 8) == [*range(448, 4864, 448), 4864]
    assert widths(300, 24) == [192, 300]
    assert widths(48, 8) == [8, 16, 24, 32, 40, 48]
    assert widths(50, 8) == [8, 16, 24, 32, 40, 48, 50]
    assert widths(7, 8) == [7]


def a_unit(seed: int) -> list[Choice]:
    """What a small group can keep."""
    weights = {f"gate{seed}": matrix(32, 8, seed), f"down{seed}": matrix(8, 32, seed + 1)}
    metrics = {name: Metrics(diagonal(len(of), 1), definite(of.shape[1], 2)) for name, of in weights.items()}
    group = NeuronGroup(f"down{seed}", (f"gate{seed}",))
    found = eliminate(weights[group.consumer], metrics[group.consumer], 4)
    choices = []
    for width, error, spectra in width_spectra(GroupWeights(group, weights, metrics), found, range(4, 33, 4)):
        neurons = None if width == 32 else found.kept(width, 32)
        shapes = {f"gate{seed}": LayerShape(width, 8), f"down{seed}": LayerShape(8, width)}
        choices.append(Choice(neurons, error, spectra, shapes))
    return choices


@pytest.mark.parametrize("factor_format", ["pivoted", "factors"])
@pytest.mark.parametrize("param_ratio", [0.2, 0.4, 0.6, 0.8, 0.95, 1.0])
def test_one_budget_never_predicts_more_than_ranks_alone(param_ratio: float, factor_format: str) -> None:
    units = {f"down{seed}": a_unit(seed) for seed in (0, 10, 20)}
    form = {"param_ratio": param_ratio, "factor_format": factor_format, "rank_multiple": 1}
    found = allocate(units, **form)
    whole = {name: choices[-1:] for name, choices in units.items()}
    alone = allocate(whole, **form)
    assert found.error <= alone.error
    assert not alone.neurons
    shapes = {name: shape for (choice,) in whole.values() for name, shape in choice.shapes.items()}
    spectra = {name: of for (choice,) in whole.values() for name, of in choice.spectra.items()}
    apart = {name: [Choice(None, 0.0, {name: spectra[name]}, {name: shape})] for name, shape in shapes.items()}
    assert alone.ranks == allocate(apart, **form).ranks
    kept = {}
    for name, choices in units.items():
        size = len(found.neurons[name]) if name in found.neurons else 32
        kept |= next(c for c in choices if size == (32 if c.neurons is None else len(c.neurons))).shapes
    assert kept_parameters(found.ranks, kept, factor_format) <= budget_of(shapes, param_ratio)
    if param_ratio == 1:
        assert not found.neurons


# -- groups ------------------------------------------------------------------------------------------------------------

# By the end of the consumer's name, the ends of its producers' names.
EXPECTED = {
    "llama": {"mlp.down_proj": ("mlp.gate_proj", "mlp.up_proj")},
    "mistral": {"mlp.down_proj": ("mlp.gate_proj", "mlp.up_proj")},
    "qwen2": {"mlp.down_proj": ("mlp.gate_proj", "mlp.up_proj")},
    "qwen3": {"mlp.down_proj": ("mlp.gate_proj", "mlp.up_proj")},
    "gemma2": {"mlp.down_proj": ("mlp.gate_proj", "mlp.up_proj")},
    "gemma3": {"mlp.down_proj": ("mlp.gate_proj", "mlp.up_proj")},
    "phi": {"mlp.fc2": ("mlp.fc1",)},
    "phi3": {"mlp.down_proj": ("mlp.gate_up_proj",)},
    "gpt2": {"mlp.c_proj": ("mlp.c_fc",)},
    "gpt_neox": {"mlp.dense_4h_to_h": ("mlp.dense_h_to_4h",)},
    "opt": {"fc2": ("fc1",)},
    "falcon": {"mlp.dense_4h_to_h": ("mlp.dense_h_to_4h",)},
    "t5": {"DenseReluDense.wo": ("DenseReluDense.wi",)},
    "bart": {"fc2": ("fc1",)},
    "whisper": {"fc2": ("fc1",)},
    "bert": {"output.dense": ("intermediate.dense",), "classifier": ("pooler.dense",)},
    "deberta": {"output.dense": ("intermediate.dense",), "classifier": ("pooler.dense",)},
    "vit": {"mlp.fc2": ("mlp.fc1",)},
    "clip": {"mlp.fc2": ("mlp.fc1",)},
}
# Key-value heads, where attention runs with fewer: not where it reads their number from the config.
EXPECTED_HEADS = {
    **{name: {2} for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi")},
    **{name: {4} for name in ("gpt_neox", "bart", "bert", "vit", "clip")},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_of_every_architecture(name: str, tmp_path: Path) -> None:
    """Found in the first step; then compressed, merged, saved and loaded, and the same to the bit."""
    architecture = ARCHITECTURES[name]
    model = trained(tmp_path, architecture, warmup=2, steps=4, param_ratio=0.5)
    config: Any = model.peft_config["default"]
    heads = config.group_heads or {}
    assert set(heads.values()) == EXPECTED_HEADS.get(name, set())
    assert all(len(config.neuron_groups[consumer]) == (1 if name == "gpt_neox" else 3) for consumer in heads)
    groups = {consumer: of for consumer, of in config.neuron_groups.items() if consumer not in heads}
    for consumer, producers in groups.items():
        ends = next(of for end, of in EXPECTED[name].items() if consumer.endswith(end))
        assert len(producers) == len(ends)
        assert all(producer.endswith(end) for producer, end in zip(producers, ends, strict=True))
    consumers = {n for n, _ in model.base_model.model.named_modules() if n.endswith(tuple(EXPECTED[name]))}
    layers = model.base_model.run().layers
    named = {n for n in consumers if n in layers and "attention" not in n}
    assert set(groups) == named
    assert groups
    compact = model.merge_and_unload()
    assert_plain(compact)
    assert parameter_report(compact).param_ratio <= 0.5
    expected = logits(compact, architecture)
    compact.save_pretrained(tmp_path / "compact")
    again = architecture.model.from_pretrained(tmp_path / "compact")
    assert torch.equal(logits(again, architecture), expected)
    assert parameter_report(again) == parameter_report(compact)
    torch.testing.assert_close(logits(densify(again), architecture), expected, rtol=1e-4, atol=1e-5)


class Net(nn.Module):
    """x -> up -> what the test puts in between -> down."""

    def __init__(self, between: Any, width: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, width), nn.Linear(12, 6)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(torch.tanh(self.first(x)))))


def groups_in(net: nn.Module, **changes: Any) -> Any:
    given = {"target_modules": ["up", "down"], "warmup": 2, "total_steps": 4, **changes}
    model = get_peft_model(net, settings(**given))
    torch.manual_seed(1)
    model.train()(torch.randn(4, 6)).square().sum().backward()
    model.base_model.update_and_allocate(0)
    return model.peft_config["default"].neuron_groups


GATE = nn.Parameter(torch.ones(12), requires_grad=False)


@pytest.mark.parametrize(
    ("between", "width"),
    [
        (torch.relu, 12),
        (nn.functional.gelu, 12),
        (lambda z: nn.functional.glu(z), 24),
        (lambda z: z.square() * 2 + 1, 12),
        (nn.Dropout(0.5), 12),
    ],
    ids=["relu", "gelu", "glu", "formula", "dropout"],
)
def test_elementwise_forms_are_groups(between: Any, width: int) -> None:
    assert groups_in(Net(between, width)) == {"down": ["up"]}


@pytest.mark.parametrize(
    "between",
    [
        nn.LayerNorm(12),
        lambda z: torch.softmax(z, -1),
        lambda z: z.flip(-1),
        lambda z: z + z.roll(1, -1),
        lambda z: z + z.mean(-1, keepdim=True),
    ],
    ids=["norm", "softmax", "flip", "neighbour", "mean"],
)
def test_other_forms_are_none(between: Any) -> None:
    assert groups_in(Net(between)) == {}


@pytest.mark.parametrize(
    "between", [lambda z: z * GATE, lambda z: z.view(-1, 3, 4).flatten(1)], ids=["a fixed vector", "a fixed shape"]
)
def test_what_does_not_run_with_fewer_neurons_is_named(between: Any) -> None:
    with pytest.warns(UserWarning, match="down: takes neurons one by one, but the model does not run without some"):
        assert groups_in(Net(between)) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"neurons": False},
        {"allocation": "uniform"},
        {"decomposition": "kronecker", "factor_format": "factors"},
        {"importance": "fisher_elementwise"},
    ],
    ids=str,
)
def test_without_one_budget_nothing_is_sought(changes: dict[str, Any]) -> None:
    assert groups_in(Net(torch.relu), **changes) is None


def test_partly_targeted_and_overlapping_groups_are_left_alone(tmp_path: Path) -> None:
    model = trained(tmp_path, warmup=2, steps=4, exclude_modules=["up_proj"])
    assert not any("mlp" in name for name in model.peft_config["default"].neuron_groups)
    model = trained(tmp_path, warmup=2, steps=4, exclude_modules=["q_proj"])
    assert all("mlp" in name for name in model.peft_config["default"].neuron_groups)

    class Chain(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(torch.relu(self.first(x)))))

    net = Chain(None)
    assert groups_in(net, target_modules=["first", "up", "down"]) == {"down": ["up"]}


# -- the product -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_factors", [False, True])
def test_compressed_model_is_the_merged_one(train_factors: bool, tmp_path: Path) -> None:
    """With the bypass kept nothing is truncated: what trains and what is exported agree."""
    model = trained(tmp_path, compensation="keep", param_ratio=0.5, warmup=2, train_factors=train_factors)
    widths = model.peft_config["default"].compact_widths
    assert widths
    expected = logits(model)
    compact = model.merge_and_unload()
    for name, width in widths.items():
        assert compact.get_submodule(name).in_features == width
        assert compact.get_submodule(name.replace("down", "up")).out_features == width
    torch.testing.assert_close(logits(compact), expected, rtol=1e-3, atol=1e-4)
    assert_kept(compact, 0.5)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_heads_that_go(name: str, tmp_path: Path) -> None:
    """With grouped queries and without: trained, merged, loaded, put back as zeros, saved and loaded as an adapter."""
    architecture = ARCHITECTURES[name]
    config = trained(tmp_path, architecture, warmup=2, steps=3, param_ratio=0.5).peft_config["default"]
    consumer, number = next(iter(config.group_heads.items()))
    ranks = dict.fromkeys(config.compact_ranks, 6)
    given = {"compact_ranks": ranks, "compact_widths": {consumer: number // 2}, "param_ratio": 0.9}
    model = trained(tmp_path, architecture, warmup=2, compensation="keep", **given)
    assert model.peft_config["default"].compact_widths == {consumer: number // 2}
    expected = logits(model, architecture)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(architecture.build(), tmp_path / "adapter")
    assert torch.equal(logits(again, architecture), expected)
    compact = model.merge_and_unload()
    for layer in (consumer, *config.neuron_groups[consumer]):
        module = compact.get_submodule(layer)
        features = module.in_features if layer == consumer else module.out_features
        dense = architecture.build().get_submodule(layer)
        assert 2 * features == (dense.in_features if layer == consumer else dense.out_features)
    torch.testing.assert_close(logits(compact, architecture), expected, rtol=1e-3, atol=1e-4)
    compact.save_pretrained(tmp_path / "compact")
    loaded = architecture.model.from_pretrained(tmp_path / "compact")
    assert torch.equal(logits(loaded, architecture), logits(compact, architecture))
    torch.testing.assert_close(
        logits(densify(loaded), architecture), logits(compact, architecture), rtol=1e-4, atol=1e-5
    )


def test_heads_stay_on_request(tmp_path: Path) -> None:
    config = trained(tmp_path, warmup=2, steps=3, heads=False).peft_config["default"]
    assert not config.group_heads
    assert config.neuron_groups


@pytest.mark.parametrize("compression", [0, 4])
def test_resumed_run_ends_bit_equal(compression: int, tmp_path: Path) -> None:
    given = {"warmup": 2, "compression": compression, "compression_interval": 2, "train_factors": True}
    whole = wrap(param_ratio=0.5, **given)
    make_trainer(whole, tmp_path, steps=8, save_strategy="steps", save_steps=1).train()
    for step in (1, 3, 6):
        again = wrap(param_ratio=0.5, **given)
        make_trainer(again, tmp_path, steps=8).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_bit_equal(tensors(again), tensors(whole))
        assert again.peft_config["default"].compact_widths == whole.peft_config["default"].compact_widths


def test_any_size_from_one_run(tmp_path: Path) -> None:
    model = trained(tmp_path, warmup=2, param_ratio=0.5, train_factors=True)
    before, widths_before = logits(model), model.peft_config["default"].compact_widths
    for param_ratio in (0.3, 0.9, 1.0, 0.5):
        model.base_model.set_param_ratio(param_ratio)
        assert model.base_model.current_param_ratio() <= param_ratio
        assert torch.isfinite(logits(model)).all()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert model.peft_config["default"].compact_widths == widths_before


def test_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    model = trained(tmp_path, warmup=2, param_ratio=0.5)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert_bit_equal(tensors(again.merge_and_unload()), tensors(model.merge_and_unload()))


def test_merged_into_the_dense_model(tmp_path: Path) -> None:
    """The neurons that are gone count as zero there."""
    for architecture in (LLAMA, ARCHITECTURES["gpt2"]):  # without and with biases
        model = trained(tmp_path, architecture, warmup=2, param_ratio=0.5)
        expected = logits(model, architecture)
        model.merge_adapter()
        torch.testing.assert_close(logits(model, architecture), expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(logits(model, architecture), expected)


def test_sizes_that_the_user_gives(tmp_path: Path) -> None:
    first = trained(tmp_path, warmup=2, param_ratio=0.5).peft_config["default"]
    given = {"compact_ranks": first.compact_ranks, "compact_widths": first.compact_widths}
    again = trained(tmp_path, warmup=2, param_ratio=0.5, **given).peft_config["default"]
    assert again.compact_widths == first.compact_widths
    down = "model.layers.0.mlp.down_proj"
    for chosen, message in (
        ({"model.layers.0.self_attn.q_proj": 4}, "compact_widths: got 4 for model.layers.0.self_attn.q_proj, which"),
        ({"model.layers.0.self_attn.o_proj": 3}, "got 3 for .*, expected at most its 2 heads"),
        ({down: 49}, f"compact_widths: got 49 for {down}, expected at most its 48 neurons"),
    ):
        with pytest.raises(LoraSVDError, match=message):
            trained(tmp_path, warmup=2, param_ratio=0.5, compact_ranks=first.compact_ranks, compact_widths=chosen)
    with pytest.raises(LoraSVDError, match="compact_ranks: these ranks keep"):
        trained(tmp_path, warmup=2, param_ratio=0.5, compact_ranks=first.compact_ranks, compact_widths={down: 48})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shape: shape.update(kept=[0, 32]), "gives the shape .* expected positive integers"),
        (lambda shape: shape.pop("chunks"), "gives the shape"),
        (lambda shape: shape.update(dense=[32, 64]), r"keeps .* of \[32, 64\] features, but the model has \[32, 48\]"),
        (lambda shape: shape.update(kept=[32, shape["kept"][1] + 1]), "has shape .* in this compact checkpoint"),
    ],
)
def test_shapes_that_contradict_the_model_or_the_tensors(change: Any, message: str, tmp_path: Path) -> None:
    compact = trained(tmp_path, warmup=2, param_ratio=0.5).merge_and_unload()
    compact.save_pretrained(tmp_path / "compact")
    path = tmp_path / "compact" / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"]["shapes"]["model.layers.1.mlp.down_proj"])
    path.write_text(json.dumps(config))
    with pytest.raises(LoraSVDError, match=rf"model\.layers\.1\.mlp\.down_proj.*{message}"):
        LLAMA.model.from_pretrained(tmp_path / "compact")


@pytest.mark.parametrize("index", [torch.tensor([3, 1]), torch.tensor([0, 48]), torch.tensor([0.0])])
def test_damaged_index_is_refused(index: Tensor, tmp_path: Path) -> None:
    model = trained(tmp_path, warmup=2, param_ratio=0.5)
    state = model.state_dict()
    name = next(name for name in state if name.endswith("down_proj.lora_svd_adapters.default.factors.columns"))
    with pytest.raises(LoraSVDError, match=r"factors\.columns: is no index of some of 48 features"):
        model.load_state_dict({**state, name: index})


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_report_equals_the_hand_count(name: str, tmp_path: Path) -> None:
    """Every number that is gone is counted, of weights by the ratio and of biases by the size of the model."""
    architecture = ARCHITECTURES[name]
    total = sum(parameter.numel() for parameter in architecture.build().parameters())
    model = trained(tmp_path, architecture, warmup=2, param_ratio=0.5)
    targeted = sum(layer.dense_weight().numel() for layer in model.base_model.run().layers.values())
    ratio = model.base_model.current_param_ratio()
    compact = model.merge_and_unload()
    report = parameter_report(compact)
    assert report.parameters == sum(parameter.numel() for parameter in compact.parameters())
    assert (report.dense_parameters, report.dense_targeted_parameters) == (total, targeted)
    assert report.param_ratio == ratio
    biases = sum(p.numel() for n, p in architecture.build().named_parameters() if n.endswith("bias"))
    left = sum(p.numel() for n, p in compact.named_parameters() if n.endswith("bias"))
    assert total - report.parameters == targeted - report.targeted_parameters + biases - left


def test_the_search_changes_no_statistic(tmp_path: Path) -> None:
    """Its gradients go through no layer, whatever comes before what it looks at."""
    for name in ("llama", "gpt2", "bert", "vit"):
        seen = []
        for neurons in (True, False):
            model = wrap(ARCHITECTURES[name], neurons=neurons, importance="kronecker", warmup=2)
            make_trainer(model, tmp_path, ARCHITECTURES[name], steps=3).train()
            layers = model.base_model.run().layers.items()
            seen.append({n: layer.statistics("default") for n, layer in layers})
        for n, statistics in seen[0].items():
            assert statistics.counts == seen[1][n].counts
            assert_bit_equal(statistics.sums, seen[1][n].sums)


@pytest.mark.parametrize(("gain", "goes"), [(0.005, False), (0.02, True)])
def test_heads_go_where_they_pay(gain: float, goes: bool) -> None:
    """By more than 1 % of the predicted loss."""
    spectrum, shape = torch.arange(8, 0, -1).double(), LayerShape(8, 40)
    whole = Choice(None, 0.0, {"out": spectrum}, {"out": shape}, heads=True)
    at_rank_3 = 135 / 320
    alone = allocate({"out": [whole]}, param_ratio=at_rank_3, rank_multiple=1).error
    assert alone == 5 + 4 + 3 + 2 + 1
    fewer = Choice(
        torch.tensor([1]), (1 - gain) * alone, {"out": torch.zeros(8)}, {"out": LayerShape(8, 20)}, heads=True
    )
    found = choose_size({"out": [fewer, whole]}, at_rank_3, CompressionSettings.of(settings(rank_multiple=1)))
    assert bool(found.neurons) == goes


def test_searches_that_disagree_find_nothing() -> None:
    """Of two processes, say."""
    shapes = {"out": LayerShape(8, 8)}
    found = [GroupSearch(shapes, found={"out": NeuronGroup("out", ("in",), heads)}) for heads in (2, 4)]
    assert found_groups(found) == {}
    assert found_groups(found[:1]) == found[0].found
    assert found_groups([found[0], GroupSearch(shapes, refuted={"out"})]) == {}
