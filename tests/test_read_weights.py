"""Losses that multiply with an output layer's weight themselves, as TRL's trainers and fused kernels do.

They train what is shipped, before and after the model is compact, or are refused in the first step.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import set_module_tensor_to_device
from datasets import Dataset
from models import (
    ARCHITECTURES,
    LLAMA,
    TIED,
    Architecture,
    assert_bit_equal,
    settings,
    tensors,
    trained,
    wrap,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tiny_lm import make_text, save_tiny_lm
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DebertaConfig, DebertaForMaskedLM, Trainer

from lora_svd import LoraSVDCallback, LoraSVDError
from lora_svd.compact import LowRankLinear, TiedHead
from lora_svd.importance import IMPORTANCES
from lora_svd.statistics import STATISTICS
from lora_svd.tuner.layer import LoraSVDLinear

pytestmark = TIED
UNTIED = Architecture(lambda **changes: LLAMA.config(**{"tie_word_embeddings": False, **changes}), LLAMA.model)
BIASED = ARCHITECTURES["phi"]  # the output layer has a bias
HEADS = {"tied": (LLAMA, "model.embed_tokens"), "own": (UNTIED, "lm_head"), "biased": (BIASED, "lm_head")}
PRESETS = {"tied": "lora_diagonal", "own": "lora", "biased": "lora"}  # that need no gradients of single outputs
MATCHING = {"rtol": 1e-4, "atol": 1e-6}


def called_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).loss


def read_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The same, from the weight of the output layer."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = inner.base_model(input_ids=inputs["input_ids"]).last_hidden_state[:, :-1]
    head = inner.get_output_embeddings()
    answers = F.linear(hidden, head.weight, head.bias)
    return F.cross_entropy(answers.flatten(0, 1), inputs["labels"][:, 1:].flatten())


def gradients(model: nn.Module, loss: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every trained parameter, with the loss itself."""
    model.zero_grad()
    value = loss(model, inputs)
    value.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": value.detach(), **found}


def assert_alike(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    expected, found = (gradients(model, loss, inputs) for loss in (called_loss, read_loss))
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **MATCHING, msg=name)


def compressed(head: str, folder: Path, **changes: Any) -> PeftModel:
    architecture, target = HEADS[head]
    inner = "fc1" if head == "biased" else "mlp.up_proj"
    ranks = {target: 9, **{name: 4 for name, _ in architecture.build().named_modules() if name.endswith(inner)}}
    chosen = {"target_modules": list(ranks), "compact_ranks": ranks, "param_ratio": 0.99, "importance": PRESETS[head]}
    return trained(folder, architecture, **{**chosen, **changes})


@pytest.mark.parametrize("head", HEADS)
def test_reading_trains_like_calling(head: str, tmp_path: Path) -> None:
    """While the weight is whole, with factors, with two adapters, and when the adapters are off."""
    architecture, target = HEADS[head]
    inputs = architecture.inputs()
    whole = wrap(architecture, target_modules=[target, "q_proj"], importance=PRESETS[head], init_weights=False)
    model = compressed(head, tmp_path, train_factors=True)
    for each in (whole, model):
        assert_alike(each, inputs)
        with each.disable_adapter():
            torch.testing.assert_close(read_loss(each, inputs), called_loss(architecture.build(), inputs))
    model.add_adapter("second", settings(target_modules=[target], importance="none", init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert_alike(model, inputs)
    model.base_model.set_adapter("default")
    model.merge_adapter()
    torch.testing.assert_close(read_loss(model, inputs), called_loss(model, inputs), **MATCHING)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("form", ["pivoted", "factors", "kronecker"])
def test_reading_a_compact_model_is_like_calling_it(head: str, form: str, tmp_path: Path) -> None:
    """Merged and loaded, in half precision, and with a LoRA on the factors."""
    if head == "tied" and form == "kronecker":
        pytest.skip("an embedding has no Kronecker products")
    choices = {"decomposition": "kronecker", "factor_format": "factors"} if form == "kronecker" else {}
    architecture, _ = HEADS[head]
    inputs = architecture.inputs()
    compact: Any = compressed(head, tmp_path, **{"factor_format": form, **choices}).merge_and_unload()
    assert isinstance(compact.get_output_embeddings(), TiedHead if head == "tied" else LowRankLinear)
    compact.save_pretrained(tmp_path / "compact")
    loaded = architecture.model.from_pretrained(tmp_path / "compact")
    for model in (compact, loaded):
        assert_alike(model, inputs)
    half = copy.deepcopy(loaded).to(torch.bfloat16)
    torch.testing.assert_close(read_loss(half, inputs).float(), called_loss(half, inputs), rtol=0.02, atol=0.02)
    parts = ["embed_tokens.right", "embed_tokens.left"] if head == "tied" else ["lm_head.left", "lm_head.right"]
    lora = get_peft_model(loaded, LoraConfig(target_modules=parts, r=2, init_lora_weights=False))
    assert_alike(lora, inputs)


@pytest.mark.parametrize("head", HEADS)
def test_the_marker_stays_in_the_files(head: str, tmp_path: Path) -> None:
    """Whatever moves tensors about, and in whichever way a state dict is loaded."""
    architecture, target = HEADS[head]
    compact: Any = compressed(head, tmp_path).merge_and_unload()
    state = tensors(compact)
    assert state[f"{target}.weight"].tolist() == [0]
    assert not compact.load_state_dict(state).unexpected_keys
    for name, _ in list(compact.get_submodule(target).named_buffers()):
        set_module_tensor_to_device(compact.get_submodule(target), name, "cpu")  # as accelerate's hooks do
    assert_bit_equal(tensors(compact), state)
    compact.save_pretrained(tmp_path / "compact")
    with safe_open(tmp_path / "compact" / "model.safetensors", framework="pt") as file:
        assert file.get_slice(f"{target}.weight").get_shape() == [1]
    loaded = architecture.model.from_pretrained(tmp_path / "compact")
    assert_bit_equal(tensors(loaded), state)
    with pytest.raises(
        RuntimeError, match=rf"Unexpected key\(s\).*{target}\.weight|size mismatch for {target}\.weight"
    ):
        loaded.load_state_dict({**state, f"{target}.weight": torch.zeros(64, 32)})


def observed(head: str, loss: Any, importance: str) -> dict[str, Tensor]:
    architecture, target = HEADS[head]
    model = wrap(
        architecture, target_modules=[target, "q_proj"], importance=importance, warmup=5, total_steps=6, **ZERO[head]
    )
    loss(model, architecture.inputs()).backward()
    model.base_model.update_and_allocate(0, total_steps=6)
    return dict(model.base_model.model.get_submodule(target).statistics("default").sums)


ZERO = {"tied": {"init_weights": False}, "own": {}, "biased": {}}


def presets(head: str, *, possible: bool) -> list[str]:
    """Those that need no gradients of single tokens from the output layer; or the others."""
    counted = {"input_gram", "input_abs"} if head == "tied" else set()  # of ids, by the embedding
    hidden = {name for name, statistic in STATISTICS.items() if statistic.per != "step"} - counted
    refused = "fisher" if head == "tied" else None  # of a tied pair in any case
    return [
        name
        for name, preset in IMPORTANCES.items()
        if hidden.isdisjoint(preset.statistics) == possible and not preset.elementwise and name != refused
    ]


@pytest.mark.parametrize("head", ["tied", "own"])
def test_what_is_observed_is_the_same(head: str) -> None:
    """With every importance that is not refused."""
    chosen = presets(head, possible=True)
    assert {"lora", "none", *(("lora_diagonal", "activation") if head == "tied" else ())} <= set(chosen)
    for importance in chosen:
        expected, found = (observed(head, loss, importance) for loss in (called_loss, read_loss))
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-9, msg=f"{importance}: {name}")


@pytest.mark.parametrize("head", ["tied", "own"])
def test_what_cannot_be_observed_is_refused_in_the_first_step(head: str) -> None:
    _, target = HEADS[head]
    chosen = presets(head, possible=False)
    assert {"lora_activation", "kronecker", "gradient_activation"} <= set(chosen)
    for importance in chosen:
        says = rf"importance: got one that observes single tokens of {target}, .* expected one of \[.*'lora'.*exclude_"
        with pytest.raises(LoraSVDError, match=says):
            observed(head, read_loss, importance)


def test_reading_without_computing_is_nothing() -> None:
    """Types and devices are asked for by many."""
    model = wrap(target_modules=["embed_tokens", "up_proj"], warmup=5, total_steps=6)
    inner = model.base_model.model
    for layer in (inner.get_output_embeddings(), *(m for m in inner.modules() if isinstance(m, LoraSVDLinear))):
        assert layer.weight.dtype == torch.float32
        assert layer.weight.shape in {(64, 32), (48, 32)}
    called_loss(model, LLAMA.inputs()).backward()
    model.base_model.update_and_allocate(0, total_steps=6)


def test_an_embedding_that_is_read_beside_its_calls_is_refused() -> None:
    """The head of this model multiplies with the weight of its embedding."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = DebertaForMaskedLM(DebertaConfig(**sizes, intermediate_size=48, legacy=False))
    model = get_peft_model(base, settings(target_modules=["word_embeddings", "query_proj"], warmup=1, total_steps=2))
    model(**LLAMA.inputs()).loss.backward()
    says = r"target_modules: the model uses the weights of deberta\.embeddings\.word_embeddings .*exclude_modules="
    with pytest.raises(LoraSVDError, match=says):
        model.base_model.update_and_allocate(0, total_steps=2)


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    return save_tiny_lm(tmp_path / "dense")


def sft_trainer(model: nn.Module, folder: Path, language_model: Path, **changes: Any) -> Any:
    from trl import SFTConfig, SFTTrainer  # late: it takes seconds

    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    arguments = SFTConfig(str(folder), **{"max_steps": 12, "learning_rate": 1e-2, **quiet})
    data = Dataset.from_dict({"text": [make_text(12, seed=i) for i in range(32)]})
    kind = changes.pop("kind", SFTTrainer)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    return kind(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer, **changes)


@torch.no_grad()
def own_loss(model: nn.Module, trainer: Any) -> float:
    """What the model's own logits say of the evaluation data, the mean over tokens."""
    total, count = 0.0, 0
    for batch in trainer.get_eval_dataloader():
        answers, labels = model.eval()(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
        total += float(F.cross_entropy(answers.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL asks transformers
def test_sft_trainer_trains_what_is_shipped(language_model: Path, tmp_path: Path) -> None:
    ranks = {"model.embed_tokens": 16, **{f"model.layers.{i}.mlp.up_proj": 12 for i in range(2)}}
    config = settings(
        target_modules=list(ranks), compact_ranks=ranks, param_ratio=0.9, importance="lora_diagonal", warmup=4
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(language_model), config)
    before = own_loss(model, sft_trainer(model, tmp_path, language_model))
    trainer = sft_trainer(model, tmp_path, language_model, callbacks=[LoraSVDCallback()])
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    assert found < before - 0.1
    assert found == pytest.approx(own_loss(model, trainer), abs=1e-3)
    compact = model.merge_and_unload()
    assert isinstance(compact.get_output_embeddings(), TiedHead)
    assert own_loss(compact, trainer) == pytest.approx(found, abs=0.05)
    further = sft_trainer(compact, tmp_path, language_model)
    further.train()
    assert further.evaluate()["eval_loss"] == pytest.approx(own_loss(compact, further), abs=1e-3)
    assert own_loss(compact, further) < found - 0.1


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_the_way_that_the_refusal_names_works(language_model: Path, tmp_path: Path) -> None:
    """The default importance, and distillation, where the model computes its own loss."""
    from trl import SFTTrainer

    class OwnLoss(SFTTrainer):
        compute_loss = Trainer.compute_loss

    choices = {"target_modules": ["embed_tokens", "up_proj"], "warmup": 4}
    for more, says in (({}, "importance: got one that observes"), ({"distillation": 0.5}, "distillation: got an out")):
        for kind in (SFTTrainer, OwnLoss):
            base = AutoModelForCausalLM.from_pretrained(language_model)
            model = get_peft_model(base, settings(**choices, **more))
            trainer = sft_trainer(model, tmp_path, language_model, kind=kind, callbacks=[LoraSVDCallback()])
            if kind is SFTTrainer:
                with pytest.raises(LoraSVDError, match=rf"{says}.*compute_loss = transformers\.Trainer\.compute_loss"):
                    trainer.train()
            else:
                trainer.train()
                assert model.base_model.current_param_ratio() <= 0.6
                assert_mixed(model, next(iter(trainer.get_train_dataloader())), more.get("distillation", 0.0))


def assert_mixed(model: PeftModel, batch: dict[str, Tensor], share: float) -> None:
    """The loss has this share of the divergence from the model without adapters."""
    answers, labels = model.train()(input_ids=batch["input_ids"], labels=batch["labels"]), batch["labels"][:, 1:]
    with torch.no_grad(), model.disable_adapter():
        teacher = model(input_ids=batch["input_ids"]).logits
    counted = labels != -100
    student, teacher = (rows[:, :-1][counted].log_softmax(-1) for rows in (answers.logits, teacher))
    distance = (teacher.exp() * (teacher - student)).sum(-1).mean()
    expected = (1 - share) * F.nll_loss(student, labels[counted]) + share * distance
    torch.testing.assert_close(answers.loss, expected)
