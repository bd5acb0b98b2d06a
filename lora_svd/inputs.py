"""What the pipeline is given of every layer: its weight, its statistics as metrics, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from .allocation import LayerShape
from .decompositions import Factors
from .errors import LoraSVDError, NumericalError, in_module, warn_numerical
from .importance import IMPORTANCES
from .linalg import Metrics, non_finite, shrink
from .neurons import NeuronGroup
from .statistics import STATISTICS, LayerStatistics

T = TypeVar("T")


@dataclass(frozen=True)
class CompressionSettings:
    """The choices of one compression, as in ``LoraSVDConfig``."""

    importance: str
    allocation: str
    decomposition: str
    factor_format: str
    rank_multiple: int
    row_shrinkage: float
    correlation_shrinkage: float
    column_shrinkage: float

    @classmethod
    def of(cls, config: object) -> CompressionSettings:
        """The choices that a ``LoraSVDConfig`` makes."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class LayerInput:
    """What the pipeline needs of one layer.

    Attributes:
        shape: of the matrix that is factorized, and the ranks stored on top of the kept one.
        weight: returns the frozen weight, (out, in), on the CPU in float64.
        statistics: returns what was observed.
        trained: factors that training has changed, if it has.
        rows, columns: those that are kept of the weight; None: all.
    """

    shape: LayerShape
    weight: Callable[[], Tensor]
    statistics: Callable[[], LayerStatistics]
    trained: Factors | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None

    def narrowed(self, rows: Tensor | None = None, columns: Tensor | None = None) -> LayerInput:
        """The same layer with some rows and columns of its weight only."""
        if rows is None and columns is None:
            return self
        shape = self.shape.narrowed(rows, columns)
        return replace(self, shape=shape, rows=on_cpu(rows), columns=on_cpu(columns))

    @property
    def is_narrowed(self) -> bool:
        return self.rows is not None or self.columns is not None

    def keeps_the_same(self, factors: Factors) -> bool:
        """Whether factors stand for the same rows and columns."""
        pairs = ((self.rows, factors.rows), (self.columns, factors.columns))
        return all(a is b or (a is not None and b is not None and torch.equal(a, b.cpu())) for a, b in pairs)


def layer_metrics(name: str, layer: LayerInput, settings: CompressionSettings) -> Metrics:
    """The row and column metric of one layer, shrunk so that the factorization is well posed; zero stays zero. Of the
    rows and columns that are kept.

    Raises:
        LoraSVDError: the layer was never observed.
        NumericalError: its statistics are not finite.
    """
    return whole_metrics(name, layer, settings).narrowed(layer.rows, layer.columns)


def whole_metrics(name: str, layer: LayerInput, settings: CompressionSettings) -> Metrics:
    """:func:`layer_metrics` of all rows and columns.

    Raises:
        LoraSVDError: the layer was never observed.
        NumericalError: its statistics are not finite.
    """
    importance = IMPORTANCES[settings.importance]
    seen = layer.statistics()
    for statistic in importance.statistics:
        if statistic not in seen.sums or not seen.counts[STATISTICS[statistic].per]:
            raise LoraSVDError(
                f"{name}: nothing was observed for importance={settings.importance!r} ({statistic} is missing). Train "
                "at least one step (loss.backward(), then update_and_allocate(step) or LoraSVDCallback) before "
                "compressing, leave a layer that has no part in the loss out with exclude_modules, or use "
                "importance='none'"
            )
        if bad := non_finite(seen.sums[statistic]):
            raise NumericalError(
                f"{name}: {statistic} has {bad}; a batch gave a non-finite loss or gradient. Lower the learning rate, "
                "or train in float32 or bfloat16"
            )
    with in_module(name):
        metrics = importance.metrics(seen)
        if zero := metrics.zero:
            dead = [statistic for statistic in importance.statistics if not bool(seen.sums[statistic].any())]
            warn_numerical(
                f"{', '.join(dead or zero)} was zero in every observed step, so that no error in this layer costs "
                "anything: allocation='global' gives it the least rank. Observe text that it works on, or leave it as "
                f"it is: exclude_modules={[name]}"
            )
        return Metrics(
            row=shrink(metrics.row, settings.row_shrinkage, settings.correlation_shrinkage),
            column=shrink(metrics.column, settings.column_shrinkage),
            elements=None if metrics.elements is None else _shrunk_elements(metrics.elements, settings.row_shrinkage),
        )


def _shrunk_elements(elements: Tensor, amount: float) -> Tensor:
    return shrink(elements.flatten(), amount).view_as(elements)


def units_of(layers: Mapping[str, T], groups: Mapping[str, NeuronGroup]) -> dict[str, dict[str, T]]:
    """The layers of every group, by its consumer, and every other layer on its own; in the order of the layers."""
    unit = {layer: consumer for consumer, group in groups.items() for layer in group.layers}
    units: dict[str, dict[str, T]] = {}
    for name, layer in layers.items():
        units.setdefault(unit.get(name, name), {})[name] = layer
    return units


def narrow(layers: Mapping[str, LayerInput], group: NeuronGroup, kept: Tensor | None) -> dict[str, LayerInput]:
    """The layers of a group without the rows that make, and the columns that take, other units than these."""
    if kept is None:
        return dict(layers)
    consumer, units = layers[group.consumer], group.units(layers[group.consumer].shape.in_features)
    narrowed = {
        name: layers[name].narrowed(rows=group.features(kept, layers[name].shape.out_features, units))
        for name in group.producers
    }
    columns = group.features(kept, consumer.shape.in_features, units)
    return {**narrowed, group.consumer: consumer.narrowed(columns=columns)}


def narrow_units(
    units: Mapping[str, Mapping[str, LayerInput]], groups: Mapping[str, NeuronGroup], neurons: Mapping[str, Tensor]
) -> dict[str, dict[str, LayerInput]]:
    """Every unit as in :func:`size_choices`, of the groups that lose some only the neurons that are given."""
    return {
        unit: narrow(layers, groups[unit], neurons[unit]) if unit in neurons else dict(layers)
        for unit, layers in units.items()
    }


def narrow_layers(
    layers: Mapping[str, LayerInput], groups: Mapping[str, NeuronGroup], neurons: Mapping[str, Tensor]
) -> dict[str, LayerInput]:
    """What is kept of every layer, in their order, as :func:`narrow_units` has it."""
    units = narrow_units(units_of(layers, groups), groups, neurons)
    kept = {name: layer for of in units.values() for name, layer in of.items()}
    return {name: kept[name] for name in layers}


def on_cpu(index: Tensor | None) -> Tensor | None:
    """An index where factors are computed."""
    return None if index is None else index.cpu()
