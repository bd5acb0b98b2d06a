"""Tensors of a model folder, dense, compact or in 4 bits, each read when it is asked for by its name in the model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import LoraSVDError
from .checks import check_inside
from .convert import stored_weight
from .host import names_in_model

_PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def skeleton(folder: Path) -> PreTrainedModel:
    """The model of a folder, dense; its parameters are without memory, its buffers as they are made."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise LoraSVDError(f"model: {folder} is not a folder with a model of transformers: {error}") from error
    kind: Any = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        kind = AutoModel
    with init_empty_weights(include_buffers=False):
        return kind.from_config(config) if kind is AutoModel else kind(config)


class Tensors:
    """The tensors of a folder's safetensors files by their names in the model, each read when it is asked for."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self._folder = folder
        self._file_of = self._files()
        description = getattr(model.config, "quantization_config", None) or {}
        self._ranks, self._splits = description.get("ranks", {}), description.get("splits", {})
        # Some models have other names in memory than in their files; what is put together from several tensors while
        # it is loaded is no linear layer of the file.
        names = names_in_model(model, self._file_of)
        self._stored = {name: key for key, (name, converted) in names.items() if not converted}

    def _files(self) -> Mapping[str, str]:
        """The file of each tensor."""
        index = self._folder / SAFE_WEIGHTS_INDEX_NAME
        if index.is_file():
            return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not (self._folder / SAFE_WEIGHTS_NAME).is_file():
            raise LoraSVDError(
                f"model: {self._folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}; save the model "
                "with save_pretrained"
            )
        with self._open(SAFE_WEIGHTS_NAME) as file:
            return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)

    def _open(self, name: str) -> Any:
        try:
            return safe_open(check_inside(self._folder / name, self._folder), framework="pt")
        except (OSError, SafetensorError) as error:
            raise LoraSVDError(f"model: cannot read {self._folder / name}: {error}") from error

    def __contains__(self, key: str) -> bool:
        return key in self._stored

    @property
    def stored(self) -> Mapping[str, str]:
        """Name in the files by name in the model, without tensors that are put together while they are loaded."""
        return self._stored

    def sizes(self) -> dict[str, int]:
        """Number of elements of every tensor, by name in the files."""
        found = {}
        for name in sorted(set(self._file_of.values())):
            with self._open(name) as file:
                found |= {key: math.prod(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return found

    def rank(self, key: str) -> int:
        """Rank of a low-rank layer, which the shape of a 4-bit tensor does not tell."""
        left = f"{key}.left.weight"
        if self.is_4bit(left):
            return self._ranks[key]
        stored = self._stored[left]
        with self._open(self._file_of[stored]) as file:
            return file.get_slice(stored).get_shape()[1] // self._splits.get(key, (0, 1))[1]

    def is_4bit(self, key: str) -> bool:
        return f"{key}.absmax" in self

    def weight(self, key: str, *, turned: bool = False) -> Tensor:
        """A dense or 4-bit weight, (out, in)."""
        tensor = self._dequantized(key) if self.is_4bit(key) else self._read(key)
        if tensor.dtype not in _PLAIN_DTYPES:
            raise LoraSVDError(
                f"{key}: stored as {tensor.dtype}, expected a floating-point weight or bitsandbytes' 4 bit; load the "
                "model and analyze it in memory (lora_svd.analysis.models.analyze_model)"
            )
        return tensor.T if turned else tensor

    def product(self, key: str, *, by_id: bool = False) -> Tensor:
        """The weight (out, in) of a low-rank layer. by_id: of an embedding."""
        left = self.weight(f"{key}.left.weight").double()
        right = self.weight(f"{key}.right.weight", turned=by_id).double()
        order = self._read(f"{key}.order") if f"{key}.order" in self else None
        return stored_weight(left, right, order, self._splits.get(key))

    def _read(self, key: str) -> Tensor:
        return self.read_stored(self._stored[key])

    def read_stored(self, stored: str) -> Tensor:
        """A tensor as it is, by its name in the files."""
        with self._open(self._file_of[stored]) as file:
            return file.get_tensor(stored)

    def _dequantized(self, key: str) -> Tensor:
        if find_spec("bitsandbytes") is None:
            raise LoraSVDError(f"{key}: stored in 4 bit by bitsandbytes, which is missing; pip install bitsandbytes")
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = {name: self._read(name) for name in self._stored if name.startswith(f"{key}.")}
        return dequantize_4bit(self._read(key), QuantState.from_dict(state, device=torch.device("cpu")))
