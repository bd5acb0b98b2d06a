"""The pipeline: statistics -> metrics -> spectra -> widths and ranks -> factors -> absorbed factors. Values in, out.

For each targeted weight W, find W' of rank k that minimizes ``tr((W - W')^T row (W - W') column)``, the loss to second
order if row and column come from gradients and activations; choose all k together so that the summed minimum is least
under one budget of stored parameters; then fold the trained bypass in by the same truncation. Where layers share
neurons, how many of those stay is chosen with the ranks, by the same loss (:mod:`lora_svd.neurons`).

Weights come as functions, so that one dense float64 matrix is in memory at a time, whatever the base stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .allocation import Allocation, Choice, LayerShape, allocate, allocate_ranks
from .decompositions import DECOMPOSITIONS, Factors, scattered
from .errors import LoraSVDError, NumericalError, in_module, warn_numerical
from .importance import IMPORTANCES
from .linalg import Metrics, non_finite, shrink
from .neurons import GroupWeights, NeuronGroup, eliminate, refit, width_spectra, widths
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
        return replace(self, shape=shape, rows=_on_cpu(rows), columns=_on_cpu(columns))

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
    return _whole_metrics(name, layer, settings).narrowed(layer.rows, layer.columns)


def _whole_metrics(name: str, layer: LayerInput, settings: CompressionSettings) -> Metrics:
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


def compute_spectra(layers: Mapping[str, LayerInput], settings: CompressionSettings) -> dict[str, Tensor]:
    """Squared singular values of every weight in its metrics, by layer; zero where no error costs anything."""
    spectra = {}
    for name, layer in _progress(layers, "spectra"):
        with in_module(name):
            spectra[name] = _spectrum(name, layer, settings)
    return spectra


def _spectrum(name: str, layer: LayerInput, settings: CompressionSettings) -> Tensor:
    metrics = layer_metrics(name, layer, settings)
    if metrics.zero:
        return torch.zeros(layer.shape.full_rank, dtype=torch.float64)
    weight = _narrowed(name, layer, layer.weight(), settings)
    return DECOMPOSITIONS[settings.decomposition].spectrum(weight, metrics)


def size_choices(
    units: Mapping[str, Mapping[str, LayerInput]], groups: Mapping[str, NeuronGroup], settings: CompressionSettings
) -> Iterable[tuple[str, list[Choice]]]:
    """What each unit can keep: the ranks of a layer on its own, or the neurons of a group and the ranks beside each.

    A group of which a metric is zero keeps all of its neurons.

    Args:
        units: the layers of each by name: a group's by that of its consumer.
        groups: by the name of the consumer.
    """
    for name, layers in _progress(units, "spectra"):
        with in_module(name):
            given = _group_weights(groups[name], layers, settings) if name in groups else None
            if given is not None:
                yield name, _group_choices(given, layers, settings)
                continue
        shapes = {layer: of.shape for layer, of in layers.items()}
        spectra = {}
        for layer, of in layers.items():
            with in_module(layer):
                spectra[layer] = _spectrum(layer, of, settings)
        yield name, [Choice(None, 0.0, spectra, shapes)]


def _group_weights(
    group: NeuronGroup, layers: Mapping[str, LayerInput], settings: CompressionSettings
) -> GroupWeights | None:
    metrics = {}
    for name, layer in layers.items():
        with in_module(name):
            metrics[name] = layer_metrics(name, layer, settings)
    if any(of.zero for of in metrics.values()):
        return None
    return GroupWeights(group, {name: layer.weight() for name, layer in layers.items()}, metrics)


def _group_choices(
    given: GroupWeights, layers: Mapping[str, LayerInput], settings: CompressionSettings
) -> list[Choice]:
    consumer, total = given.group.consumer, layers[given.group.consumer].shape.in_features
    possible = widths(total, settings.rank_multiple)
    elimination = eliminate(given.weights[consumer], given.metrics[consumer], possible[0])
    choices = []
    for width, error, spectra in width_spectra(given, elimination, possible):
        neurons = None if width == total else elimination.kept(width, total)
        shapes = {name: layer.shape for name, layer in narrow(layers, given.group, neurons).items()}
        choices.append(Choice(neurons, error, spectra, shapes))
    return choices


def best_neurons(
    layers: Mapping[str, LayerInput], group: NeuronGroup, width: int, settings: CompressionSettings
) -> Tensor:
    """The neurons of a group that stay at a width, ascending."""
    consumer = layers[group.consumer]
    with in_module(group.consumer):
        metrics = layer_metrics(group.consumer, consumer, settings).definite
        return eliminate(consumer.weight(), metrics, width).kept(width, consumer.shape.in_features)


def narrow(layers: Mapping[str, LayerInput], group: NeuronGroup, neurons: Tensor | None) -> dict[str, LayerInput]:
    """The layers of a group without the rows that make, and the columns that take, other neurons than these."""
    if neurons is None:
        return dict(layers)
    total = layers[group.consumer].shape.in_features
    narrowed = {
        name: layers[name].narrowed(rows=group.kept(neurons, layers[name].shape.out_features, total))
        for name in group.producers
    }
    return {**narrowed, group.consumer: layers[group.consumer].narrowed(columns=neurons)}


def narrow_units(
    units: Mapping[str, Mapping[str, LayerInput]], groups: Mapping[str, NeuronGroup], neurons: Mapping[str, Tensor]
) -> dict[str, dict[str, LayerInput]]:
    """Every unit as in :func:`size_choices`, of the groups that lose some only the neurons that are given."""
    return {
        unit: narrow(layers, groups[unit], neurons[unit]) if unit in neurons else dict(layers)
        for unit, layers in units.items()
    }


def choose_size(choices: Mapping[str, list[Choice]], param_ratio: float, settings: CompressionSettings) -> Allocation:
    """Kept ranks by layer, the full one means dense, and the neurons of the groups that lose some."""
    return allocate(
        choices,
        param_ratio=param_ratio,
        allocation=settings.allocation,
        factor_format=settings.factor_format,
        rank_multiple=settings.rank_multiple,
    )


def choose_ranks(
    layers: Mapping[str, LayerInput], spectra: Mapping[str, Tensor], param_ratio: float, settings: CompressionSettings
) -> dict[str, int]:
    """Kept rank by layer; the full one means dense."""
    return allocate_ranks(
        spectra,
        {name: layer.shape for name, layer in layers.items()},
        param_ratio=param_ratio,
        allocation=settings.allocation,
        factor_format=settings.factor_format,
        rank_multiple=settings.rank_multiple,
    )


def factorize(
    layers: Mapping[str, LayerInput], ranks: Mapping[str, int], settings: CompressionSettings
) -> Iterable[tuple[str, Factors | None]]:
    """The best factors of each weight at its rank, layer by layer; None where the frozen weight stays.

    Where factors were trained, what they learned goes over to the other rank: the weight is then
    :func:`trained_weight`, and at the rank that was trained the factors stay as they are.
    """
    for name, layer in _progress(layers, "factors"):
        with in_module(name):
            yield name, _factorize_layer(name, layer, ranks[name], settings)


def _factorize_layer(name: str, layer: LayerInput, rank: int, settings: CompressionSettings) -> Factors | None:
    """A separate function, so that a layer's tensors are freed before the next one starts."""
    is_whole, trained = rank >= layer.shape.full_rank, layer.trained
    if trained is None and is_whole and not layer.is_narrowed:
        return None
    if trained is not None and rank == trained.rank and layer.keeps_the_same(trained):
        return trained
    metrics = layer_metrics(name, layer, settings).definite
    weight = kept_weight(name, layer, settings)
    if is_whole and layer.is_narrowed:
        factors = _dense_factors(weight)
    else:
        factors = DECOMPOSITIONS[settings.decomposition].factorize(weight, metrics, rank)
    return replace(factors, rows=layer.rows, columns=layer.columns)


def _dense_factors(weight: Tensor) -> Factors:
    """Factors of full rank, one of them the identity: a weight that stays dense but not as it was."""
    out_features, in_features = weight.shape
    if out_features < in_features:
        return Factors(torch.eye(out_features, dtype=weight.dtype), weight)
    return Factors(weight, torch.eye(in_features, dtype=weight.dtype))


def kept_weight(name: str, layer: LayerInput, settings: CompressionSettings) -> Tensor:
    """The rows and columns that are kept of the weight and of what training has added to it, float64, refitted to the
    columns that are not."""
    return _narrowed(name, layer, trained_weight(name, layer, settings), settings)


def _narrowed(name: str, layer: LayerInput, weight: Tensor, settings: CompressionSettings) -> Tensor:
    weight = weight if layer.rows is None else weight[layer.rows]
    if layer.columns is None:
        return weight
    return refit(weight, _whole_metrics(name, layer, settings).definite.column, layer.columns)


def trained_weight(name: str, layer: LayerInput, settings: CompressionSettings) -> Tensor:
    """``W + (left right - W_k)``, (out, in), float64: the weight and what training has added to its truncation W_k, to
    the rank and the neurons of the factors."""
    weight, trained = layer.weight(), layer.trained
    if trained is None:
        return weight
    before = replace(layer, rows=_on_cpu(trained.rows), columns=_on_cpu(trained.columns))
    truncated = _narrowed(name, before, weight, settings)
    if trained.rank < min(truncated.shape):
        metrics = layer_metrics(name, before, settings).definite
        truncated = DECOMPOSITIONS[settings.decomposition].factorize(truncated, metrics, trained.rank).product()
    change = trained.product().cpu().double() - truncated
    return weight + scattered(change, weight.shape, before.rows, before.columns)


def _on_cpu(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.cpu()


def absorb(name: str, layer: LayerInput, factors: Factors, bypass: Factors, settings: CompressionSettings) -> Factors:
    """The best approximation of ``W_k + s B A`` at the rank of the factors, in the layer's metrics: the bypass at no
    parameters. A bypass that is zero leaves the factors as they are."""
    if not (bool(bypass.left.any()) and bool(bypass.right.any())):
        return factors
    with in_module(name):
        metrics = layer_metrics(name, layer, settings).definite
        return DECOMPOSITIONS[settings.decomposition].absorb(factors, bypass, metrics)


def _progress(layers: Mapping[str, T], label: str) -> Iterable[tuple[str, T]]:
    return tqdm(layers.items(), desc=label, leave=False, delay=2)
