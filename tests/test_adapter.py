"""The adapter as PEFT users handle it, whole and compressed: save, load, merge, unmerge, disable, several at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, LLAMA, assert_bit_equal, logits, make_trainer, settings, tensors, trained, wrap
from peft import PeftModel, TaskType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from transformers import BertForQuestionAnswering, BertForTokenClassification, LlamaForCausalLM, PreTrainedModel

from lora_svd import LoraSVDConfig, LoraSVDError
from lora_svd.compact import parameter_report

BOTH_STATES = pytest.mark.parametrize("warmup", [2, 5], ids=["compressed", "whole"])


def run(name: str = "llama", *, warmup: int = 2) -> PeftModel:
    """Five steps; a warm-up of 5 ends in the last one, so two fewer steps leave the weights whole."""
    architecture = ARCHITECTURES[name]
    model = wrap(architecture, warmup=warmup, total_steps=5, lora_dropout=0.1)
    for step, sample in enumerate(architecture.data(2 if warmup == 5 else 5)):
        model.train()
        model(**{key: value[None] for key, value in sample.items()}).loss.backward()
        model.base_model.update_and_allocate(step)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        model.zero_grad()
    assert model.peft_config["default"].compressed == (warmup == 2)
    return model.eval()


@BOTH_STATES
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_saved_adapter_loads_bit_equal(name: str, low_cpu_mem_usage: bool, warmup: int, tmp_path: Path) -> None:
    model = run(name, warmup=warmup)
    model.save_pretrained(tmp_path)
    base = ARCHITECTURES[name].build()
    again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=warmup == 5)
    assert again.peft_config["default"].compressed == (warmup == 2)
    assert_bit_equal(tensors(again), tensors(model))
    assert torch.equal(logits(again, ARCHITECTURES[name]), logits(model, ARCHITECTURES[name]))


def test_compressed_adapter_loads_through_transformers(tmp_path: Path) -> None:
    model = run()
    model.save_pretrained(tmp_path)
    base = LLAMA.build()
    base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base), logits(model))


@BOTH_STATES
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_merge_unmerge_disable(name: str, warmup: int) -> None:
    architecture = ARCHITECTURES[name]
    model = run(name, warmup=warmup)
    before, expected = tensors(model), logits(model, architecture)
    with model.disable_adapter():
        assert torch.equal(logits(model, architecture), logits(architecture.build(), architecture))
    assert torch.equal(logits(model, architecture), expected)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, architecture), expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(logits(model, architecture), logits(architecture.build(), architecture))
    model.unmerge_adapter()
    assert_bit_equal(tensors(model), before)
    assert torch.equal(logits(model, architecture), expected)


def test_unload_after_a_merge_returns_the_base() -> None:
    model = run()
    model.merge_adapter()
    assert_bit_equal(tensors(model.unload()), tensors(LLAMA.build()))


def test_merging_the_merged_is_refused_and_can_be_undone() -> None:
    model = run()
    expected = logits(model)
    model.merge_adapter()
    for compact in (True, False):
        with pytest.raises(LoraSVDError, match="unmerge_adapter"):
            model.merge_and_unload(compact=compact)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    assert parameter_report(model.merge_and_unload()).param_ratio <= 0.6


def test_two_adapters_one_compressed(tmp_path: Path) -> None:
    model = run()
    first, base = logits(model), LLAMA.build()
    model.add_adapter("second", settings(init_weights=False, target_modules=["q_proj", "down_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(second, logits(base))
    model.base_model.set_adapter(["default", "second"])
    assert not torch.allclose(logits(model), first)
    torch.testing.assert_close(outputs_of(model, "down_proj"), changes(model, base, "down_proj"), rtol=1e-4, atol=1e-5)
    with pytest.raises(LoraSVDError, match=r"adapter_names: \['default', 'second'\] are 2 adapters"):
        model.merge_and_unload()
    both = logits(model)
    model.merge_adapter(["default", "second"])
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "both")
    again.load_adapter(tmp_path / "both" / "second", "second")
    assert torch.equal(logits(again), first)
    again.set_adapter("second")
    torch.testing.assert_close(logits(again), second)
    model.set_adapter("default")
    compact = model.merge_and_unload()
    assert parameter_report(compact).param_ratio <= 0.6
    assert not hasattr(compact, "peft_config")


def outputs_of(model: torch.nn.Module, suffix: str) -> torch.Tensor:
    """What every layer of that name answers to the same input."""
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        layers = [module for name, module in model.named_modules() if name.endswith(suffix) and callable(module)]
        return torch.stack([layer(x) for layer in layers])


def changes(model: PeftModel, base: torch.nn.Module, suffix: str) -> torch.Tensor:
    """The base's answer and, added up, what each adapter by itself changes in it."""
    dense = outputs_of(base, suffix)
    total = dense.clone()
    for name in ("default", "second"):
        model.set_adapter(name)
        total += outputs_of(model, suffix) - dense
    model.base_model.set_adapter(["default", "second"])
    return total


def test_training_goes_on_after_loading_a_whole_adapter(tmp_path: Path) -> None:
    """What was observed before counts on: a run in two halves saw all its tokens."""
    model = run(warmup=5)
    model.save_pretrained(tmp_path / "half")
    again = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "half", is_trainable=True)
    name = "base_model.model.model.layers.0.mlp.up_proj"
    before = again.get_submodule(name).statistics("default").counts["token"]
    make_trainer(again, tmp_path, steps=6).train()
    assert again.get_submodule(name).statistics("default").counts["token"] > before > 0
    assert parameter_report(again.merge_and_unload()).param_ratio <= 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(dtype: torch.dtype, tmp_path: Path) -> None:
    """The bypass is float32; frozen factors are of the base's type until PEFT loads them, the compact model is."""

    def base_of(dtype: torch.dtype) -> Any:
        base = LLAMA.build()
        for parameter in base.parameters():  # not the rotary frequencies, which no loader rounds
            parameter.data = parameter.data.to(dtype)
        return base

    model = PeftModel(base_of(dtype), settings())
    make_trainer(model, tmp_path, learning_rate=1e-3).train()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base_of(dtype), tmp_path / "adapter")
    for tuned, expected in ((model, dtype), (again, torch.float32)):
        layer = tuned.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        assert layer.adapter("default").A.dtype == torch.float32
        factors = layer.factors("default")
        assert (factors.left.dtype, factors.right.dtype) == (expected, expected)
    assert torch.equal(logits(again), logits(model))
    compact = model.merge_and_unload()
    assert {parameter.dtype for parameter in compact.parameters()} == {dtype}
    expected = logits(compact)
    assert torch.isfinite(expected).all()
    compact.save_pretrained(tmp_path / "compact")
    assert torch.equal(logits(LLAMA.model.from_pretrained(tmp_path / "compact")), expected)


def test_adapter_of_a_trainer_checkpoint_loads_alone(tmp_path: Path) -> None:
    model = wrap(warmup=2)
    make_trainer(model, tmp_path, steps=4, save_strategy="steps", save_steps=4).train()
    again = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "checkpoint-4")
    assert torch.equal(logits(again), logits(model))
    assert trained(tmp_path / "again", warmup=2, steps=4).peft_config["default"].compact_ranks == (
        again.peft_config["default"].compact_ranks
    )


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")  # PEFT, always
def test_dense_merge_of_a_tied_head_leaves_the_embedding_alone(tmp_path: Path) -> None:
    model = trained(tmp_path, target_modules=["lm_head", "q_proj"], warmup=1)
    model.base_model.set_param_ratio(1)
    embedding = model.get_input_embeddings().weight.detach().clone()
    expected = logits(model)
    dense = model.merge_and_unload()
    assert torch.equal(dense.get_input_embeddings().weight, embedding)
    torch.testing.assert_close(logits(dense), expected, rtol=0, atol=1e-5)
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "dense")), logits(dense))


def test_a_compression_that_left_every_layer_dense_is_over_after_loading(tmp_path: Path) -> None:
    model = trained(tmp_path, param_ratio=0.9999999999)
    assert model.peft_config["default"].compressed
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    assert again.peft_config["default"].compressed
    assert_bit_equal(tensors(again.merge_and_unload()), tensors(model.merge_and_unload()))


def test_one_config_for_two_models(tmp_path: Path) -> None:
    """What became of the first is not said in the user's config, with which the second would begin."""
    config, found = settings(warmup=2), []
    for name in ("first", "second"):
        torch.manual_seed(3)
        model = get_peft_model(LLAMA.build(), config)
        make_trainer(model, tmp_path / name, steps=4).train()
        assert model.peft_config["default"].compressed
        assert (config.compressed, config.compact_ranks) == (False, None)
        found.append(tensors(model))
    assert_bit_equal(*found)


def test_config_of_a_compressed_adapter_is_no_adapter(tmp_path: Path) -> None:
    trained(tmp_path).save_pretrained(tmp_path / "adapter")
    config = LoraSVDConfig.from_pretrained(tmp_path / "adapter")
    config.inference_mode = False
    model = get_peft_model(LLAMA.build(), config)
    with pytest.raises(LoraSVDError, match="compressed: got True for an adapter whose factors are all zero"):
        make_trainer(model, tmp_path / "again").train()


@pytest.mark.parametrize(
    ("kind", "task", "head"),
    [
        (BertForTokenClassification, "TOKEN_CLS", "classifier"),
        (BertForQuestionAnswering, TaskType.QUESTION_ANS, "qa_outputs"),
    ],
)
def test_head_of_a_task_is_trained_whole(kind: type[PreTrainedModel], task: str, head: str) -> None:
    model = get_peft_model(kind(ARCHITECTURES["bert"].config()), settings(task_type=task))
    assert isinstance(model.base_model.model.get_submodule(head), ModulesToSaveWrapper)
    assert not any(head in name for name in model.peft_config["default"].target_modules)


def test_statistics_keep_their_type_in_half_precision(tmp_path: Path) -> None:
    model = wrap(warmup=2)
    trainer = make_trainer(model, tmp_path, steps=4, bf16_full_eval=True)
    trainer.train()
    names = [name for name in tensors(model) if "_gram" in name or "counts" in name]
    before = {name: tensors(model)[name] for name in names}
    trainer.evaluate()
    assert next(model.parameters()).dtype == torch.bfloat16
    assert_bit_equal({name: tensors(model)[name] for name in names}, before)
    model.base_model.set_param_ratio(0.5)


def test_shorter_run_that_is_resumed_behind_its_factorization_is_compressed(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 6}
    make_trainer(wrap(warmup=0.5), tmp_path, steps=20, **saving).train()
    model = wrap(warmup=0.5)
    make_trainer(model, tmp_path, steps=10).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert model.peft_config["default"].compressed
    assert model.base_model.current_param_ratio() <= 0.6


def test_one_adapter_for_each_row_of_a_batch_is_refused() -> None:
    model = run()
    with pytest.raises(LoraSVDError, match=r"adapter_names: got \['__base__', 'default'\] for the rows of a batch"):
        model(**LLAMA.inputs(), adapter_names=["__base__", "default"])
