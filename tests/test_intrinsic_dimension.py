"""Training in a random subspace: the projection against its dense matrix, SAID's scales, d_90, and the recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, LLAMA, tensors
from tiny_lm import save_tiny_task
from torch import Tensor, nn

from lora_svd import LoraSVDError
from lora_svd.analysis.intrinsic_dimension import RandomSubspace, intrinsic_dimension, layer_of, random_subspace

ROOT = Path(__file__).parents[1]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 1))


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()]).double()


def dense_projection(subspace: RandomSubspace) -> Tensor:
    """P (parameters, coordinates), one column at a time from what the coordinates do."""
    start, columns = flat(dict(subspace.model.named_parameters())), []
    for index in range(len(subspace.coordinates)):
        with torch.no_grad():
            subspace.coordinates.zero_()[index] = 1
            columns.append(flat(subspace.moved_parameters()) - start)
            subspace.coordinates.zero_()
    return torch.stack(columns, dim=1)


class TestSubspace:
    def test_columns_are_orthonormal(self):
        projection = dense_projection(random_subspace(network(), 20))
        assert projection.shape == (30 * 40 + 40 + 40 + 1, 20)
        torch.testing.assert_close(projection.T @ projection, torch.eye(20).double(), atol=1e-5, rtol=0)

    def test_keeps_lengths_in_expectation(self):
        """||P^T v||^2 has the mean d / D ||v||^2 of a Gaussian P's, also of a vector with few entries."""
        vector = torch.zeros(1281, dtype=torch.float64)
        vector[:5] = 1
        found = [dense_projection(random_subspace(network(), 30, seed=s)).T @ vector for s in range(60)]
        mean = sum(float(part.square().sum()) for part in found) / len(found)
        assert mean == pytest.approx(30 / 1281 * 5, rel=0.15)

    def test_gradient_is_the_projection_of_the_full_gradient(self):
        x, model = torch.randn(16, 30), network()
        model(x).square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
        subspace = random_subspace(network(), 20)
        subspace(x).square().sum().backward()
        assert subspace.coordinates.grad is not None
        expected = dense_projection(subspace).T @ gradient
        torch.testing.assert_close(subspace.coordinates.grad.double(), expected, rtol=1e-4, atol=1e-4)

    def test_starts_at_the_model_and_leaves_it_frozen(self):
        model = LLAMA.build()
        expected, before = model(**LLAMA.inputs()).logits, tensors(model)
        subspace = random_subspace(model, 50)
        assert torch.equal(subspace(**LLAMA.inputs()).logits, expected)
        optimizer = torch.optim.Adam([p for p in subspace.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for _ in range(10):
            loss = subspace(**LLAMA.inputs()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        assert all(torch.equal(after, before[name]) for name, after in tensors(model).items())

    def test_a_seed_is_a_subspace(self):
        one, same, other = (dense_projection(random_subspace(network(), 8, seed=seed)) for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_moves_only_what_is_trainable(self):
        model = network()
        model[0].requires_grad_(False)
        assert set(random_subspace(model, 5).moved_parameters()) == {"2.weight", "2.bias"}

    @pytest.mark.parametrize("dimension", [0, 1282])
    def test_refuses_a_dimension(self, dimension: int):
        with pytest.raises(LoraSVDError, match=rf"dimension: got {dimension}, expected 1 to 1281"):
            random_subspace(network(), dimension)


class TestStructureAware:
    def test_scales_count_as_dimensions(self):
        subspace = random_subspace(ARCHITECTURES["bert"].build(), 40, structure_aware=True)
        assert subspace.dimension == 40
        assert subspace.scales is not None
        assert len(subspace.scales) == len({layer_of(name) for name in subspace.moved_parameters()}) < 40

    @pytest.mark.parametrize(
        ("parameter", "layer"),
        [
            ("bert.encoder.layer.1.output.dense.weight", "bert.encoder.layer.1"),
            ("bert.embeddings.word_embeddings.weight", "bert.embeddings.word_embeddings"),
            ("classifier.bias", "classifier"),
        ],
    )
    def test_layers(self, parameter: str, layer: str):
        assert layer_of(parameter) == layer

    def test_a_scale_multiplies_the_change_of_its_layer(self):
        subspace = random_subspace(network(), 20, structure_aware=True)
        start = dict(subspace.model.named_parameters())
        assert subspace.scales is not None
        with torch.no_grad():
            subspace.coordinates.normal_()
            before = subspace.moved_parameters()
            subspace.scales[1] = 3
            after = subspace.moved_parameters()
        for name, value in after.items():
            factor = 3 if name.startswith("2.") else 1
            torch.testing.assert_close(value - start[name], factor * (before[name] - start[name]))

    def test_refuses_a_dimension_that_the_scales_use_up(self):
        with pytest.raises(LoraSVDError, match=r"dimension: got 2, expected 3 to 1283: .* 2 of the dimensions"):
            random_subspace(network(), 2, structure_aware=True)


class TestIntrinsicDimension:
    def test_is_the_least_that_reaches_the_share(self):
        accuracies = {1000: 0.9, 10: 0.5, 100: 0.82, 300: 0.81}
        assert intrinsic_dimension(accuracies, 0.9) == 100
        assert intrinsic_dimension(accuracies, 0.9, share=1.0) == 1000

    @pytest.mark.parametrize(("accuracies", "best"), [({10: 0.5, 100: 0.7}, "0.7"), ({}, "nan")])
    def test_refuses_where_none_reaches_it(self, accuracies: dict[int, float], best: str):
        with pytest.raises(LoraSVDError, match=rf"the best accuracy is {best}, below 0.9 \* 0.9; train in more"):
            intrinsic_dimension(accuracies, 0.9)


def test_recipe_runs(tmp_path: Path):
    """On an encoder made for the test, and a task that its words decide."""
    save_tiny_task(tmp_path)
    options = {
        "model": "encoder",
        "train_file": "train.jsonl",
        "eval_file": "dev.jsonl",
        "output_dir": "out",
        "max_steps": 4,
        "max_eval_samples": 20,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    script = ROOT / "recipes/analysis/intrinsic_dimension.py"
    done = subprocess.run(
        [sys.executable, script, *words, "--dimensions", "300", "5", "--step_lengths", "1", "10"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"d')]
    assert [line.get("dimension") for line in lines] == ["full", 5, 5, 300, 300, None]
    full, few, few_far, many, _ = [line["learning_rate"] for line in lines[:-1]]
    assert full == 1e-3
    assert few_far == pytest.approx(10 * few)
    assert few == pytest.approx(many * 60**0.5)
    assert all(20 * line["accuracy"] == pytest.approx(round(20 * line["accuracy"])) for line in lines[:-1])
    reached = [line["dimension"] for line in lines[1:-1] if line["accuracy"] >= 0.9 * lines[0]["accuracy"]]
    assert lines[-1]["d_90"] == (min(reached) if reached else None)
