"""Damaged and malicious compact checkpoints are refused by a message, before memory is taken or code could run."""

from __future__ import annotations

import json
import os
import pickle  # noqa: TID251 - what an attacker would use
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, LLAMA, assert_bit_equal, tensors, trained
from safetensors.torch import load_file, save_file
from tiny_lm import save_tiny_lm
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from lora_svd import LoraSVDError
from lora_svd.analysis.weights import folder_weights
from lora_svd.cli.compress import load_model
from lora_svd.compact import parameter_report, save_compact

UP = "model.layers.0.mlp.up_proj"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return trained(tmp_path_factory.mktemp("run")).merge_and_unload()


@pytest.fixture
def folder(compact: PreTrainedModel, tmp_path: Path) -> Path:
    save_compact(compact, tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path, **changes: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **changes)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """As another program would: config.json, without checksums of what is no longer there, stays as it is."""
    found = load_file(folder / WEIGHTS)
    change(found)
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    change_description(folder, lambda said: said.update(checksums={}))


def change_description(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """A file that grows beyond this cannot be written, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def memory_up_to_now_and(num_bytes: int) -> Iterator[None]:
    """Whoever takes more memory than this fails, and says so."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_what_is_whole_loads_and_is_saved_again(folder: Path, compact: PreTrainedModel) -> None:
    """Also when it was changed in memory, or on disk by someone who says so."""
    model = load(folder)
    assert_bit_equal(tensors(model), tensors(compact))
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(folder)
    assert_bit_equal(tensors(load(folder)), tensors(model))
    save_compact(model, folder)
    change_tensors(folder, lambda found: found["model.norm.weight"].zero_())
    assert not load(folder).model.norm.weight.any()


@pytest.mark.parametrize("position", [9, 2000, -1])
def test_flipped_bit(position: int, folder: Path) -> None:
    flip_bit(folder / WEIGHTS, position)
    with pytest.raises(LoraSVDError, match=rf"{folder / WEIGHTS}: (is not the file that was saved|cannot be read)"):
        load(folder)


def test_shard_of_another_save(folder: Path, compact: PreTrainedModel, tmp_path: Path) -> None:
    compact.save_pretrained(tmp_path / "staged", max_shard_size="20KB")
    shutil.copy(folder / "config.json", tmp_path)
    save = compact.save_pretrained
    compact.save_pretrained = lambda path: save(path, max_shard_size="20KB")  # pyright: ignore[reportAttributeAccessIssue]
    save_compact(compact, folder)
    del compact.save_pretrained
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    load(folder)
    found = load_file(shards[1])
    save_file({name: tensor + 1 for name, tensor in found.items()}, shards[1], metadata={"format": "pt"})
    with pytest.raises(LoraSVDError, match=f"{shards[1]}: is not the file that was saved"):
        load(folder)
    shards[1].unlink()
    with pytest.raises((LoraSVDError, OSError), match=shards[1].name):
        load(folder)


@pytest.mark.parametrize("length", [0, 4, 1000, -1])
def test_truncated_file(length: int, folder: Path) -> None:
    cut(folder / WEIGHTS, length)
    with pytest.raises(LoraSVDError, match=f"{folder / WEIGHTS}: cannot be read, .*get the file again"):
        load(folder)


@pytest.mark.parametrize("name", [f"{UP}.left.weight", f"{UP}.right.weight", f"{UP}.weight", f"{UP}.order"])
@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification])
def test_missing_tensor_of_a_low_rank_layer(name: str, kind: Any, folder: Path) -> None:
    change_tensors(folder, lambda found: found.pop(name))
    seen_as = name.removeprefix("model.") if kind is AutoModel else name
    with pytest.raises(LoraSVDError, match=f"{seen_as}: missing in this compact checkpoint"):
        kind.from_pretrained(folder)


def test_missing_and_renamed_tensors_of_the_rest(folder: Path) -> None:
    change_tensors(folder, lambda found: found.update({"model.nom.weight": found.pop("model.norm.weight")}))
    with pytest.raises(LoraSVDError, match=r"model\.norm\.weight: missing in .*; it has model\.nom\.weight, which the"):
        load(folder)
    change_tensors(folder, lambda found: found.clear() or found.update(other=torch.zeros(1)))
    with pytest.raises(LoraSVDError, match=r"embed_tokens\.weight: missing in this compact checkpoint \((\d+) of \1 "):
        load(folder)


@pytest.mark.parametrize("name", [f"{UP}.left.weight", f"{UP}.order", "model.norm.weight", "model.embed_tokens.weight"])
def test_wrong_shape(name: str, folder: Path) -> None:
    change_tensors(folder, lambda found: found.update({name: found[name][1:].clone()}))
    with pytest.raises(LoraSVDError, match=rf"{name}: has shape \[\d+.* the model expects \[\d+"):
        load(folder, ignore_mismatched_sizes=True)


def test_head_of_another_size_is_still_a_choice(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["bert"]
    save_compact(trained(tmp_path / "run", architecture).merge_and_unload(), tmp_path / "model")
    changed = {"num_labels": 5, "ignore_mismatched_sizes": True}
    assert architecture.model.from_pretrained(tmp_path / "model", **changed).classifier.weight.shape[0] == 5
    change_tensors(tmp_path / "model", lambda found: found.pop("bert.pooler.dense.weight"))
    with pytest.raises(LoraSVDError, match=r"bert\.pooler\.dense\.\S*weight: "):
        architecture.model.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": {UP: 10**9}}, rf"{UP}: .* have rank \d+, its config.json says 1000000000"),
        (
            {"ranks": {"model.layers.0.self_attn": 10**9}},
            r"self_attn: named in .* but it is LlamaAttention, expected a l",
        ),
        ({"ranks": {"": 3}}, ": named in .* but it is LlamaForCausalLM, expected a linear layer"),
        ({"ranks": {"model.__class__.x": 3}}, "model.__class__.x: named in .*LlamaForCausalLM has no such module"),
        ({"ranks": {"model.layers.forward": 3}}, "model.layers.forward: named in .* has no such module"),
        ({"ranks": {UP: True}}, rf"{UP}: .* rank True, expected a positive integer"),
        ({"ranks": {UP: 1.5}}, rf"{UP}: .* rank 1\.5, expected a positive integer"),
        ({"ranks": [UP]}, r"ranks: .* gives \['model.*'\], expected a mapping"),
        ({"quantized": "model"}, "quantized: .* gives 'model', expected a list of module names"),
        ({"bitsandbytes": ["x"]}, r"bitsandbytes: .* gives \['x'\], expected a mapping"),
        ({"checksums": 5}, "checksums: .* gives 5, expected a mapping"),
        ({"dense_parameters": -1}, "dense_parameters: .* gives -1, expected an integer >= 0"),
        ({"format_version": 10**6}, "format_version: .* has 1000000, this package reads 1; upgrade lora_svd"),
    ],
)
def test_description_from_anywhere(change: dict[str, Any], message: str, folder: Path) -> None:
    with memory_up_to_now_and(1 << 30):
        change_description(folder, lambda said: said.update(change))
        with pytest.raises(LoraSVDError, match=message):
            load(folder)


def test_sizes_are_compared_before_memory_is_taken(folder: Path) -> None:
    """A rank, a width and a tensor that would need terabytes."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 10**9}))
    with memory_up_to_now_and(1 << 30), pytest.raises(LoraSVDError, match=r"features, but the model has .*\d{9}"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    change_tensors(folder, lambda found: [found.pop(name) for name in list(found) if name.startswith(UP)])
    change_description(folder, lambda said: said["ranks"].update({UP: 10**9}))
    with memory_up_to_now_and(1 << 30), pytest.raises(LoraSVDError, match=rf"{UP}: .* rank 10+, expected at most \d+"):
        load(folder)
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    with memory_up_to_now_and(1 << 30), pytest.raises(LoraSVDError, match=f"{folder / WEIGHTS}: cannot be read"):
        load(folder)


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["EXPLOITED"],)


@pytest.fixture
def exploited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is there once code of a checkpoint has run."""
    monkeypatch.setenv("EXPLOITED", str(tmp_path / "exploited"))
    return tmp_path / "exploited"


def test_pickle_is_not_read(folder: Path, exploited: Path) -> None:
    for name in ("pytorch_model.bin", "model.safetensors"):
        (folder / WEIGHTS).unlink(missing_ok=True)
        (folder / name).write_bytes(pickle.dumps({"x": Exploit()}))
        with pytest.raises(LoraSVDError, match=rf"{folder / name}: (weights are read from \.safe|cannot be read)"):
            load(folder)
        (folder / name).unlink()
    assert not exploited.exists()


@pytest.mark.parametrize("escape", ["../outside.safetensors", "{}/outside.safetensors", "x/../../outside.safetensors"])
def test_index_cannot_name_files_outside_of_the_folder(escape: str, folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).rename(tmp_path / "outside.safetensors")
    names = load_file(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, escape.format(tmp_path))}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(LoraSVDError, match=r"outside\.safetensors: the checkpoint names a file outside of its folder"):
        load(folder)
    with pytest.raises(LoraSVDError, match="outside of its folder"):
        next(iter(folder_weights(folder).values())).read()


def test_code_of_a_folder_is_not_run(tmp_path: Path, exploited: Path) -> None:
    """Not even asked about: ``lora-svd`` has no terminal to ask on."""
    save_tiny_lm(tmp_path / "model")
    (tmp_path / "model/evil.py").write_text(f"import os; os.mkdir({str(exploited)!r})")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    loader = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    path.write_text(json.dumps({**config, "auto_map": loader}))
    load_model(str(tmp_path / "model"), "auto", torch.device("cpu"))
    path.write_text(json.dumps({**config, "model_type": "evil", "auto_map": loader}))
    with pytest.raises(LoraSVDError, match="model: cannot load"):
        load_model(str(tmp_path / "model"), "auto", torch.device("cpu"))
    assert not exploited.exists()


def test_full_disk_and_unwritable_folder_leave_the_previous_model(
    folder: Path, compact: PreTrainedModel, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for limit in (100, 4000, len(before[WEIGHTS]) - 1):  # in config.json, at once, and in the last block of the weights
        with (
            files_up_to(limit),
            pytest.raises(LoraSVDError, match=f"folder: cannot save to {folder}: .*untouched"),
        ):
            save_compact(compact, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(LoraSVDError, match=f"folder: cannot save to {folder / WEIGHTS}/x: "):
        save_compact(compact, folder / WEIGHTS / "x")  # below a file nobody can write, root included
    assert parameter_report(load(folder)).param_ratio <= 0.6


def test_debris_of_a_killed_save_is_named(folder: Path, compact: PreTrainedModel) -> None:
    debris = folder.with_name(".model-abcd1234.part")
    debris.mkdir()
    with pytest.warns(UserWarning, match=f"{debris}: left by a save that did not end; delete it"):
        save_compact(compact, folder)
    assert debris.is_dir()


def test_tied_weight_may_be_saved_under_either_name(folder: Path) -> None:
    change_tensors(folder, lambda found: found.update({"lm_head.weight": found.pop("model.embed_tokens.weight")}))
    assert_bit_equal(tensors(load(folder)), tensors(load(folder)))
    assert LLAMA.build().config.tie_word_embeddings
