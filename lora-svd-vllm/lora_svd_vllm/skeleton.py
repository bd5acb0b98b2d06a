"""The dense model of a compact checkpoint's config, without memory: where its layers are, and every tensor's shape."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .description import DENSIFY, CheckpointError, Layer


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The dense model of transformers that a config describes, on the meta device."""
    name = next(iter(config.architectures or ()), None)
    kind: Any = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise CheckpointError(
            f"architectures: the compact checkpoint is of {name!r}, expected a class of transformers "
            f"{transformers.__version__}; install a version that has it, or {DENSIFY}"
        )
    plain: Any = copy.deepcopy(config)
    del plain.quantization_config
    with torch.device("meta"):
        model = kind(plain)
    _refuse_experts(model)
    return model


def layers_of(description: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Layer]:
    """Every linear layer and embedding with a weight of its own, by name, whether the description names it or not."""
    tied = {name.removesuffix(".weight") for name in model.all_tied_weights_keys} | description.get("tied", {}).keys()
    dense = {
        name: min(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and name not in tied
    }
    return {name: _layer(name, rank, description, model) for name, rank in (dense | description["ranks"]).items()}


def expected_tensors(
    description: Mapping[str, Any], layers: Mapping[str, Layer], model: PreTrainedModel
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the checkpoint should have, by name."""
    owners = (*layers, *description.get("tied", {}))
    replaced = tuple(f"{name}." for name in owners)
    tied = model.all_tied_weights_keys
    others = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.startswith(replaced) and name not in tied
    }
    ours = {f"{layer.name}.{name}": shape for layer in layers.values() for name, shape in layer.tensors().items()}
    return others | ours


def _layer(name: str, rank: int, description: Mapping[str, Any], model: PreTrainedModel) -> Layer:
    try:
        module: Any = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"{name}: named in this compact checkpoint's ranks, but {type(model).__name__} has no such module; "
            "restore the config.json that was saved with it"
        ) from None
    if not isinstance(module, nn.Linear | nn.Embedding):
        raise CheckpointError(
            f"{name}: of class {type(module).__name__}, expected a linear layer or an embedding; {DENSIFY}"
        )
    is_embedding = isinstance(module, nn.Embedding)
    rows, columns = module.weight.shape
    dense = (columns, rows) if is_embedding else (rows, columns)
    shape = description.get("shapes", {}).get(name, {"dense": dense, "kept": dense, "chunks": 1})
    if tuple(shape["dense"]) != dense:
        raise CheckpointError(
            f"{name}: was {list(shape['dense'])} before compression according to quantization_config, but the rest of "
            f"config.json makes it {list(dense)}; restore the config.json that was saved with it"
        )
    kept = tuple(shape["kept"])
    if not 1 <= rank <= min(kept):
        raise CheckpointError(
            f"{name}: the compact checkpoint gives rank {rank}, expected 1 to {min(kept)}; restore the config.json "
            "that was saved with it"
        )
    return Layer(
        name,
        rank,
        dense,
        kept,
        chunks=shape["chunks"],
        pivoted=description["factor_format"] == "pivoted",
        has_bias=getattr(module, "bias", None) is not None,
        is_embedding=is_embedding,
        # transformers asks every attention whether it is causal
        of_heads=hasattr(model.get_submodule(name.rpartition(".")[0]), "is_causal"),
    )


def _refuse_experts(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and "expert" in name:
            raise CheckpointError(
                f"{name}: a mixture of experts ({type(model).__name__}), which this plugin does not serve; {DENSIFY}"
            )
