"""The low-rank layers of a compact model, put into a dense one: empty, for a file, or with random weights."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import LoraSVDError
from .description import LoraSVDCompactConfig
from .host import untie
from .layers import (
    LowRankEmbedding,
    LowRankLinear,
    empty_low_rank,
    expose_output,
    layer_features,
    narrowed_dense,
    remember_shape,
    tie_head,
)

Dense = nn.Linear | nn.Embedding | Conv1D


def put_empty_layers(
    model: PreTrainedModel, config: LoraSVDCompactConfig, dense: Container[str] = ()
) -> dict[str, Dense]:
    """Put the layers that a config describes into a model, on the meta device; returns those that they replace.

    Args:
        model: of the class that was saved, without its head, or with one on top.
        dense: names in the config of layers that keep their weight, whatever it says of them.
    """
    replaced: dict[str, Dense] = {}
    for saved_name, rank in config.ranks.items():
        name, module = find_module(model, saved_name)
        untie(model, name)
        if (shape := config.shapes.get(saved_name)) is not None:
            module = _narrowed(model, name, module, shape)
        if saved_name not in dense:
            split = config.splits.get(saved_name)
            replaced |= _replace(model, name, module, rank, config.factor_format, split)
        if shape is not None:
            remember_shape(model.get_submodule(name), shape["dense"])
    for saved_head, saved_name in config.tied.items():
        (head, module), (name, embedding) = find_module(model, saved_head), find_module(model, saved_name)
        if isinstance(embedding, LowRankEmbedding) and isinstance(module, nn.Linear):
            tie_head(model, head, name)
    return replaced


@torch.no_grad()
def put_random_layers(model: PreTrainedModel, config: LoraSVDCompactConfig) -> None:
    """Put the layers that a config describes into a model that was just made, with random weights like its own."""
    for name, dense in put_empty_layers(model, config).items():
        if not dense.weight.is_meta:
            layer = cast(LowRankLinear, model.get_submodule(name)).to_empty(device=dense.weight.device)
            _fill(layer, float(dense.weight.float().std()))
            if layer.bias is not None:
                layer.bias.copy_(cast(Tensor, dense.bias))
            layer.train(dense.training)
    expose_output(model)


def _fill(layer: LowRankLinear, deviation: float) -> None:
    """Random factors whose product has elements of this standard deviation."""
    left, right = layer.left.weight, layer.right.weight
    if layer.factor_format == "pivoted":  # right is a part of the product
        right.normal_(0, deviation)
        left.normal_(0, layer.rank**-0.5)
        layer.order.copy_(torch.arange(layer.out_features))
    else:
        left.normal_(0, each := (deviation * layer.rank**-0.5) ** 0.5)
        right.normal_(0, each)
    if isinstance(layer, LowRankEmbedding) and layer.padding_idx is not None:
        right[layer.padding_idx] = 0
    layer.weight.zero_()


def spellings(name: str, prefix: str) -> tuple[str, str, str]:
    """A module's name, as saved, in the model without its head and in one with a head on top."""
    return name, name.removeprefix(prefix), prefix + name


def find_module(model: PreTrainedModel, name: str) -> tuple[str, nn.Module]:
    """The module of that name, also in the model without its head (AutoModel) or with one put on top."""
    prefix = model.base_model_prefix + "."
    for candidate in spellings(name, prefix):
        try:
            return candidate, model.get_submodule(candidate)
        except AttributeError:
            continue
    if "." not in name or not name.startswith(prefix):  # a head that this class of model does not have
        return name, nn.Identity()
    raise LoraSVDError(
        f"{name}: named in this compact checkpoint's ranks, but {type(model).__name__} has no such module. Load it "
        "with the class it was saved from"
    )


def _narrowed(model: PreTrainedModel, name: str, dense: nn.Module, shape: Mapping[str, Any]) -> nn.Module:
    """Put a dense layer without the features of some neurons into a model, and return it."""
    if isinstance(dense, nn.Identity | LowRankLinear):
        return dense
    found = list(layer_features(dense))[::-1] if isinstance(dense, nn.Linear | Conv1D) else type(dense).__name__
    if found == list(shape["kept"]):  # the code of the folder has put it there
        return dense
    if found != list(shape["dense"]):
        raise LoraSVDError(
            f"{name}: the compact checkpoint keeps {shape['kept']} of {shape['dense']} features, but the model has "
            f"{found}. Restore the config.json that was saved with it, or load it with the class it was saved from"
        )
    new = narrowed_dense(dense, shape["kept"])
    model.set_submodule(name, new)
    return new


def _replace(
    model: PreTrainedModel, name: str, dense: nn.Module, rank: int, factor_format: str, split: list[int] | None
) -> dict[str, Dense]:
    """Put one layer into a model; returns the one that it replaces by its name, if it does."""
    if isinstance(dense, nn.Identity | LowRankLinear):
        return {}  # for a head that this class of model does not have; or the code of the folder has put it there
    if not isinstance(dense, Conv1D | nn.Linear | nn.Embedding):
        raise LoraSVDError(
            f"{name}: named in this compact checkpoint's ranks, but it is {type(dense).__name__}, expected a linear "
            "layer or an embedding. Load it with the class it was saved from"
        )
    in_features, out_features = layer_features(dense)
    m1, n1 = split or (out_features, 1)
    if out_features % m1 or in_features % n1:
        raise LoraSVDError(
            f"{name}: the compact checkpoint is split by {split}, expected divisors of {out_features} and {in_features}"
        )
    full_rank = min(m1 * n1, out_features // m1 * in_features // n1)
    if rank > full_rank:
        raise LoraSVDError(f"{name}: the compact checkpoint gives rank {rank}, expected at most {full_rank}")
    if rank == full_rank:
        return {}
    with torch.device("meta"):
        new = empty_low_rank(dense, rank, factor_format, dense.weight.dtype, None if split is None else (m1, n1))
    model.set_submodule(name, new)
    return {name: dense}
