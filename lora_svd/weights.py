"""The weights of a model's linear layers, dense and dequantized, one at a time: from memory or from a folder.

Weights come as functions, so that one is in memory at a time, whatever the size of the checkpoint. A folder is read
tensor by tensor; its model is built without memory, from config.json, to know which tensors are linear layers. A head
that is tied to the embedding has no weight of its own and is left out.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .compact import LowRankLinear, dense_weight, keep_unpacked, layer_features, stored_weight
from .compact.checks import check_inside, names_in_model
from .compact.loader import spellings
from .compact.stored import full_precision, is_quantized
from .errors import LoraSVDError

_PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class LayerWeight:
    """One linear layer's weight, not yet read.

    Attributes:
        shape: (out, in).
        rank: of the factors it is stored as; None for a dense weight.
        read: returns the weight (out, in) on the CPU: in the stored dtype, or in float64 where it is the product of
            factors, since rounding the product would give it full rank.
    """

    shape: tuple[int, int]
    rank: int | None
    read: Callable[[], Tensor]


def model_weights(model: nn.Module) -> dict[str, LayerWeight]:
    """Weights of a model in memory by module name: nn.Linear, Conv1D, bitsandbytes layers, all that are low-rank."""
    low_rank = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    found: dict[str, LayerWeight] = {}
    for name, module in model.named_modules():
        if name in low_rank:
            module = low_rank[name]
            shape = module.out_features, module.in_features
            found[name] = LayerWeight(shape, module.rank, partial(dense_weight, module))
        elif name.rpartition(".")[0] not in low_rank and not _is_tied(model, name) and _is_linear(module):
            found[name] = LayerWeight(_shape(module), None, partial(_module_weight, module))
    return found


def folder_weights(folder: str | Path) -> dict[str, LayerWeight]:
    """Weights of a model folder (config.json and safetensors) by module name; nothing is read but the headers.

    The folder may hold a dense model, a compact one, or one that bitsandbytes has saved in 4 bit. No code of the
    folder is run. Linear layers whose tensor cannot be found are named in a warning.

    Raises:
        LoraSVDError: the folder is no such folder.
    """
    folder = Path(folder)
    model = skeleton(folder)
    tensors = Tensors(folder, model)
    tied = (getattr(model.config, "quantization_config", None) or {}).get("tied", {})
    found: dict[str, LayerWeight] = {}
    missing: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            continue
        key = next((key for key in spellings(name, model.base_model_prefix + ".") if f"{key}.weight" in tensors), None)
        if key is None:
            missing += [] if isinstance(module, nn.Embedding) or _is_tied(model, name) or name in tied else [name]
        elif f"{key}.right.weight" in tensors:
            read = partial(tensors.product, key, by_id=isinstance(module, nn.Embedding))
            found[name] = LayerWeight(_shape(module), tensors.rank(key), read)
        elif not isinstance(module, nn.Embedding):
            # bitsandbytes turns a Conv1D's weight round before it quantizes it
            turned = isinstance(module, Conv1D) and not tensors.is_4bit(f"{key}.weight")
            found[name] = LayerWeight(_shape(module), None, partial(tensors.weight, f"{key}.weight", turned=turned))
    if not found:
        raise LoraSVDError(f"model: {folder} has no weight of a linear layer of {type(model).__name__}")
    if missing:
        warnings.warn(
            f"{folder}: no weight is stored under the name of {len(missing)} linear layers, which are left out: "
            f"{', '.join(missing[:5])}{', ...' if missing[5:] else ''}",
            stacklevel=2,
        )
    return found


def _is_linear(module: nn.Module) -> bool:
    return (isinstance(module, (nn.Linear, Conv1D)) and module.weight.dim() == 2) or is_quantized(
        getattr(module, "weight", None)
    )


def _is_tied(model: nn.Module, name: str) -> bool:
    return f"{name}.weight" in getattr(model, "all_tied_weights_keys", {})


def _shape(module: nn.Module) -> tuple[int, int]:
    in_features, out_features = layer_features(module)
    return out_features, in_features


def _module_weight(module: nn.Module) -> Tensor:
    keep_unpacked(module)
    weight = full_precision(module).detach().cpu()
    return weight.T if isinstance(module, Conv1D) else weight


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
        said = getattr(model.config, "quantization_config", None) or {}
        self._ranks, self._splits = said.get("ranks", {}), said.get("splits", {})
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
        """Numbers in every tensor, by name in the files."""
        found = {}
        for name in sorted(set(self._file_of.values())):
            with self._open(name) as file:
                found |= {key: math.prod(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return found

    def rank(self, key: str) -> int:
        """Of a low-rank layer; a 4-bit tensor's shape does not tell."""
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
                "model and analyze it in memory (lora_svd.analyze.analyze_model)"
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
