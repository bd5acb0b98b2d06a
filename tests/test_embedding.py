"""Embeddings: each is compressed like the linear layer of unit vectors that it is, from training to another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from models import (
    ARCHITECTURES,
    LLAMA,
    TIED,
    VOCABULARY,
    Architecture,
    assert_bit_equal,
    assert_kept,
    assert_plain,
    linear_sizes,
    logits,
    make_trainer,
    settings,
    tensors,
    trained,
    wrap,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertForMaskedLM, BitsAndBytesConfig

from lora_svd import LoraSVDConfig, LoraSVDError
from lora_svd.analysis.models import analyze_adapter
from lora_svd.analysis.weights import folder_weights, model_weights
from lora_svd.cli.report import bytes_by_part
from lora_svd.compact import LowRankEmbedding, LowRankLinear, TiedHead, densify, parameter_report, save_compact
from lora_svd.compact.description import LoraSVDCompactConfig
from lora_svd.decompositions import DECOMPOSITIONS
from lora_svd.importance import IMPORTANCES
from lora_svd.linalg import Metrics, shrink
from lora_svd.tuner.embedding import LoraSVDEmbedding

NUM_IDS, WIDTH, PADDING = 20, 6, 3
UNSEEN = [7, 19]
FORMATS = ("pivoted", "factors")


def untied(name: str, **sizes: int) -> Architecture:
    """The architecture, a language model with a head of its own."""
    given = ARCHITECTURES[name]
    fixed = {**sizes, **({} if name == "bert" else {"tie_word_embeddings": False})}
    return Architecture(lambda **changes: given.config(**{**fixed, **changes}), given.model, given.batch)


BERT, UNTIED = untied("bert"), untied("llama")
EMBEDDINGS = {"bert": "bert.embeddings.word_embeddings", "llama": "model.embed_tokens"}


def targets(name: str, *, rank: int = 9, **changes: Any) -> dict[str, Any]:
    """Settings that give the embedding a rank and its linear layers another."""
    linear = [key for key in linear_sizes(untied(name).build()) if key.endswith(("_proj", "query", "value"))]
    ranks = {EMBEDDINGS[name]: rank} | dict.fromkeys(linear, 4)
    return {"target_modules": list(ranks), "compact_ranks": ranks, **changes}


# -- mathematics -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """An embedding, or the linear layer of unit vectors with the same weight, and a classifier of its outputs."""

    def __init__(self, weight: Tensor, *, is_embedding: bool, padding: int | None = None) -> None:
        super().__init__()
        self.embed: nn.Module = nn.Linear(*weight.shape, bias=False)
        self.embed.weight = nn.Parameter(weight.T.clone())
        if is_embedding:
            self.embed = nn.Embedding(*weight.shape, padding_idx=padding, _weight=weight.clone())
        torch.manual_seed(1)
        self.head = nn.Linear(weight.shape[1], 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = nn.functional.one_hot(ids, NUM_IDS).float() if isinstance(self.embed.base_layer, nn.Linear) else ids
        return self.head(torch.tanh(self.embed(x)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Ids, some of them never seen and the most frequent one the padding; and classes, of which some are ignored."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(NUM_IDS, (4, 9), generator=generator)
    ids[torch.isin(ids, torch.tensor(UNSEEN))] = PADDING
    classes = (ids * 7) % 3
    classes[:, -1] = -100
    return ids, classes


def run(net: Net, *, steps: int = 4, **changes: Any) -> PeftModel:
    """A hand-written loop with a warm-up of ``steps`` - 1."""
    config = LoraSVDConfig(
        **{"target_modules": ["embed"], "r": 2, "warmup": steps - 1, "param_ratio": 0.7, "rank_multiple": 1, **changes}
    )
    model = get_peft_model(net, config)
    torch.manual_seed(2)
    layer = model.base_model.model.embed
    layer.adapter("default").A.data = torch.randn(2, layer.in_features) * layer.adapter("default").A.any()
    layer.adapter("default").B.data = torch.randn(layer.out_features, 2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in range(steps):
        ids, classes = batch(step)
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), classes.flatten())
        optimizer.zero_grad()
        loss.backward()
        model.base_model.update_and_allocate(step, total_steps=steps)
        optimizer.step()
    return model


def form(importance: str) -> dict[str, str]:
    return {"decomposition": "elementwise" if IMPORTANCES[importance].elementwise else "svd"}


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("factor_format", FORMATS)
def test_is_compressed_like_the_linear_layer_of_unit_vectors(importance: str, factor_format: str) -> None:
    weight = torch.randn(NUM_IDS, WIDTH)
    choices = {"factor_format": factor_format, "init_weights": False, **form(importance)}
    models = [run(Net(weight, is_embedding=kind), importance=importance, **choices) for kind in (True, False)]
    layers = [model.base_model.model.embed for model in models]
    assert [isinstance(layer, LoraSVDEmbedding) for layer in layers] == [True, False]
    seen, expected = (layer.statistics("default") for layer in layers)
    assert seen.counts == expected.counts
    for name in seen.sums:
        mean = reference.dense(seen.mean(name), NUM_IDS) if name == "input_gram" else seen.mean(name)
        assert reference.relative_error(mean, expected.mean(name)) < 1e-5
        assert max(seen.sums[name].shape) ** 2 < NUM_IDS**2 or seen.sums[name].numel() <= weight.numel()
    found, wanted = (layer.factors("default") for layer in layers)
    assert found.rank == wanted.rank < WIDTH
    assert reference.relative_error(found.product(), wanted.product()) < 1e-4
    ids = torch.arange(NUM_IDS)
    torch.testing.assert_close(models[0](ids), models[1](ids), rtol=1e-4, atol=1e-4)
    compact = models[0].merge_and_unload()
    assert isinstance(compact.embed, LowRankEmbedding)
    assert compact.embed.factor_format == factor_format
    dense = models[1].merge_and_unload()
    outputs = compact.embed(ids), dense.embed(torch.eye(NUM_IDS))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
    stored = sum(part.weight.numel() for part in (compact.embed.left, compact.embed.right))
    size = found.rank * (NUM_IDS + WIDTH) - (found.rank**2 if factor_format == "pivoted" else 0)
    assert stored == size == parameter_report(compact).targeted_parameters


def test_frequencies_are_the_metric_of_the_ids() -> None:
    """X of unit vectors is diagonal; the factors are the best of their rank in it, written densely."""
    weight = torch.randn(NUM_IDS, WIDTH)
    model = run(Net(weight, is_embedding=True), importance="activation", compact_ranks={"embed": 2})
    counts = torch.zeros(NUM_IDS, dtype=torch.float64)
    for step in range(3):  # of the warm-up
        ids, classes = batch(step)
        for index, label in zip(ids.flatten().tolist(), classes.flatten().tolist(), strict=True):
            counts[index] += label != -100
    frequencies = model.base_model.model.embed.statistics("default").mean("input_gram")
    assert frequencies.shape == (NUM_IDS,)
    assert reference.relative_error(frequencies, counts / counts.sum()) < 1e-6
    metric = 0.99 * frequencies + 0.01 / NUM_IDS
    best = reference.truncate(weight.T, None, metric, 2)
    assert reference.relative_error(model.base_model.model.embed.factors("default").product(), best) < 1e-5


@pytest.mark.filterwarnings("ignore:.*a metric is singular")  # ids that are never seen, without shrinkage
@pytest.mark.parametrize("shape", [(NUM_IDS, WIDTH), (WIDTH, NUM_IDS)], ids=str)
@pytest.mark.parametrize("shrinkage", [0.0, 1e-2, 1.0])
def test_rows_of_ids_that_were_never_seen_are_projected_like_the_others(
    shape: tuple[int, int], shrinkage: float
) -> None:
    """They lose what the kept directions do not have, and get nothing that was not there."""
    weight = torch.randn(*shape, dtype=torch.float64)
    frequencies = torch.rand(shape[0], dtype=torch.float64) + 0.1
    frequencies[1::2] = 0
    metric = shrink(frequencies, shrinkage)
    kept = DECOMPOSITIONS["svd"].factorize(weight.T, Metrics(column=metric), 4).product().T
    basis = torch.linalg.svd(metric.sqrt()[:, None] * weight, full_matrices=False)[2][:4]
    if shrinkage:
        assert reference.relative_error(kept, weight @ basis.T @ basis) < 1e-6
    assert bool((kept.norm(dim=1) <= (1 + 1e-6) * weight.norm(dim=1)).all())
    plain = DECOMPOSITIONS["svd"].factorize(weight.T, Metrics(), 4).product().T
    lost, lost_plainly = ((weight - rows).square().sum(1) for rows in (kept, plain))
    assert (lost * frequencies).sum() <= (lost_plainly * frequencies).sum() * (1 + 1e-9)


def test_the_bypass_leaves_unseen_ids_and_the_padding_alone() -> None:
    weight = torch.randn(NUM_IDS, WIDTH)
    weight[PADDING] = 0
    net = Net(weight, is_embedding=True, padding=PADDING)
    model = run(net, importance="lora_diagonal", compact_ranks={"embed": 4}, param_ratio=0.9)
    layer = model.base_model.model.embed
    kept = [*UNSEEN, PADDING]
    columns = layer.adapter("default").A.any(0)
    assert not bool(columns[kept].any())
    assert int(columns.sum()) == NUM_IDS - len(kept)
    assert not bool(layer(torch.tensor([PADDING])).any())
    factors = layer.factors("default").product().T
    compact = model.merge_and_unload()
    assert compact.embed.padding_idx == compact.embed.right.padding_idx == PADDING
    rows = compact.embed(torch.arange(NUM_IDS))
    assert not bool(rows[PADDING].any())
    size = weight[UNSEEN].norm(dim=1)
    for found in (factors[UNSEEN], rows[UNSEEN]):
        assert bool(((found - weight[UNSEEN]).norm(dim=1) < 1.5 * size).all())


# -- in a model --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("factor_format", FORMATS)
def test_trains_merges_saves_and_loads(name: str, factor_format: str, tmp_path: Path) -> None:
    architecture = untied(name)
    more = {"train_factors": True, "compensation": "keep"} if factor_format == "factors" else {}
    choices = targets(name, factor_format=factor_format, param_ratio=0.8, **more)
    model = trained(tmp_path, architecture, **choices)
    expected = logits(model, architecture)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(architecture.build(), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, architecture), expected, rtol=1e-5, atol=1e-5)
    assert set(analyze_adapter(again)) == set(again.peft_config["default"].compact_ranks)
    again.base_model.set_param_ratio(0.5)
    assert_kept(again.merge_and_unload(), 0.5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, architecture), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    compact = model.merge_and_unload()
    assert_plain(compact)
    embedding = compact.get_input_embeddings()
    assert isinstance(embedding, LowRankEmbedding)
    if more:  # all of the bypass is there
        torch.testing.assert_close(logits(compact, architecture), expected, rtol=1e-4, atol=1e-4)
    report = parameter_report(compact)
    assert report.layers[EMBEDDINGS[name]].parameters == sum(p.numel() for p in embedding.parameters())
    assert report.parameters == sum(p.numel() for p in compact.parameters())
    assert report.dense_parameters == sum(p.numel() for p in architecture.build().parameters())
    other = sum(p.numel() * 4 for key, p in compact.named_parameters() if "position" in key or "token_type" in key)
    assert bytes_by_part(compact)["embeddings"] == report.layers[EMBEDDINGS[name]].bytes + other
    assert_checkpoint(compact, architecture, tmp_path / "compact")


def assert_checkpoint(compact: Any, architecture: Architecture, folder: Path) -> None:
    """It loads with the same bits, and its weights are read and made dense as what the layers compute."""
    answers, report = logits(compact, architecture), parameter_report(compact)
    save_compact(compact, folder)
    loaded = type(compact).from_pretrained(folder)
    assert_bit_equal(tensors(loaded), tensors(compact))
    assert torch.equal(logits(loaded, architecture), answers)
    assert parameter_report(loaded) == report
    weights = folder_weights(folder)
    assert {key: weights[key].rank for key in report.layers} == {key: it.rank for key, it in report.layers.items()}
    name = next(key for key in report.layers if key in EMBEDDINGS.values())
    rows = loaded.get_submodule(name)(torch.arange(VOCABULARY)).detach()
    for found in (weights[name], model_weights(loaded)[name]):
        assert found.shape == (32, VOCABULARY)
        assert reference.relative_error(found.read().T, rows) < 1e-6
    dense = densify(loaded)
    assert type(dense.get_input_embeddings()) is nn.Embedding
    assert dense.get_input_embeddings().padding_idx == compact.get_input_embeddings().padding_idx
    torch.testing.assert_close(logits(dense, architecture), answers, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("factor_format", FORMATS)
def test_alone_it_meets_its_budget(allocation: str, factor_format: str, tmp_path: Path) -> None:
    form = {"allocation": allocation, "factor_format": factor_format, "compensation": "keep", "r": 2}
    compact = trained(tmp_path, BERT, target_modules=["word_embeddings"], **form).merge_and_unload()
    report = parameter_report(compact)
    assert list(report.layers) == [EMBEDDINGS["bert"]]
    assert report.targeted_parameters == sum(p.numel() for p in compact.get_input_embeddings().parameters())
    assert 0.5 < report.param_ratio <= 0.6


def test_resumed_run_ends_bit_equal(tmp_path: Path) -> None:
    def start() -> PeftModel:
        return wrap(BERT, **targets("bert", importance="kronecker"))

    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = start()
    make_trainer(whole, tmp_path, BERT, steps=6, **saving).train()
    for step in (2, 4):
        resumed = start()
        trainer = make_trainer(resumed, tmp_path / str(step), BERT, steps=6)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_bit_equal(tensors(resumed), tensors(whole))
    assert_bit_equal(tensors(resumed.merge_and_unload()), tensors(whole.merge_and_unload()))


def test_a_dense_merge_and_several_adapters(tmp_path: Path) -> None:
    model = trained(tmp_path, BERT, **targets("bert"))
    model.add_adapter("second", settings(init_weights=False, **targets("bert")))
    one = logits(model, BERT)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, BERT)
    assert not torch.allclose(both, one, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, BERT), both, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    model.set_adapter("default")
    dense = model.merge_and_unload(compact=False)
    assert type(dense.get_input_embeddings()) is nn.Embedding
    assert dense.get_input_embeddings().padding_idx == 0


def test_autocast_changes_the_type_of_neither(tmp_path: Path) -> None:
    model = trained(tmp_path, BERT, **targets("bert"))
    compact = trained(tmp_path, BERT, **targets("bert")).merge_and_unload()
    ids = BERT.inputs()["input_ids"]
    for embedding in (model.base_model.model.get_input_embeddings(), compact.get_input_embeddings()):
        with torch.autocast("cpu", torch.bfloat16):
            assert embedding(ids).dtype == torch.float32
        assert embedding.to(torch.bfloat16)(ids).dtype == torch.bfloat16


def test_a_lora_trains_on_it(tmp_path: Path) -> None:
    compact = trained(tmp_path, UNTIED, **targets("llama")).merge_and_unload()
    assert all(parameter.requires_grad for parameter in compact.get_input_embeddings().parameters())
    before = logits(compact, UNTIED)
    lora = get_peft_model(compact, LoraConfig(target_modules=["embed_tokens.right"], r=2, init_lora_weights=False))
    changed = logits(lora, UNTIED)
    assert not torch.allclose(changed, before, atol=1e-3)
    torch.testing.assert_close(logits(lora.merge_and_unload(), UNTIED), changed, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:merge_and_unload. the compact layers take:UserWarning")
def test_four_bits_leave_it_in_full_precision(tmp_path: Path) -> None:
    wide = untied("llama", hidden_size=192, intermediate_size=384)
    model = trained(tmp_path, wide, **targets("llama", factor_format="factors", param_ratio=0.9, rank_multiple=64))
    compact = model.merge_and_unload(quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    embedding = compact.get_input_embeddings()
    assert isinstance(embedding, LowRankEmbedding)
    assert {part.weight.dtype for part in (embedding.left, embedding.right)} == {torch.float32}
    assert compact.config.quantization_config.quantized
    compact.save_pretrained(tmp_path / "compact")
    loaded = wide.model.from_pretrained(tmp_path / "compact")
    assert torch.equal(logits(loaded, wide), logits(compact, wide))


def test_the_statistics_limit_counts_a_diagonal() -> None:
    """The Gram matrix of all ids would take 16,384 bytes."""
    limits = {"importance": "activation", "target_modules": ["word_embeddings"], "statistics_limit": 4 * 64 + 24}
    layer = wrap(BERT, **limits).base_model.model.get_input_embeddings()
    assert not layer.adapter("default").observer.is_sketched
    with pytest.raises(LoraSVDError, match="statistics_limit: got 279, expected at least 280 bytes"):
        wrap(BERT, **{**limits, "statistics_limit": 279})


@TIED
@pytest.mark.parametrize("embedding_rank", [9, 32])
@pytest.mark.parametrize("head_rank", [9, 32])
def test_of_a_tied_pair_that_is_targeted_each_gets_its_own(embedding_rank: int, head_rank: int, tmp_path: Path) -> None:
    ranks = {"model.embed_tokens": embedding_rank, "lm_head": head_rank, "model.layers.0.mlp.up_proj": 3}
    base = LLAMA.build()
    number = sum(parameter.numel() for parameter in base.parameters())
    form = {"compensation": "keep", "param_ratio": 0.99}
    model = trained(tmp_path, target_modules=list(ranks), compact_ranks=ranks, **form)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    layers = [model.base_model.model.get_submodule(name) for name in ("model.embed_tokens", "lm_head")]
    assert layers[0].get_base_layer().weight is layers[1].get_base_layer().weight
    compact = model.merge_and_unload()
    assert isinstance(compact.get_input_embeddings(), LowRankEmbedding) == (embedding_rank == 9)
    assert isinstance(compact.get_output_embeddings(), LowRankLinear) == (head_rank == 9)
    torch.testing.assert_close(logits(compact), expected, rtol=1e-4, atol=1e-4)
    report = parameter_report(compact)
    assert report.dense_parameters == number
    assert report.parameters == sum(parameter.numel() for parameter in compact.parameters())
    compact.save_pretrained(tmp_path / "compact")
    loaded = LLAMA.model.from_pretrained(tmp_path / "compact")
    assert torch.equal(logits(loaded), logits(compact))
    assert parameter_report(loaded) == report


BOTH_ROLES = [name for name in IMPORTANCES if not name.startswith("fisher")]


@TIED
@pytest.mark.parametrize("importance", BOTH_ROLES)
def test_a_tied_head_uses_the_factors_of_the_embedding(importance: str, tmp_path: Path) -> None:
    factor_format = FORMATS[BOTH_ROLES.index(importance) % 2]
    ranks = {"model.embed_tokens": 9, "model.layers.0.mlp.up_proj": 3}
    form = {"compensation": "keep", "param_ratio": 0.99, "factor_format": factor_format, "importance": importance}
    model = trained(tmp_path, target_modules=list(ranks), compact_ranks=ranks, **form)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(LLAMA.build()))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    compact = model.merge_and_unload()
    assert_plain(compact)
    embedding, head = compact.get_input_embeddings(), compact.get_output_embeddings()
    assert isinstance(head, TiedHead)
    assert head.embedding is embedding
    torch.testing.assert_close(logits(compact), expected, rtol=1e-4, atol=1e-4)
    report = parameter_report(compact)
    assert report.dense_parameters == sum(parameter.numel() for parameter in LLAMA.build().parameters())
    assert report.parameters == sum(parameter.numel() for parameter in compact.parameters())
    assert report.layers["model.embed_tokens"].parameters == sum(p.numel() for p in embedding.parameters())
    assert_checkpoint(compact, LLAMA, tmp_path / "compact")
    dense = densify(type(compact).from_pretrained(tmp_path / "compact"))
    assert dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    dense.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(LLAMA.model.from_pretrained(tmp_path / "dense")), logits(dense))


@TIED
def test_a_tied_pair_that_stays_whole_beside_layers_that_do_not_stays_tied(tmp_path: Path) -> None:
    ranks = {"model.embed_tokens": 32, "model.layers.0.mlp.up_proj": 3}
    form = {"compensation": "keep", "param_ratio": 0.99}
    model = trained(tmp_path, target_modules=list(ranks), compact_ranks=ranks, **form)
    expected = logits(model)
    compact = model.merge_and_unload()
    assert compact.get_output_embeddings().weight is compact.get_input_embeddings().weight
    torch.testing.assert_close(logits(compact), expected, rtol=1e-4, atol=1e-4)
    compact.save_pretrained(tmp_path / "compact")
    loaded = LLAMA.model.from_pretrained(tmp_path / "compact")
    assert torch.equal(logits(loaded), logits(compact))
    assert parameter_report(loaded) == parameter_report(compact)


@TIED
def test_a_tied_pair_that_stays_whole_stays_tied(tmp_path: Path) -> None:
    for compact in (True, False):
        model = trained(tmp_path, target_modules=["embed_tokens"], compact_ranks={"model.embed_tokens": 9})
        if compact:
            model.base_model.set_param_ratio(1.0)
        expected = logits(model)
        merged = model.merge_and_unload(compact=compact)
        assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
        if compact:
            torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(LLAMA.model.from_pretrained(tmp_path / "merged")), logits(merged))


@TIED
@pytest.mark.parametrize("factor_format", FORMATS)
def test_a_lora_on_the_factors_of_a_tied_pair_is_merged(factor_format: str, tmp_path: Path) -> None:
    form = {"factor_format": factor_format, "compact_ranks": {"model.embed_tokens": 9}}
    compact = trained(tmp_path, target_modules=["embed_tokens"], **form).merge_and_unload()
    before = logits(compact)
    chosen = {"target_modules": ["embed_tokens.left", "embed_tokens.right"], "r": 2, "init_lora_weights": False}
    lora = get_peft_model(compact, LoraConfig(**chosen))
    changed = logits(lora)
    assert not torch.allclose(changed, before, atol=1e-3)
    torch.testing.assert_close(logits(lora.merge_and_unload()), changed, rtol=1e-3, atol=1e-3)


@TIED
@pytest.mark.parametrize(
    ("importance", "statistic"), [("kronecker", "output_gram"), ("lora_activation", "signed_output_gram")]
)
def test_what_a_tied_head_says_of_the_weight_is_observed(importance: str, statistic: str) -> None:
    """The sum of g g^T and |d|^2 h h^T over both roles, written densely."""
    model = wrap(target_modules=["embed_tokens"], importance=importance, warmup=5, total_steps=6)
    inner = model.base_model.model
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            output.retain_grad()
            seen[name] = (inputs[0].detach(), output)

        return hook

    inner.get_input_embeddings().register_forward_hook(keep("in"))
    inner.get_output_embeddings().register_forward_hook(keep("out"))
    model(**LLAMA.inputs()).loss.backward()
    (_, y), (h, answers) = seen["in"], seen["out"]
    g, h, d = (tensor.double().flatten(0, 1) for tensor in (y.grad, h, answers.grad))
    expected = g.T @ g + (d.square().sum(1)[:, None] * h).T @ h
    found = inner.get_input_embeddings().statistics("default")
    assert reference.relative_error(found.sums[statistic], expected) < 1e-5
    assert found.counts["token"] == int(g.any(1).sum())


PROCESS = """
import sys
with_package = sys.argv[1] == "with"
if with_package:
    import lora_svd
else:
    sys.modules["lora_svd"] = None  # as if it were not installed
import torch, transformers
for folder, name in zip(sys.argv[2::2], sys.argv[3::2]):
    saved = torch.load(folder + "-logits", weights_only=True)
    model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=not with_package)
    with torch.no_grad():
        print(torch.equal(model.eval().double()(**saved["inputs"]).logits.float(), saved["logits"]))
    if not with_package:
        try:
            getattr(transformers, name).from_pretrained(folder, trust_remote_code=False)
        except RuntimeError as error:
            print("ignore_mismatched_sizes" in str(error))
"""


@TIED
def test_loads_in_another_process_with_the_package_and_without(tmp_path: Path) -> None:
    arguments = []
    for folder, name, architecture, factor_format, auto in (
        (tmp_path / "bert", "bert", BERT, "pivoted", "AutoModelForSequenceClassification"),
        (tmp_path / "untied", "llama", UNTIED, "factors", "AutoModelForCausalLM"),
        (tmp_path / "tied", "llama", LLAMA, "pivoted", "AutoModelForCausalLM"),
    ):
        choices = targets(name, factor_format=factor_format)
        compact = trained(tmp_path / "run", architecture, **choices).merge_and_unload()
        save_compact(compact, folder, self_contained=True)
        inputs = {key: value for key, value in architecture.inputs().items() if key != "labels"}
        # in float64, since the last bit of a float32 product depends on where in a mapped file a factor lies
        torch.save({"inputs": inputs, "logits": logits(compact.double(), architecture)}, f"{folder}-logits")
        arguments += [str(folder), auto]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    for kind, answers in (("with", 3), ("without", 6)):
        command = [sys.executable, "-W", "ignore", "-c", PROCESS, kind, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["True"] * answers, done.stderr


# -- what is refused ---------------------------------------------------------------------------------------------------


@TIED
def test_what_is_tied_in_other_ways_is_refused() -> None:
    says = (
        r"target_modules: the weight of the embedding bert\.embeddings\.word_embeddings is that of cls\.predictions\.d"
    )
    mlm = Architecture(ARCHITECTURES["bert"].config, BertForMaskedLM)
    with pytest.raises(LoraSVDError, match=says):
        wrap(mlm, target_modules=["word_embeddings"])
    says = r"importance: got 'fisher' for the embedding model\.embed_tokens, whose weight is that of lm_head as well"
    with pytest.raises(LoraSVDError, match=says):
        wrap(target_modules=["embed_tokens"], importance="fisher")


def test_an_embedding_that_scales_is_refused() -> None:
    with pytest.raises(TypeError, match=r"embed_tokens is Gemma3TextScaledWordEmbedding, which is not supported"):
        wrap(untied("gemma3"), target_modules=["embed_tokens"])


def test_an_embedding_that_changes_its_weight_is_refused() -> None:
    net = Net(torch.randn(NUM_IDS, WIDTH), is_embedding=True)
    net.embed.max_norm = 1.0
    with pytest.raises(LoraSVDError, match=r"target_modules: embed is an embedding with max_norm=1\.0, expected None"):
        get_peft_model(net, LoraSVDConfig(target_modules=["embed"]))


def test_kronecker_products_are_refused() -> None:
    says = (
        r"decomposition: got 'kronecker' for the embedding bert\.embeddings\.word_embeddings, expected one of low rank"
    )
    with pytest.raises(LoraSVDError, match=says):
        wrap(BERT, target_modules=["word_embeddings"], decomposition="kronecker", factor_format="factors")


def test_a_damaged_config_is_refused() -> None:
    with pytest.raises(LoraSVDError, match="tied: this compact checkpoint ties lm_head to 3, expected a module's name"):
        LoraSVDCompactConfig(tied={"lm_head": 3})  # pyright: ignore[reportArgumentType] - what a file may hold


def test_all_linear_leaves_embeddings_alone() -> None:
    assert not any(isinstance(module, LoraSVDEmbedding) for module in wrap(UNTIED).modules())
