"""How an adapter remembers its groups of layers, and what is left of a layer without some neurons or heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..compact.layers import layer_features
from ..config import LoraSVDConfig
from ..groups import groups_of
from ..neurons import NeuronGroup
from .adapter import LayerAdapter


def mark(groups: Mapping[str, NeuronGroup], adapters: Mapping[str, LayerAdapter]) -> None:
    """Note in every layer's adapter, with which it is saved, the place of the layer that takes its neurons or heads."""
    places = {name: place for place, name in enumerate(adapters)}
    of_layers = {layer: group for group in groups.values() for layer in group.layers}
    for name, adapter in adapters.items():
        group = of_layers.get(name)
        said = None if group is None else [places[group.consumer], *([group.heads] if group.heads else [])]
        adapter.group = None if said is None else torch.tensor(said, device=adapter.A.device)


def marked(adapters: Mapping[str, LayerAdapter]) -> dict[str, NeuronGroup]:
    """Groups by consumer, as :func:`mark` has noted them."""
    names = list(adapters)
    said = {name: of.group.tolist() for name, of in adapters.items() if of.group is not None}
    groups: dict[str, NeuronGroup] = {}
    for place, *heads in said.values():
        consumer = names[place]
        producers = tuple(name for name, other in said.items() if other[0] == place and name != consumer)
        groups[consumer] = NeuronGroup(consumer, producers, *heads)
    return groups


def kept_features(model: nn.Module, config: LoraSVDConfig, name: str) -> tuple[int, int] | None:
    """(out, in) features of a layer of a compressed adapter that is without some units; None for another layer."""
    in_features, out_features = layer_features(_base(model, name))
    for consumer, group in groups_of(config).items():
        width = (config.compact_widths or {}).get(consumer)
        if width is None or name not in group.layers:
            continue
        taken = layer_features(_base(model, consumer))[0]
        group.check_width(width, taken)
        units = group.units(taken)
        if name == consumer:
            return out_features, in_features // units * width
        return out_features // units * width, in_features
    return None


def _base(model: nn.Module, name: str) -> Any:
    module: Any = model.get_submodule(name)
    return getattr(module, "base_layer", module)
