"""The pipeline: statistics -> metrics -> spectra -> ranks -> factors -> absorbed factors. Values in, values out.

For each targeted weight W, find W' of rank k that minimizes ``tr((W - W')^T row (W - W') column)``, the loss to second
order if row and column come from gradients and activations; choose all k together so that the summed minimum is least
under one budget of stored parameters; then fold the trained bypass in by the same truncation.

Weights come as functions, so that one dense float64 matrix is in memory at a time, whatever the base stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .allocation import LayerShape, allocate_ranks
from .decompositions import DECOMPOSITIONS, Factors
from .errors import LoraSVDError, NumericalError, in_module, warn_numerical
from .importance import IMPORTANCES
from .linalg import Metrics, non_finite, shrink
from .statistics import STATISTICS, LayerStatistics


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
    """

    shape: LayerShape
    weight: Callable[[], Tensor]
    statistics: Callable[[], LayerStatistics]
    trained: Factors | None = None


def layer_metrics(name: str, layer: LayerInput, settings: CompressionSettings) -> Metrics:
    """The row and column metric of one layer, shrunk so that the factorization is well posed; zero stays zero.

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
    return DECOMPOSITIONS[settings.decomposition].spectrum(layer.weight(), metrics)


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
    if layer.trained is None and rank >= layer.shape.full_rank:
        return None
    if layer.trained is not None and rank == layer.trained.rank:
        return layer.trained
    metrics = layer_metrics(name, layer, settings).definite
    weight = trained_weight(layer, metrics, settings)
    return DECOMPOSITIONS[settings.decomposition].factorize(weight, metrics, rank)


def trained_weight(layer: LayerInput, metrics: Metrics, settings: CompressionSettings) -> Tensor:
    """``W + (left right - W_k)``, float64: the weight and what training has added to its rank-k truncation."""
    weight, trained = layer.weight(), layer.trained
    if trained is None:
        return weight
    truncated = DECOMPOSITIONS[settings.decomposition].factorize(weight, metrics, trained.rank)
    return weight + trained.product().cpu().double() - truncated.product()


def absorb(name: str, layer: LayerInput, factors: Factors, bypass: Factors, settings: CompressionSettings) -> Factors:
    """The best approximation of ``W_k + s B A`` at the rank of the factors, in the layer's metrics: the bypass at no
    parameters. A bypass that is zero leaves the factors as they are."""
    if not (bool(bypass.left.any()) and bool(bypass.right.any())):
        return factors
    with in_module(name):
        metrics = layer_metrics(name, layer, settings).definite
        return DECOMPOSITIONS[settings.decomposition].absorb(factors, bypass, metrics)


def _progress(layers: Mapping[str, LayerInput], label: str) -> Iterable[tuple[str, LayerInput]]:
    return tqdm(layers.items(), desc=label, leave=False, delay=2)
