"""What transformers does with a compact model and its config besides loading and saving it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from models import (
    ARCHITECTURES,
    KINDS,
    LLAMA,
    TIED,
    Architecture,
    assert_bit_equal,
    logits,
    make_trainer,
    settings,
    tensors,
    trained,
    wrap,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from lora_svd import LoraSVDError
from lora_svd.compact import LowRankLinear, TiedHead, densify, parameter_report, save_compact
from lora_svd.compact.convert import dense_weight

AUTO = {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForSequenceClassification, "vit": AutoModelForImageClassification}
UNTIED = Architecture(lambda **changes: LLAMA.config(**{"tie_word_embeddings": False, **changes}), LLAMA.model)
HEADS = {"tied": (LLAMA, "model.embed_tokens"), "own": (UNTIED, "lm_head")}


def with_low_rank(target: str, architecture: Architecture, folder: Path, **changes: Any) -> PreTrainedModel:
    ranks = {target: 9, **{f"model.layers.{i}.mlp.up_proj": 4 for i in range(2)}}
    chosen = {"target_modules": list(ranks), "compact_ranks": ranks, "param_ratio": 0.99}
    return trained(folder, architecture, **{**chosen, **changes}).merge_and_unload()


# -- from_config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_from_config_builds_the_low_rank_architecture(name: str, tmp_path: Path) -> None:
    """With random weights like those of a new dense model, from the config of a model and from a file; it trains, is
    saved, and is loaded."""
    architecture, auto = ARCHITECTURES[name], AUTO.get(name, AutoModelForCausalLM)
    compact: Any = trained(tmp_path / "run", architecture).merge_and_unload()
    compact.save_pretrained(tmp_path / "compact")
    for config in (compact.config, AutoConfig.from_pretrained(tmp_path / "compact")):
        model = auto.from_config(config)
        assert type(model) is architecture.model
        assert parameter_report(model) == parameter_report(compact)
        assert tensors(model).keys() == tensors(compact).keys()
        assert all(parameter.requires_grad for parameter in model.parameters())
        before = tensors(model)
        make_trainer(model, tmp_path / "run", architecture, steps=1, callbacks=[]).train()
        assert not torch.equal(logits(model, architecture), logits(compact, architecture))
        changed = {key for key, value in tensors(model).items() if not torch.equal(value, before[key])}
        assert {key for key in changed if ".left." in key or ".right." in key}
        model.save_pretrained(tmp_path / "new")
        assert_bit_equal(tensors(auto.from_pretrained(tmp_path / "new")), tensors(model))


@TIED
@pytest.mark.parametrize("form", ["pivoted", "factors", "kronecker"])
@pytest.mark.parametrize("head", HEADS)
def test_random_factors_have_the_scale_of_a_dense_weight(head: str, form: str, tmp_path: Path) -> None:
    if head == "tied" and form == "kronecker":
        pytest.skip("an embedding has no Kronecker products")
    choices = {"decomposition": "kronecker", "factor_format": "factors"} if form == "kronecker" else {}
    architecture, target = HEADS[head]
    compact = with_low_rank(target, architecture, tmp_path, **{"factor_format": form, **choices})
    deviations, expected = [], []
    for seed in range(20):
        torch.manual_seed(seed)
        model, dense = AutoModelForCausalLM.from_config(compact.config), LLAMA.model(architecture.config())
        deviations.append(float(dense_weight(model.get_submodule(target)).square().mean()))
        expected.append(float(dense.get_parameter(f"{target}.weight").detach().square().mean()))
    assert isinstance(model.get_output_embeddings(), TiedHead if head == "tied" else LowRankLinear)
    assert sum(deviations) == pytest.approx(sum(expected), rel=0.25)


def test_from_config_without_memory_and_of_another_class(tmp_path: Path) -> None:
    compact = trained(tmp_path).merge_and_unload()
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(compact.config)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    empty.load_state_dict(compact.state_dict(), assign=True)
    assert torch.equal(logits(empty), logits(compact))
    headless = AutoModel.from_config(compact.config)
    assert headless.state_dict().keys() == compact.model.state_dict().keys()
    dense = AutoModelForCausalLM.from_config(LLAMA.config())
    assert not any(isinstance(module, LowRankLinear) for module in dense.modules())


@pytest.mark.filterwarnings("ignore:merge_and_unload. the compact layers take:UserWarning")
def test_from_config_of_rounded_factors_is_in_full_precision(tmp_path: Path) -> None:
    wide = Architecture(lambda **changes: LLAMA.config(hidden_size=192, intermediate_size=384, **changes), LLAMA.model)
    model = trained(tmp_path, wide, factor_format="factors", rank_multiple=64)
    compact = model.merge_and_unload(quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    before = copy.deepcopy(compact.config.to_dict())
    new = AutoModelForCausalLM.from_config(compact.config)
    assert {parameter.dtype for parameter in new.parameters()} == {torch.float32}
    assert compact.config.to_dict() == before
    new.save_pretrained(tmp_path / "new")
    assert_bit_equal(tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "new")), tensors(new))


def test_a_dense_model_of_a_compact_config_says_what_to_do(tmp_path: Path) -> None:
    """Its class alone asks nobody; loading what it saves names the way out, which works."""
    compact = trained(tmp_path).merge_and_unload()
    dense = LLAMA.model(copy.deepcopy(compact.config))
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(LoraSVDError, match=r"it is dense: del model\.config\.quantization_config; from_config"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    del dense.config.quantization_config
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(dense))


# -- models that look at the shapes of their layers --------------------------------------------------------------------


class Looks(LlamaForCausalLM):
    """Its initialization depends on the shapes of weights that a module has in its children."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LlamaMLP):
            _, width = module.down_proj.weight.shape
            torch.nn.init.normal_(module.down_proj.weight, std=width**-0.5)


def test_a_class_that_initializes_by_the_shapes_of_children_loads(tmp_path: Path) -> None:
    """Nothing that is in the file is initialized; what is not, such as a new head, is."""
    architecture = Architecture(LLAMA.config, Looks)
    compact: Any = trained(tmp_path / "run", architecture).merge_and_unload()
    compact.save_pretrained(tmp_path / "compact")
    assert_bit_equal(tensors(Looks.from_pretrained(tmp_path / "compact")), tensors(compact))
    torch.manual_seed(5)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "compact", num_labels=3)
    assert_bit_equal(tensors(classifier.model), tensors(compact.model))
    assert 0.01 < float(classifier.score.weight.detach().std()) < 0.03


# -- vocabularies ------------------------------------------------------------------------------------------------------


@TIED
@pytest.mark.parametrize("head", HEADS)
def test_low_rank_vocabularies_are_not_resized_by_half(head: str, tmp_path: Path) -> None:
    architecture, target = HEADS[head]
    compact = with_low_rank(target, architecture, tmp_path)
    before, config = tensors(compact), compact.config.to_dict()
    for arguments in ({"new_num_tokens": 70}, {"pad_to_multiple_of": 100}, {"new_num_tokens": 10}):
        with pytest.raises(
            LoraSVDError, match=r"resize_token_embeddings: got \d+ tokens for a model with 64 .*densify"
        ):
            compact.resize_token_embeddings(**arguments)
        assert_bit_equal(tensors(compact), before)
        assert compact.config.to_dict() == config
    for arguments in ({}, {"new_num_tokens": 64}, {"pad_to_multiple_of": 32}):
        assert compact.resize_token_embeddings(**arguments) is compact.get_input_embeddings()
    dense = densify(compact)
    dense.resize_token_embeddings(70)
    assert dense.get_input_embeddings().weight.shape == dense.get_output_embeddings().weight.shape == (70, 32)


def test_dense_vocabularies_are_resized_as_ever(tmp_path: Path) -> None:
    compact = trained(tmp_path, exclude_modules=["up_proj"]).merge_and_unload()
    compact.resize_token_embeddings(70)
    assert compact.get_output_embeddings().weight.shape == (70, 32)
    compact.save_pretrained(tmp_path / "compact")
    assert_bit_equal(tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "compact")), tensors(compact))


# -- inference mode ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:merge_and_unload. the compact layers take:UserWarning")
@pytest.mark.parametrize("how", ["merge", "dense merge", "other size", "4 bits", "densify"])
def test_what_is_made_under_inference_mode_can_be_trained(how: str, tmp_path: Path) -> None:
    wide = Architecture(lambda **changes: LLAMA.config(hidden_size=192, intermediate_size=384, **changes), LLAMA.model)
    model: Any = trained(tmp_path, wide, factor_format="factors", rank_multiple=64, train_factors=True)
    with torch.inference_mode():
        if how == "other size":
            model.base_model.set_param_ratio(0.4)
        else:
            four_bits = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)} if how == "4 bits" else {}
            model = model.merge_and_unload(**four_bits, compact=how != "dense merge")
        if how == "densify":
            model = densify(model)
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    if how == "dense merge":
        model.requires_grad_(True)  # frozen by PEFT
    if how == "4 bits":
        model = get_peft_model(model, LoraConfig(target_modules=["left", "right"], r=2))
    make_trainer(model, tmp_path, wide, steps=1, callbacks=[]).train()


@pytest.mark.parametrize("form", ["pivoted", "factors"])
def test_a_layer_that_is_made_under_inference_mode_computes_there(form: str) -> None:
    """Its factors change their layout in evaluation; inference tensors must stay what they are."""
    with torch.inference_mode():
        layer = LowRankLinear(8, 12, 4, bias=True, factor_format=form, dtype=torch.float32)
        x = torch.randn(3, 8)
        expected = layer(x)
        torch.testing.assert_close(layer.eval()(x), expected)
    torch.testing.assert_close(layer.train().eval()(x), expected)


# -- an adapter and a compact model ------------------------------------------------------------------------------------


def test_adapter_and_compact_model_in_one_folder(tmp_path: Path) -> None:
    """transformers takes the adapter for one of the model; the message says so."""
    model = trained(tmp_path / "run")
    model.save_pretrained(tmp_path / "both")
    compact: Any = model.merge_and_unload()
    compact.save_pretrained(tmp_path / "both")
    says = r"adapter: got one of a dense model, made with param_ratio=0\.6, .*save the two to different folders"
    with pytest.raises(LoraSVDError, match=says):
        AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    with pytest.raises(LoraSVDError, match=says):
        PeftModel.from_pretrained(compact, tmp_path / "both")
    wrap().save_pretrained(tmp_path / "adapter")
    with pytest.raises(LoraSVDError, match=r"folder: .*adapter holds something else than a model"):
        save_compact(compact, tmp_path / "adapter")
    get_peft_model(compact, settings(param_ratio=1))
