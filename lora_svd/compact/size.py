"""How large a model is: parameters and bytes, dense and compact. The only place where its ratios are computed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .bnb import num_bytes, num_parameters
from .description import LoraSVDCompactConfig
from .layers import LowRankLinear


@dataclass(frozen=True)
class LayerReport:
    """One low-rank layer. Parameters exclude the bias; bytes are those of its factors and index."""

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
    layers = {name: _layer(module) for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    parameters = sum(num_parameters(parameter) for parameter in model.parameters())
    stored = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    saved = sum(layer.dense_parameters - layer.parameters for layer in layers.values())
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(config, LoraSVDCompactConfig) and config.dense_parameters:
        targeted, tied = config.dense_parameters, config.tied_parameters
    else:
        targeted, tied = sum(layer.dense_parameters for layer in layers.values()), 0
    return ParameterReport(
        parameters=parameters,
        bytes=sum(num_bytes(tensor) for tensor in stored.values()),
        dense_parameters=parameters + saved - tied,
        targeted_parameters=targeted - saved,
        dense_targeted_parameters=targeted,
        layers=layers,
    )


def _layer(module: LowRankLinear) -> LayerReport:
    tensors = [module.left.weight, module.right.weight]
    stored = [*tensors, *module.buffers()]
    return LayerReport(
        shape=(module.out_features, module.in_features),
        rank=module.rank,
        parameters=sum(num_parameters(tensor) for tensor in tensors),
        dense_parameters=module.in_features * module.out_features,
        bytes=sum(num_bytes(tensor) for tensor in stored),
    )
