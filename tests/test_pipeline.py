"""From a config to a compact model: every preset and form, the Trainer and the hand-written loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import (
    ARCHITECTURES,
    LLAMA,
    assert_bit_equal,
    assert_kept,
    assert_plain,
    linear_sizes,
    logits,
    make_trainer,
    tensors,
    trained,
    wrap,
)
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback

from lora_svd import LoraSVDCallback, LoraSVDConfig, LoraSVDError
from lora_svd.compact import LowRankLinear, parameter_report
from lora_svd.importance import IMPORTANCES
from lora_svd.tuner.layer import LoraSVDLinear


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("compensation", ["absorb", "keep"])
@pytest.mark.parametrize("factor_format", ["pivoted", "factors"])
def test_every_form(name: str, compensation: str, factor_format: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = trained(tmp_path, architecture, compensation=compensation, factor_format=factor_format, r=2)
    before = logits(model, architecture)
    compact = model.merge_and_unload()
    assert_kept(compact, 0.6)
    low_rank = [module for module in compact.modules() if isinstance(module, LowRankLinear)]
    assert {module.factor_format for module in low_rank} <= {factor_format}  # where neurons go, all may end dense
    if compensation == "keep":  # nothing is cut at merge
        torch.testing.assert_close(logits(compact, architecture), before, rtol=1e-4, atol=1e-4)
    compact.save_pretrained(tmp_path / "compact")
    reloaded = architecture.model.from_pretrained(tmp_path / "compact")
    assert torch.equal(logits(reloaded, architecture), logits(compact, architecture))


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_every_importance(importance: str, allocation: str, tmp_path: Path) -> None:
    compact = trained(tmp_path, importance=importance, allocation=allocation).merge_and_unload()
    assert torch.isfinite(logits(compact)).all()
    assert parameter_report(compact).param_ratio <= 0.6
    assert compact.config.quantization_config.method["importance"] == importance


def kept_by_step(tmp_path: Path, **changes: float) -> list[float]:
    """The share of the targeted weights kept after each step of a Trainer run, and after the merge."""
    model = wrap(importance="activation", rank_multiple=1, **changes)
    shares = []
    original = model.base_model.update_and_allocate

    def update_and_allocate(*args: int, **kwargs: int) -> None:
        original(*args, **kwargs)
        shares.append(share(model))

    model.base_model.update_and_allocate = update_and_allocate
    make_trainer(model, tmp_path, steps=10).train()
    return [*shares, parameter_report(model.merge_and_unload()).param_ratio]


def share(model: PeftModel) -> float:
    """Kept / original numbers of the targeted weights, pivoted, from the shapes of the factors."""
    kept = total = 0
    for layer in (module for module in model.modules() if isinstance(module, LoraSVDLinear)):
        (m, n), factors = layer.dense_weight().shape, layer.factors("default")
        if factors is None:
            kept += m * n
        else:
            kept += factors.rank * (len(factors.left) + factors.right.shape[1] - factors.rank)
        total += m * n
    return kept / total


def test_one_shot_schedule_compresses_once(tmp_path: Path) -> None:
    shares = kept_by_step(tmp_path, warmup=4)
    assert shares[:3] == [1, 1, 1]
    assert all(share == shares[3] for share in shares[3:])


def test_the_size_is_logged(tmp_path: Path) -> None:
    reported = []

    class Reporter(TrainerCallback):
        def on_log(self, *_: object, logs: dict[str, float], **__: object) -> None:
            reported.append(logs["param_ratio"])

    model = wrap(importance="activation", warmup=3)
    callbacks = [LoraSVDCallback(), Reporter()]
    trainer = make_trainer(model, tmp_path, callbacks=callbacks, logging_strategy="steps", logging_steps=1)
    trainer.train()
    assert reported == [1, 1, *[share(model)] * 4]  # after each step, and once more at the end
    assert [entry["param_ratio"] for entry in trainer.state.log_history] == reported


def test_cubic_schedule_falls_to_the_target(tmp_path: Path) -> None:
    shares = kept_by_step(tmp_path, warmup=0.2, compression=6, compression_interval=1, neurons=False)
    t = torch.arange(7, dtype=torch.float64) / 7
    cubic = (0.6 + 0.4 * (1 - t[1:]) ** 3).tolist()
    assert shares[0] == 1
    for found, budget in zip(shares[1:7], cubic, strict=True):
        assert budget - 0.01 < found <= budget


@pytest.mark.parametrize("schedule", [{"warmup": 3}, {"warmup": 2, "compression": 4, "compression_interval": 2}])
def test_hand_written_loop_equals_trainer(schedule: dict[str, int], tmp_path: Path) -> None:
    steps, batches = 8, []
    by_trainer = wrap(**schedule)
    trainer = make_trainer(by_trainer, tmp_path, steps=steps, max_grad_norm=0.5, lr_scheduler_type="constant")
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: batches.append(collate(rows)) or dict(batches[-1])
    trainer.optimizer = torch.optim.SGD(adapter_parameters(by_trainer), lr=0.5)
    trainer.train()

    by_hand = wrap(**schedule, total_steps=steps).train()
    optimizer = torch.optim.SGD(adapter_parameters(by_hand), lr=0.5)
    for step, batch in enumerate(batches[:steps]):
        by_hand(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter_parameters(by_hand), 0.5)
        by_hand.base_model.update_and_allocate(step)
        optimizer.step()
        optimizer.zero_grad()
    assert by_hand.peft_config["default"].compact_ranks == by_trainer.peft_config["default"].compact_ranks
    assert_bit_equal(tensors(by_hand), tensors(by_trainer))


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("importance", ["lora_activation", "kronecker"])
@pytest.mark.parametrize("reload", [False, True])
def test_another_size_after_the_run(importance: str, reload: bool, tmp_path: Path) -> None:
    model = trained(tmp_path, importance=importance, r=2)
    if reload:
        model.save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "adapter")
    tuner, at_first = model.base_model, tensors(model)
    for param_ratio in (0.9, 0.3, 1.0):
        tuner.set_param_ratio(param_ratio)
        assert model.peft_config["default"].param_ratio == param_ratio
        assert param_ratio - 0.01 < share(model) <= param_ratio
    tuner.set_param_ratio(0.6)
    assert_bit_equal(tensors(model), at_first)  # nothing was lost on the way
    tuner.set_param_ratio(0.4)
    model.save_pretrained(tmp_path / "smaller")
    again = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "smaller")
    assert again.peft_config["default"].param_ratio == 0.4
    assert torch.equal(logits(again), logits(model))
    assert_kept(model.merge_and_unload(), 0.4)


def test_unload_returns_the_untouched_base(tmp_path: Path) -> None:
    for name in ("llama", "gpt2"):
        architecture = ARCHITECTURES[name]
        expected = tensors(architecture.build())
        assert_bit_equal(tensors(trained(tmp_path, architecture).unload()), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("how", [{"compact": False}, {"param_ratio": 1.0}])
def test_dense_base_with_the_lora_merged(name: str, how: dict[str, float], tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = trained(tmp_path, architecture, param_ratio=how.get("param_ratio", 0.6))
    expected = tensors(architecture.build())
    for layer_name, layer in model.base_model.run().layers.items():
        bypass = (
            layer.adapter("default").scaling * layer.adapter("default").B.detach() @ layer.adapter("default").A.detach()
        )
        expected[f"{layer_name}.weight"] += bypass.T if layer.fan_in_fan_out else bypass
    dense = model.merge_and_unload(compact=how.get("compact", True))
    assert linear_sizes(dense) == linear_sizes(architecture.build())
    assert not hasattr(dense.config, "quantization_config")
    torch.testing.assert_close(tensors(dense), expected)
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(
        logits(architecture.model.from_pretrained(tmp_path / "dense"), architecture), logits(dense, architecture)
    )


@pytest.mark.parametrize("schedule", [{}, {"warmup": 1, "compression": 4, "compression_interval": 1}])
def test_given_ranks_are_used(schedule: dict[str, int], tmp_path: Path) -> None:
    names = linear_sizes(LLAMA.build()).keys() - {"lm_head"}
    ranks = {name: 2 + i for i, name in enumerate(sorted(names))}
    model = trained(tmp_path, compact_ranks=ranks, **schedule)
    assert model.peft_config["default"].compact_ranks == ranks
    compact = model.merge_and_unload()
    assert {name: layer.rank for name, layer in parameter_report(compact).layers.items()} == ranks


def test_some_layers_of_all_linear(tmp_path: Path) -> None:
    compact = trained(tmp_path, layers_to_transform=[1], layers_pattern="layers").merge_and_unload()
    assert_kept(compact, 0.6)
    low_rank = [name for name, module in compact.named_modules() if isinstance(module, LowRankLinear)]
    assert low_rank
    assert all(name.startswith("model.layers.1.") for name in low_rank)


@pytest.mark.parametrize("name", ["classifier", "bert.pooler"], ids=["one layer", "several modules"])
def test_head_in_modules_to_save_is_trained_and_kept(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES["bert"]
    model = trained(tmp_path, architecture, task_type="SEQ_CLS", modules_to_save=[name])
    head = tensors(model.base_model.model.get_submodule(f"{name}.modules_to_save.default"))
    compact = model.merge_and_unload()
    assert_plain(compact)
    compact.save_pretrained(tmp_path / "compact")
    for kept in (compact, architecture.model.from_pretrained(tmp_path / "compact")):
        assert_bit_equal(tensors(kept.get_submodule(name)), head)
    before = tensors(architecture.build().get_submodule(name))
    assert not any(torch.equal(tensor, head[key]) for key, tensor in before.items())


def test_modules_to_save_inside_of_one_another_are_refused() -> None:
    expected = (
        r"modules_to_save: bert.embeddings.word_embeddings is inside bert.embeddings, and both match.*"
        r"modules_to_save=\['classifier', 'position_embeddings', 'token_type_embeddings', 'word_embeddings'\]"
    )
    config = LoraSVDConfig(task_type="SEQ_CLS", modules_to_save=["embeddings", "classifier"])
    with pytest.raises(LoraSVDError, match=expected):
        get_peft_model(ARCHITECTURES["bert"].build(), config)
    config = LoraSVDConfig(task_type="SEQ_CLS", modules_to_save=["bert.embeddings", "classifier"])
    get_peft_model(ARCHITECTURES["bert"].build(), config)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize(("head_rank", "layer"), [(4, LowRankLinear), (32, nn.Linear)])
def test_tied_head_that_is_targeted_is_untied(
    name: str, head_rank: int, layer: type[nn.Module], tmp_path: Path
) -> None:
    """A head that stays dense has its own weight too: the bypass is in it."""
    architecture = ARCHITECTURES[name]
    base = architecture.build()
    targets = [key for key in linear_sizes(base) if key.endswith(("q_proj", ".q", "lm_head"))]
    ranks = {key: head_rank if key == "lm_head" else 4 for key in targets}
    num_parameters = sum(parameter.numel() for parameter in base.parameters())
    embedding = base.get_input_embeddings().weight.detach().clone()
    model = trained(tmp_path, architecture, param_ratio=0.9, target_modules=targets, compact_ranks=ranks)
    compact = model.merge_and_unload()
    assert isinstance(compact.get_output_embeddings(), layer)
    assert torch.equal(compact.get_input_embeddings().weight, embedding)
    assert parameter_report(compact).dense_parameters == num_parameters
    expected = logits(compact, architecture)
    compact.save_pretrained(tmp_path / "compact")
    reloaded = architecture.model.from_pretrained(tmp_path / "compact")
    assert_bit_equal(tensors(reloaded), tensors(compact))
    assert torch.equal(logits(reloaded, architecture), expected)
    assert parameter_report(reloaded) == parameter_report(compact)
