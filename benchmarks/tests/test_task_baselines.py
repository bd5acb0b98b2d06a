"""The published baselines of the task-model benchmark: formulas against slow references, sizes, and schedules."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from keep_out import keep_out
from kngpt2 import kronecker_products, nearest_product, taught_by
from lpaf import MixedRankLinear, Mixing, Pruning, consistent, unwrap, wrap
from tensorgpt import best_shape, contracted, numbers, ordered_factorizations, tensor_train, tensor_trains
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from lora_svd.compact import parameter_report

IDS, LABELS = torch.arange(3, 27).view(4, 6), torch.tensor([0, 1, 1, 0])


def tiny(**changes: Any) -> tuple[Any, list[str]]:
    """A BERT of two blocks, and the names of its twelve linear layers."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, initializer_range=0.3, **sizes, **changes))
    named = model.bert.encoder.named_modules(prefix="bert.encoder")
    return model, [name for name, module in named if isinstance(module, nn.Linear)]


def kept_share(model: nn.Module, dense: nn.Module, names: list[str]) -> float:
    targeted = sum(dense.get_submodule(name).weight.numel() for name in names)  # pyright: ignore
    cut = parameter_report(dense).parameters - parameter_report(model).parameters
    return 1 - cut / targeted


# -- LPAF --------------------------------------------------------------------------------------------------------------


def pruned_linear() -> tuple[MixedRankLinear, Tensor]:
    """A layer with every third weight pruned, and an input."""
    layer = MixedRankLinear(nn.Linear(6, 4))
    layer.mask.view(-1)[::3] = False
    return layer, torch.randn(5, 6)


def test_lpaf_scores_every_weight_by_the_gradient_of_the_pruned_one() -> None:
    layer, x = pruned_linear()
    weight = layer.linear.weight.detach()
    for _ in range(2):  # the score is a sum
        layer(x).square().sum().backward()
    y = x @ (layer.mask * weight).T + layer.linear.bias.detach()
    torch.testing.assert_close(layer.score, -2 * (2 * y.T @ x) * weight)
    assert bool((layer.score[~layer.mask] != 0).all())
    trained = layer.linear.weight.grad
    assert trained is not None
    assert not bool(trained[~layer.mask].any())


def test_lpaf_keeps_the_highest_scores_and_brings_weights_back() -> None:
    layer, _ = pruned_linear()
    for density in (0.25, 0.5):
        layer.score = torch.randn(4, 6)
        layer.prune(density)
        assert int(layer.mask.sum()) == 24 * density
        assert layer.score[layer.mask].abs().min() > layer.score[~layer.mask].abs().max()


def test_lpaf_prunes_on_a_cubic_to_the_density() -> None:
    layer, _ = pruned_linear()
    layer.score = torch.randn(4, 6)
    callback, kept = Pruning([layer], 0.25), {}
    for step in range(100):
        callback.on_pre_optimizer_step(None, SimpleNamespace(global_step=step, max_steps=100), None)
        kept[step] = int(layer.mask.sum())
    steps = [*range(10, 100, 10), 99]
    assert [kept[step] for step in steps] == [
        round(24 * (0.25 + 0.75 * (1 - min(1, (step - 10) / 80)) ** 3)) for step in steps
    ]
    assert kept[39] == kept[30] > kept[40]


def test_lpaf_factors_are_the_nearest_with_rows_weighed_by_what_they_have_left() -> None:
    layer, x = pruned_linear()
    layer.mask[0] = False
    layer.mask[0, 1] = True
    layer.factorize(2)
    pruned = (layer.mask * layer.linear.weight).detach().double()
    root = layer.mask.sum(1).double().sqrt()[:, None]
    U, S, Vh = torch.linalg.svd(root * pruned)
    best = (U[:, :2] * S[:2]) @ Vh[:2] / root
    layer.eval()
    torch.testing.assert_close(layer(x), x @ best.float().T + layer.linear.bias, atol=1e-5, rtol=1e-5)
    layer.train()
    layer.mixing = 1.0
    torch.testing.assert_close(layer(x), x @ pruned.float().T + layer.linear.bias)


def test_lpaf_mixes_less_and_less() -> None:
    layer, _ = pruned_linear()
    callback, chances = Mixing([layer], 0.5), []
    for step in range(5):
        callback.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=5), None)
        chances.append(layer.mixing)
    assert chances == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])


def test_lpaf_adds_the_divergence_of_two_passes() -> None:
    model, _ = tiny()
    with consistent(model.eval(), 3.0):  # without chance both passes are the same
        loss = model(input_ids=IDS, labels=LABELS).loss
    torch.testing.assert_close(loss, model(input_ids=IDS, labels=LABELS).loss)
    with consistent(model.train(), 3.0):
        torch.manual_seed(1)
        loss = model(input_ids=IDS, labels=LABELS).loss
    torch.manual_seed(1)
    first, second = (model(input_ids=IDS, labels=LABELS) for _ in range(2))
    p, q = first.logits.double().softmax(-1), second.logits.double().softmax(-1)
    divergence = ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / (2 * len(p))
    assert float(divergence.detach()) > 1e-4
    expected = (first.loss + second.loss).double() / 2 + 3 * divergence
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)


def test_lpaf_leaves_factors_of_the_size() -> None:
    model, names = tiny()
    dense = copy.deepcopy(model)
    for layer in wrap(model, names):
        layer.factorize(4)
    assert kept_share(unwrap(model), dense, names) == pytest.approx((8 * 4 * 48 + 4 * 4 * 72) / (12 * 576 + 4 * 576))
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# -- KnGPT2 ------------------------------------------------------------------------------------------------------------


def test_kngpt2_finds_a_product_again() -> None:
    weight = torch.kron(torch.randn(2, 3), torch.randn(6, 8)).double()
    found = nearest_product(weight, 54.5 / weight.numel())
    assert found.split is not None
    torch.testing.assert_close(found.product(), weight)
    assert found.left.numel() + found.right.numel() == 6 + 48


def test_kngpt2_takes_the_largest_product_within_the_size() -> None:
    weight = torch.randn(12, 24).double()
    sizes = {ratio: nearest_product(weight, ratio) for ratio in (0.12, 0.35, 0.6)}
    assert {ratio: found.left.numel() + found.right.numel() for ratio, found in sizes.items()} == {
        0.12: 34,
        0.35: 96 + 3,
        0.6: 144 + 2,
    }
    with pytest.raises(ValueError, match=r"param_ratio: 0\.1 is too small for one product .*, expected .* 0\.118"):
        nearest_product(weight, 0.1)


@pytest.mark.parametrize("size", [0.3, 0.6])
def test_kngpt2_keeps_dense_what_it_can(size: float) -> None:
    model, names = tiny()
    dense = copy.deepcopy(model)
    share = kept_share(kronecker_products(model, names, size), dense, names)
    smallest_layer = 576 / (12 * 576 + 4 * 576)
    assert size - smallest_layer < share <= size
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_kngpt2_learns_from_predictions_and_hidden_states() -> None:
    model, _ = tiny()
    teacher, _ = tiny()
    model.eval()
    with taught_by(copy.deepcopy(model), model):
        same = model(input_ids=IDS, labels=LABELS).loss
    seen = model(input_ids=IDS, labels=LABELS, output_hidden_states=True)
    torch.testing.assert_close(same, seen.loss)
    with taught_by(teacher, model):
        loss = model(input_ids=IDS, labels=LABELS).loss
    with torch.no_grad():
        taught = teacher(input_ids=IDS, output_hidden_states=True)
    t, s = taught.logits.double().softmax(-1), seen.logits.double().softmax(-1)
    distance = (t * (t / s).log()).sum() / len(t)
    states = zip(seen.hidden_states, taught.hidden_states, strict=True)
    distance = distance + sum((a - b).double().square().mean() for a, b in states)
    torch.testing.assert_close(loss.double(), seen.loss.double() + distance, atol=1e-5, rtol=1e-5)
    assert model(input_ids=IDS).hidden_states is None


# -- TensorGPT ---------------------------------------------------------------------------------------------------------


def test_tensorgpt_tries_every_ordered_factorization() -> None:
    assert set(ordered_factorizations(12)) == {(12,), (2, 6), (6, 2), (3, 4), (4, 3), (2, 2, 3), (2, 3, 2), (3, 2, 2)}


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (2, 3, 2, 2)])
def test_tensorgpt_with_all_ranks_is_the_vector(shape: tuple[int, ...]) -> None:
    vectors = torch.randn(5, 24, dtype=torch.float64)
    cores = tensor_train(vectors, shape, 24)
    torch.testing.assert_close(contracted(cores), vectors)
    letters = iter("abcd")  # the same product as one sum over all bonds
    terms = [f"x{left}{next(letters)}{right}" for left, right in zip("stuv", "tuvw", strict=True)][: len(shape)]
    dense = torch.einsum(",".join(terms) + "->x" + "abcd"[: len(shape)], *cores)
    torch.testing.assert_close(dense.reshape(5, 24), vectors)


@pytest.mark.parametrize(("shape", "bond"), [((6, 4), 2), ((2, 3, 4), 1), ((2, 3, 4), 2)])
def test_tensorgpt_loses_no_more_than_the_sum_of_what_each_bond_must_lose(shape: tuple[int, ...], bond: int) -> None:
    vectors = torch.randn(7, 24, dtype=torch.float64)
    cores = tensor_train(vectors, shape, bond)
    assert sum(core[0].numel() for core in cores) == numbers(shape, bond)
    lost = (vectors - contracted(cores)).square().sum(-1)
    rows = [torch.tensor(shape[:k]).prod() for k in range(1, len(shape))]
    tails = [torch.linalg.svdvals(vectors.reshape(7, int(n), -1))[:, bond:].square().sum(-1) for n in rows]
    assert bool((lost <= sum(tails) + 1e-9).all())  # Oseledets 2011, theorem 2.2
    assert bool((lost >= torch.stack(tails).amax(0) - 1e-9).all())


@pytest.mark.parametrize("param_ratio", [0.8, 0.5, 0.4])
def test_tensorgpt_keeps_the_embedding_within_its_share(param_ratio: float) -> None:
    model, _ = tiny()
    dense = copy.deepcopy(model)
    weight = model.get_input_embeddings().weight.detach()
    shape, bond = best_shape(weight, param_ratio)
    tensor_trains(model, param_ratio)
    cut = parameter_report(dense).parameters - parameter_report(model).parameters
    assert cut == len(weight) * (24 - numbers(shape, bond)) >= (1 - param_ratio) * weight.numel()
    rows = contracted(tensor_train(weight, shape, bond))
    torch.testing.assert_close(model.get_input_embeddings()(IDS), rows[IDS])
    model(IDS, labels=LABELS).loss.backward()


def test_tensorgpt_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"param_ratio: 0\.3 is too small for a width of 24, expected at least 0\.375"):
        best_shape(torch.randn(3, 24), 0.3)


# -- sentences that choices are made on --------------------------------------------------------------------------------


def test_nothing_of_a_kept_out_sentence_is_trained_on() -> None:
    sentences = [" ".join(f"w{20 * n + i}" for i in range(16)) for n in range(4)]
    parts = [sentence.partition(" ")[2] for sentence in sentences]
    longer = [f"so {sentence} ." for sentence in sentences]
    apart = [sentences[0][:-1], "unlike all of them"]  # the first ends in a part of a word
    samples = [{"sentence": text, "label": 0} for text in (*sentences, *parts, *longer, *apart)]
    train, dev = keep_out(samples, number=1)
    (held,) = (sample["sentence"] for sample in dev)
    related = {sample["sentence"] for sample in samples if held.split()[5] in sample["sentence"].split()} - {apart[0]}
    assert len(related) == 3
    assert {sample["sentence"] for sample in train} == {sample["sentence"] for sample in samples} - related
