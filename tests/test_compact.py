"""A compact model is a plain transformers model: used, trained, saved, loaded and adapted like any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, KINDS, assert_bit_equal, logits, make_trainer, tensors, trained
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, load_model, save_file, save_model
from tiny_lm import save_tiny_lm
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    ViTImageProcessor,
)

import lora_svd
from lora_svd import LoraSVDError
from lora_svd.compact import LowRankLinear, parameter_report, save_compact

FORMATS = ["pivoted", "factors"]
AUTO = {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForSequenceClassification, "vit": AutoModelForImageClassification}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Compact models of every kind of architecture, and of both formats for Llama, by name; read only."""
    root = tmp_path_factory.mktemp("compact")
    variants = {name: (name, "pivoted") for name in KINDS}
    variants |= {f"llama-{form}": ("llama", form) for form in FORMATS}
    for folder, (name, form) in variants.items():
        model = trained(root / "run", ARCHITECTURES[name], factor_format=form)
        save_compact(model.merge_and_unload(), root / folder)
    return {folder: root / folder for folder in variants}


@pytest.fixture(params=[f"llama-{form}" for form in FORMATS])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def load(folder: Path, **changes: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **changes)


def reloaded(model: PreTrainedModel, folder: Path, **changes: Any) -> PreTrainedModel:
    model.save_pretrained(folder, **changes)
    return load(folder)


@pytest.mark.parametrize("name", KINDS)
def test_auto_class_loads_every_kind(name: str, folders: dict[str, Path]) -> None:
    """Nothing missing, nothing left over, nothing that marks the model as quantized."""
    model, info = AUTO.get(name, AutoModelForCausalLM).from_pretrained(folders[name], output_loading_info=True)
    assert isinstance(model, ARCHITECTURES[name].model)
    assert not any(info.values())
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer")
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_generates_the_same_after_reloading(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    prompt = {"input_ids": torch.tensor([[1, 5, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    written = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    assert written.shape[1] > 3
    assert torch.equal(reloaded(model, tmp_path).generate(**prompt, max_new_tokens=6, do_sample=False), written)


def test_left_lies_by_columns_in_evaluation_alone(folder: Path, tmp_path: Path) -> None:
    """From the first answer on; on disk and in training the tensors are as ever. A vector passes like a batch."""
    again = reloaded(load(folder), tmp_path)
    layers = [module for module in again.modules() if isinstance(module, LowRankLinear)]
    assert layers
    assert all(parameter.is_contiguous() for parameter in again.parameters())  # as FSDP2 wants them
    logits(again)
    for layer in layers:
        assert layer.left.weight.T.is_contiguous()
        x = torch.randn(3, 2, layer.in_features)
        torch.testing.assert_close(layer(x)[1, 1], layer(x[1, 1]))
    assert_bit_equal(tensors(again), tensors(load(folder)))
    assert all(parameter.is_contiguous() for parameter in again.train().parameters())
    with torch.inference_mode():
        logits(again)
    assert all(layer.left.weight.T.is_contiguous() and not layer.left.weight.is_inference() for layer in layers)


@pytest.mark.parametrize("trains", [False, True])
def test_saved_by_safetensors_itself(trains: bool, folder: Path, tmp_path: Path) -> None:
    """All tensors of a state dict can be saved, and what is saved is loaded."""
    model, other = load(folder), load(folder)
    logits(model)  # from here on some tensors lie by columns
    model.train(trains)
    other.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
    save_file({name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}, tmp_path / "a")
    assert other.load_state_dict(load_file(tmp_path / "a"), strict=False).missing_keys == ["lm_head.weight"]
    assert_bit_equal(tensors(other), tensors(model))
    save_model(model, str(tmp_path / "b"))
    again = load(folder)
    load_model(again, str(tmp_path / "b"))
    assert_bit_equal(tensors(again), tensors(model))
    state = model.state_dict(keep_vars=True)
    assert all(state[name] is parameter for name, parameter in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    expected = logits(load(folder))
    cast = load(folder).to(dtype)
    assert {parameter.dtype for parameter in cast.parameters()} == {dtype}
    torch.testing.assert_close(logits(cast), expected, rtol=0.1, atol=0.1)
    assert_bit_equal(tensors(reloaded(cast, tmp_path)), tensors(cast))
    assert_bit_equal(tensors(load(folder, dtype=dtype)), tensors(cast))


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_shards_and_device_map(device_map: str, folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    mapped = load(tmp_path, device_map=device_map)
    assert torch.equal(logits(mapped), logits(model))
    assert_bit_equal(tensors(reloaded(load(tmp_path), tmp_path / "again")), tensors(model))


def test_full_fine_tune(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    before = tensors(model)
    make_trainer(model, tmp_path, callbacks=[]).train()
    trained_names = [name for name, _ in model.named_parameters()]
    after = tensors(model)
    assert all(not torch.equal(after[name], before[name]) for name in trained_names)
    assert_bit_equal(tensors(reloaded(model, tmp_path / "tuned")), after)


def test_lora_on_top(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = get_peft_model(load(folder), LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"))
    make_trainer(model, tmp_path, callbacks=[]).train()
    expected = logits(model)
    assert not torch.equal(expected, logits(load(folder)))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load(folder), tmp_path / "adapter")), expected)
    merged = model.merge_and_unload()
    assert parameter_report(merged) == parameter_report(load(folder))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(reloaded(merged, tmp_path / "merged")), logits(merged))


def test_without_its_head_and_with_another(folder: Path, tmp_path: Path) -> None:
    whole, headless = load(folder).eval(), AutoModel.from_pretrained(folder).eval()
    assert_bit_equal(tensors(headless), tensors(whole.model))
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert_bit_equal(tensors(classifier.model), tensors(whole.model))
    for model, again in ((headless, AutoModel), (classifier, AutoModelForSequenceClassification)):
        model.save_pretrained(tmp_path)
        assert_bit_equal(tensors(again.from_pretrained(tmp_path)), tensors(model))
    headless.save_pretrained(tmp_path / "headless")
    assert_bit_equal(tensors(load(tmp_path / "headless").model), tensors(whole.model))


NEW_PROCESS = """
import sys
import torch, transformers
{imports}
for folder, name in zip(sys.argv[1::2], sys.argv[2::2]):
    saved = torch.load(folder + "-logits", weights_only=True)
    try:
        model = getattr(transformers, name).from_pretrained(folder).eval()
        with torch.no_grad():
            print(torch.equal(model(**saved["inputs"]).logits.float(), saved["logits"]))
    except RuntimeError as error:
        print("mismatch" if "ignore_mismatched_sizes" in str(error) else error)
"""


@pytest.mark.parametrize(("imports", "says"), [("import lora_svd", "True"), ("", "mismatch")])
def test_new_process_needs_lora_svd(imports: str, says: str, folders: dict[str, Path]) -> None:
    """With it the logits are the same to the bit; without it loading fails, and does not give random weights."""
    arguments = []
    for folder, path in folders.items():
        architecture = ARCHITECTURES[folder.partition("-")[0]]
        model = architecture.model.from_pretrained(path)
        torch.save({"inputs": architecture.inputs(), "logits": logits(model, architecture)}, f"{path}-logits")
        arguments += [str(path), architecture.model.__name__]
    command = [sys.executable, "-W", "ignore", "-c", NEW_PROCESS.format(imports=imports), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(lora_svd.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [says] * len(folders), done.stderr


def edited(folder: Path, copy: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a compact model with something else in its description."""
    load(folder).save_pretrained(copy)
    config = json.loads((copy / "config.json").read_text())
    change(config["quantization_config"])
    (copy / "config.json").write_text(json.dumps(config))
    return copy


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: said["ranks"].update({Q_PROJ: 3}), rf"{Q_PROJ}: .* have rank \d+, its config.json says 3"),
        (lambda said: said["ranks"].update({Q_PROJ: 32}), rf"{Q_PROJ}: .* have rank \d+, its config.json says 32"),
        (lambda said: said["ranks"].update({Q_PROJ: 0}), rf"{Q_PROJ}: .* rank 0, expected a positive integer"),
        (lambda said: said["ranks"].update({"lm_head": 3}), "lm_head: .* have rank 32, its config.json says 3"),
        (lambda said: said["ranks"].update({"model.layers.7.x": 3}), r"model\.layers\.7\.x: .*no such module"),
        (lambda said: said.update(format_version=2), "format_version: .* has 2, .* reads 1; upgrade lora_svd"),
        (lambda said: said.update(factor_format="xyz"), r"factor_format: .*'xyz', expected one of \['factors', 'piv"),
    ],
)
def test_description_that_contradicts_the_tensors(
    change: Callable[[dict[str, Any]], object], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    tuned = load(folders["llama"])
    tuned.config.tie_word_embeddings, tuned.all_tied_weights_keys = False, {}
    tuned.lm_head.weight = torch.nn.Parameter(tuned.lm_head.weight.detach() + 1)
    tuned.save_pretrained(tmp_path / "untied")
    with pytest.raises(LoraSVDError, match=message):
        load(edited(tmp_path / "untied", tmp_path / "edited", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: said["ranks"].pop(Q_PROJ), rf"{Q_PROJ}\.weight: has shape \[1\] .* expects \[32, 32\]"),
        (lambda said: said.pop("ranks"), r"\.weight: has shape \[1\] .* expects"),
        (lambda said: said.update(factor_format="factors"), r"\.left\.weight: has shape \[\d+, (\d+)\] .* \[\d+, \1\]"),
    ],
)
@pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
def test_description_that_leaves_tensors_without_a_place(
    change: Callable[[dict[str, Any]], object],
    message: str,
    ignore_mismatched_sizes: bool,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(LoraSVDError, match=message):
        load(edited(folders["llama"], tmp_path, change), ignore_mismatched_sizes=ignore_mismatched_sizes)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def failing_save(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_pretrained(folder: Path) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", save_pretrained)


def test_failed_save_leaves_the_previous_model_and_no_debris(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folders["llama"])
    save_compact(model, tmp_path / "model")
    broken = load(folders["llama-factors"])
    with monkeypatch.context() as patch:
        failing_save(broken, patch)
        with pytest.raises(LoraSVDError, match=r"cannot save to .*: .*No space left on device; an earlier"):
            save_compact(broken, tmp_path / "model")
    with monkeypatch.context() as patch:
        rename = Path.rename
        patch.setattr(Path, "rename", lambda a, b: broken_rename() if "-old" not in f"{a}{b}" else rename(a, b))
        with pytest.raises(LoraSVDError, match="Input/output error"):
            save_compact(broken, tmp_path / "model")
    assert files(tmp_path) == {"model"}
    assert_bit_equal(tensors(load(tmp_path / "model")), tensors(model))
    save_compact(broken, tmp_path / "model")
    assert files(tmp_path) == {"model"}
    assert_bit_equal(tensors(load(tmp_path / "model")), tensors(broken))


def broken_rename() -> None:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("put_in_place", [False, True])
def test_save_after_a_process_was_killed_while_saving(
    put_in_place: bool, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before or after the new folder took its place: the old one lies beside it under another name."""
    model = load(folders["llama"])
    save_compact(model, tmp_path / ".model-old")
    if put_in_place:
        save_compact(model, tmp_path / "model")
    with monkeypatch.context() as patch:
        failing_save(model, patch)
        with pytest.raises(LoraSVDError, match=r"cannot save to .*: .*No space left on device; an earlier"):
            save_compact(model, tmp_path / "model")
    assert_bit_equal(tensors(load(tmp_path / "model")), tensors(model))
    save_compact(model, tmp_path / "model")
    assert files(tmp_path) == {"model"}


def test_folder_of_something_else_is_not_replaced(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years")
    with pytest.raises(LoraSVDError, match=f"folder: {tmp_path} holds something else"):
        save_compact(load(folders["llama"]), tmp_path)
    assert files(tmp_path) == {"thesis.tex"}


def test_saved_with_a_card_that_states_its_size(folder: Path) -> None:
    card, size = (folder / "README.md").read_text(encoding="utf-8"), parameter_report(load(folder))
    assert f"the targeted linear layers: {size.param_ratio:.4f}" in card
    assert f"{size.parameters:,} of {size.dense_parameters:,} parameters,\n{size.bytes:,} bytes" in card
    assert f'from_pretrained("{folder.name}")' in card
    assert "base_model" not in card  # it was made in memory; the Hub would refuse what is no model id


def loaded_by_card(folder: Path) -> dict[str, Any]:
    """The variables that the code of a folder's card makes."""
    code = (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    namespace: dict[str, Any] = {}
    exec(code.replace(f'"{folder.name}"', repr(str(folder))), namespace)
    return namespace


def test_card_loads_a_model_as_what_it_is(folders: dict[str, Path]) -> None:
    for name in KINDS:
        assert type(loaded_by_card(folders[name])["model"]) is ARCHITECTURES[name].model


def test_card_loads_what_was_saved_with_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_lm(tmp_path / "dense"))
    for name, given in (("tokenizer", tokenizer), ("processor", ViTImageProcessor()), (None, None)):
        save_compact(load(folders["llama"]), tmp_path / "small", given)
        namespace = loaded_by_card(tmp_path / "small")
        found = {each: type(namespace[each]) for each in ("tokenizer", "processor") if each in namespace}
        assert found == ({name: type(given)} if name else {})
