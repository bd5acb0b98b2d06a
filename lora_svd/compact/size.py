"""How large a model is: parameters and bytes, dense and compact. The only place where its ratios are computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from .bnb import num_bytes, num_parameters
from .description import LoraSVDCompactConfig
from .layers import LowRankLinear, layer_features


@dataclass(frozen=True)
class LayerReport:
    """One low-rank layer. Parameters exclude the bias; bytes are those of its factors and index. The shape is what is
    left of it, ``dense_parameters`` are those of before, with the neurons that are gone."""

    shape: tuple[int, int]
    rank: int
    parameters: int
    dense_parameters: int
    bytes: int


@dataclass(frozen=True)
class ParameterReport:
    """The size of a model.

    Attributes:
        parameters: of the whole model, tied ones once.
        bytes: of all parameters and buffers, tied ones once.
        dense_parameters: of the whole model before it was compressed; equal to ``parameters`` for a dense model.
        targeted_parameters: kept in the targeted weights, bias excluded.
        dense_targeted_parameters: in the same weights before.
        layers: by name, the layers that are low-rank.
    """

    parameters: int
    bytes: int
    dense_parameters: int
    targeted_parameters: int
    dense_targeted_parameters: int
    layers: dict[str, LayerReport]

    @property
    def param_ratio(self) -> float:
        """Kept / original parameters of the targeted weights; 1 for a dense model."""
        return self.targeted_parameters / self.dense_targeted_parameters if self.dense_targeted_parameters else 1.0

    @property
    def model_param_ratio(self) -> float:
        """Kept / original parameters of the whole model."""
        return self.parameters / self.dense_parameters


def parameter_report(model: nn.Module) -> ParameterReport:
    """Count a model as it is stored now. Markers and indices count as bytes, not as parameters."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    layers = {name: _layer(module) for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    narrowed: dict[str, Any] = {
        name: module for name, module in model.named_modules() if hasattr(module, "dense_shape")
    }
    whole = {name: module.dense_shape[0] * module.dense_shape[1] for name, module in narrowed.items()}
    gone = sum(whole[name] - math.prod(layer_features(narrowed[name])) for name in narrowed.keys() - layers.keys())
    biases = sum(
        module.dense_shape[0] - layer_features(module)[1]
        for module in narrowed.values()
        if getattr(module, "bias", None) is not None
    )
    parameters = sum(num_parameters(parameter) for parameter in model.parameters())
    stored = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    saved = sum(layer.dense_parameters - layer.parameters for layer in layers.values()) + gone
    if isinstance(config, LoraSVDCompactConfig) and config.dense_parameters:
        targeted, tied = config.dense_parameters, config.tied_parameters
    else:
        targeted = sum({**whole, **{name: layer.dense_parameters for name, layer in layers.items()}}.values())
        tied = 0
    return ParameterReport(
        parameters=parameters,
        bytes=sum(num_bytes(tensor) for tensor in stored.values()),
        dense_parameters=parameters + saved + biases - tied,
        targeted_parameters=targeted - saved,
        dense_targeted_parameters=targeted,
        layers=layers,
    )


def _layer(module: LowRankLinear) -> LayerReport:
    rows, columns = getattr(module, "dense_shape", (module.out_features, module.in_features))
    tensors = [module.left.weight, module.right.weight]
    stored = [*tensors, *module.buffers()]
    return LayerReport(
        shape=(module.out_features, module.in_features),
        rank=module.rank,
        parameters=sum(num_parameters(tensor) for tensor in tensors),
        dense_parameters=rows * columns,
        bytes=sum(num_bytes(tensor) for tensor in stored),
    )
