"""The weights of a model's linear layers, dense and dequantized, one at a time: from memory or from a folder.

Weights come as functions, so that one is in memory at a time, whatever the size of the checkpoint. The model of a
folder is built without memory, from config.json, to know which tensors are linear layers. A head that is tied to the
embedding has no weight of its own and is left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..compact import LowRankLinear
from ..compact.architecture import spellings
from ..compact.bnb import full_precision, is_quantized, keep_unpacked
from ..compact.convert import dense_weight
from ..compact.layers import layer_features
from ..compact.tensors import Tensors, skeleton
from ..errors import LoraSVDError


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
    weights: dict[str, LayerWeight] = {}
    for name, module in model.named_modules():
        if name in low_rank:
            module = low_rank[name]
            shape = module.out_features, module.in_features
            weights[name] = LayerWeight(shape, module.rank, partial(dense_weight, module))
        elif name.rpartition(".")[0] not in low_rank and not _is_tied(model, name) and _is_linear(module):
            weights[name] = LayerWeight(_shape(module), None, partial(_module_weight, module))
    return weights


def folder_weights(folder: str | Path) -> dict[str, LayerWeight]:
    """Weights of a model folder (config.json and safetensors) by module name; nothing is read but the headers.

    The folder may hold a dense model, a compact one, or one that bitsandbytes has saved in 4 bit. No code of the
    folder is run. Linear layers without a tensor are named in a warning.

    Raises:
        LoraSVDError: the folder is no such folder.
    """
    folder = Path(folder)
    model = skeleton(folder)
    tensors = Tensors(folder, model)
    tied = (getattr(model.config, "quantization_config", None) or {}).get("tied", {})
    weights: dict[str, LayerWeight] = {}
    missing: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            continue
        key = next((key for key in spellings(name, model.base_model_prefix + ".") if f"{key}.weight" in tensors), None)
        if key is None:
            missing += [] if isinstance(module, nn.Embedding) or _is_tied(model, name) or name in tied else [name]
        elif f"{key}.right.weight" in tensors:
            read = partial(tensors.product, key, by_id=isinstance(module, nn.Embedding))
            weights[name] = LayerWeight(_shape(module), tensors.rank(key), read)
        elif not isinstance(module, nn.Embedding):
            # bitsandbytes turns a Conv1D's weight round before it quantizes it
            turned = isinstance(module, Conv1D) and not tensors.is_4bit(f"{key}.weight")
            weights[name] = LayerWeight(_shape(module), None, partial(tensors.weight, f"{key}.weight", turned=turned))
    if not weights:
        raise LoraSVDError(f"model: {folder} has no weight of a linear layer of {type(model).__name__}")
    if missing:
        warnings.warn(
            f"{folder}: no weight is stored under the name of {len(missing)} linear layers, which are left out: "
            f"{', '.join(missing[:5])}{', ...' if missing[5:] else ''}",
            stacklevel=2,
        )
    return weights


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
