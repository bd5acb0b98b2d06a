"""Tensors on disk by what they are: hidden states, gradients and statistics of a run that may be killed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def save_whole(tensors: Mapping[str, Tensor], path: Path, **said: str) -> None:
    """A safetensors file that is whole or not there. said: what else stands in it."""
    partial = path.with_name(f".{path.name}.part")
    save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, partial, {"format": "pt", **said})
    partial.replace(path)


def write_whole(text: str, path: Path) -> None:
    """A text file that is whole or not there."""
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


class Cache:
    """A tensor for each sample at each block, in ``FOLDER/KIND-BLOCK-SAMPLE.safetensors``."""

    def __init__(self, folder: Path, kind: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._kind = folder, kind

    def _path(self, block: int, sample: int | str) -> Path:
        return self._folder / f"{self._kind}-{block}-{sample}.safetensors"

    def put(self, block: int, sample: int, tensor: Tensor) -> None:
        save_whole({"tensor": tensor.cpu()}, self._path(block, sample))

    def get(self, block: int, sample: int) -> Tensor:
        return load_file(self._path(block, sample))["tensor"]

    def has(self, block: int, sample: int) -> bool:
        return self._path(block, sample).exists()

    def drop(self, block: int) -> None:
        for path in self._folder.glob(self._path(block, "*").name):
            path.unlink()
