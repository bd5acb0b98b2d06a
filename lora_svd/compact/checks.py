"""What is checked of a compact checkpoint before a tensor of it is read or memory is taken for one.

safetensors sees to it that a file is as long as its header says. It does not know whether the bytes are those that were
saved or all tensors are there; a missing one gets random numbers from transformers, which only its log tells.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ..errors import LoraSVDError
from .folder import checksum
from .host import is_left_out, names_in_model, tied_weights
from .layers import LowRankLinear


def check_types(
    ranks: Any,
    quantized: Any,
    splits: Any,
    shapes: Any,
    counts: Mapping[str, Any],
    mappings: Mapping[str, Any],
) -> None:
    """Raise unless the fields of a config.json, which may come from anywhere, have their types."""
    for field, value in {"ranks": ranks, "splits": splits, "shapes": shapes, **mappings}.items():
        if not isinstance(value, Mapping | None):
            raise LoraSVDError(f"{field}: this compact checkpoint gives {value!r}, expected a mapping")
    for head, embedding in (mappings["tied"] or {}).items():
        if not isinstance(embedding, str):
            raise LoraSVDError(f"tied: this compact checkpoint ties {head} to {embedding!r}, expected a module's name")
    for field, value in counts.items():
        if type(value) is not int or value < 0:
            raise LoraSVDError(f"{field}: this compact checkpoint gives {value!r}, expected an integer >= 0")
    for name, rank in (ranks or {}).items():
        if type(rank) is not int or rank < 1:
            raise LoraSVDError(f"{name}: the compact checkpoint gives rank {rank!r}, expected a positive integer")
    for name, split in (splits or {}).items():
        if not (isinstance(split, list) and len(split) == 2 and all(type(n) is int and n >= 1 for n in split)):
            raise LoraSVDError(f"{name}: the compact checkpoint is split by {split!r}, expected two positive integers")
    for name, shape in (shapes or {}).items():
        if not _is_shape(shape):
            raise LoraSVDError(
                f"{name}: the compact checkpoint gives the shape {shape!r}, expected positive integers, 'kept': [out, "
                "in] of at most 'dense': [out, in], and 'chunks' that divide both out"
            )
    if isinstance(quantized, str) or not all(isinstance(name, str) for name in quantized):
        raise LoraSVDError(f"quantized: this compact checkpoint gives {quantized!r}, expected a list of module names")


def _is_shape(shape: Any) -> bool:
    """Whether this says what is kept of a layer."""
    if not isinstance(shape, Mapping) or shape.keys() != {"kept", "dense", "chunks"}:
        return False
    kept, dense, chunks = (shape[name] for name in ("kept", "dense", "chunks"))
    pairs = all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in (kept, dense))
    if not pairs or not all(type(number) is int and number >= 1 for number in (*kept, *dense, chunks)):
        return False
    return kept[0] <= dense[0] and kept[1] <= dense[1] and kept[0] % chunks == dense[0] % chunks == 0


def check_inside(path: str | Path, folder: str | Path) -> Path:
    """The path, if it is one of a safetensors file in the folder.

    Raises:
        LoraSVDError: it leads elsewhere, or to another kind of file, which might run code when it is read.
    """
    plain = Path(os.path.normpath(path))  # links are followed: in the cache of the Hub every file is one
    if not plain.is_relative_to(os.path.normpath(folder)):
        raise LoraSVDError(f"{path}: the checkpoint names a file outside of its folder {folder}; do not trust it")
    if plain.suffix != ".safetensors":
        raise LoraSVDError(f"{path}: weights are read from .safetensors files only; save with save_pretrained")
    return plain


def saved_shapes(files: Iterable[str], folder: str | None, checksums: Mapping[str, str]) -> dict[str, list[int]]:
    """Shape of every tensor in a checkpoint's files, from their headers, once the files are known to be whole.

    Args:
        files: as transformers found them.
        folder: of the checkpoint, if it is a local one.
        checksums: SHA-256 of the files, by name, of those that have one.

    Raises:
        LoraSVDError: a file is elsewhere, of another kind, cut off, or not the one that was saved.
    """
    shapes = {}
    for name in files:
        path = check_inside(name, folder if folder and Path(folder).is_dir() else Path(name).parent)
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise LoraSVDError(f"{path}: cannot be read, {error}; get the file again") from error
        if path.name in checksums and checksum(path) != checksums[path.name]:
            raise LoraSVDError(
                f"{path}: is not the file that was saved, its SHA-256 differs from the one in config.json. Get both "
                "again; if the file was changed on purpose, take its checksum out of quantization_config"
            )
    return shapes


def check_tensors(model: PreTrainedModel, shapes: Mapping[str, list[int]], packed: Iterable[str]) -> list[str]:
    """Raise if a tensor of the (empty) model is not saved, or in another shape; returns those that need not be.

    A model of the class that was saved needs all of its tensors, one of another class (a new head) those of
    its low-rank layers. Shapes are compared except of ``packed`` tensors and of heads, for which there is
    ``ignore_mismatched_sizes``.
    """
    state = model.state_dict()
    expected = {name: list(tensor.shape) for name, tensor in state.items()}
    names = names_in_model(model, shapes, state)
    saved = {name for name, _ in names.values()}
    ours = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LowRankLinear))
    complete = type(model).__name__ in (model.config.architectures or ())
    tied = tied_weights(model)
    unsaved = [name for name in expected if not (name in saved or tied.get(name) in saved)]
    missing = [name for name in unsaved if (complete or name.startswith(ours)) and not is_left_out(model, name)]
    if missing:
        unknown = sorted(key for key, (name, converted) in names.items() if name not in expected and not converted)
        raise LoraSVDError(
            f"{missing[0]}: missing in this compact checkpoint ({len(missing)} of {len(expected)} tensors are)"
            f"{f'; it has {unknown[0]}, which the model does not' if unknown else ''}. Get its files again"
        )
    base = "" if model.base_model is model else model.base_model_prefix + "."
    for key, (name, converted) in names.items():
        compared = name in expected and name not in packed and not converted and name.startswith((base, *ours))
        if compared and shapes[key] != expected[name]:
            raise LoraSVDError(
                f"{key}: has shape {shapes[key]} in this compact checkpoint, the model expects {expected[name]}; "
                "restore the config.json that was saved with it"
            )
    return unsaved
