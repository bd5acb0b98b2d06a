"""What the files of a checkpoint hold, compared with what they should hold before a tensor is read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from .description import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


def folder_of(model: str, revision: str | None) -> Path:
    """The local folder of a model; one on the Hub is first downloaded to the Hub's cache."""
    if Path(model).is_dir():
        return Path(model)
    return Path(snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", "*.json"]))


def check_files(folder: Path, expected: Shapes, checksums: Mapping[str, str]) -> None:
    """Raise unless the weights in a folder are those that were saved, with every tensor and no other.

    Args:
        expected: shape of every tensor, by name.
        checksums: SHA-256 of the files that have one, by name.
    """
    for name, saved in checksums.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, but named in config.json; get the checkpoint's files again")
        if (found := _sha256(path)) != saved:
            raise CheckpointError(
                f"{path}: is not the file that was saved, its SHA-256 is {found}, expected {saved}. Get it and "
                "config.json again; if it was changed on purpose, take its checksum out of quantization_config"
            )
    check_shapes(_shapes(folder), expected)


def check_shapes(found: Shapes, expected: Shapes) -> None:
    """Raise for the first tensor that is missing, not expected or of another shape."""
    for name in sorted(expected.keys() - found.keys()):
        raise CheckpointError(
            f"{name}: missing in this compact checkpoint, expected shape {list(expected[name])}; get its files again"
        )
    for name in sorted(found.keys() - expected.keys()):
        raise CheckpointError(
            f"{name}: in this compact checkpoint with shape {list(found[name])}, but the model of its config.json has "
            "no such tensor; restore the config.json that was saved with it"
        )
    for name, shape in sorted(expected.items()):
        if found[name] != shape:
            raise CheckpointError(
                f"{name}: has shape {list(found[name])} in this compact checkpoint, expected {list(shape)}; restore "
                "the config.json that was saved with it"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a folder's files, from their headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read, {error}; get the file again") from error
    return shapes
