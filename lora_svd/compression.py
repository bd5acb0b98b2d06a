"""The pipeline: statistics -> metrics -> spectra -> ranks -> factors -> absorbed factors. Values in, values out.

For each targeted weight W, find W' of rank k that minimizes ``tr((W - W')^T row (W - W') column)``, the loss to second
order if row and column come from gradients and activations; choose all k together so that the summed minimum is least
under one budget of stored parameters; then fold the trained bypass in by the same truncation.

Weights come as functions, so that one dense float64 matrix is in memory at a time, whatever the base stores.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields

from torch import Tensor
from tqdm.auto import tqdm

from .allocation import LayerShape, allocate_ranks
from .decompositions import DECOMPOSITIONS, Factors
from .errors import LoraSVDError, NumericalError, in_module
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
        """Those among the fields of a ``LoraSVDConfig``."""
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
    """The row and column metric of one layer, shrunk so that the factorization is well posed.

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
    metrics = importance.metrics(seen)
    sides = (("row", metrics.row, "gradients"), ("column", metrics.column, "inputs"))
    for side, metric, of in (*sides, ("element", metrics.elements, "gradients")):
        if metric is not None and not bool(metric.any()):
            warnings.warn(
                f"{name}: its {of} were zero in every observed step, so all {side}s count alike; leave it out with "
                "exclude_modules if it has no part in the loss, or observe text that it works on",
                stacklevel=2,
            )
    return Metrics(
        row=shrink(metrics.row, settings.row_shrinkage, settings.correlation_shrinkage),
        column=shrink(metrics.column, settings.column_shrinkage),
        elements=None if metrics.elements is None else _shrunk_elements(metrics.elements, settings.row_shrinkage),
    )


def _shrunk_elements(elements: Tensor, amount: float) -> Tensor:
    shrunk = shrink(elements.flatten(), amount)
    assert shrunk is not None
    return shrunk.view_as(elements)


def compute_spectra(layers: Mapping[str, LayerInput], settings: CompressionSettings) -> dict[str, Tensor]:
    """Squared singular values of every weight in its metrics, by layer."""
    decomposition = DECOMPOSITIONS[settings.decomposition]
    spectra = {}
    for name, layer in _progress(layers, "spectra"):
        with in_module(name):
            spectra[name] = decomposition.spectrum(layer.weight(), layer_metrics(name, layer, settings))
    return spectra


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
    """In a function of its own, so that nothing of a layer is left in memory when the next one begins."""
    if layer.trained is None and rank >= layer.shape.full_rank:
        return None
    if layer.trained is not None and rank == layer.trained.rank:
        return layer.trained
    metrics = layer_metrics(name, layer, settings)
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
        metrics = layer_metrics(name, layer, settings)
        return DECOMPOSITIONS[settings.decomposition].absorb(factors, bypass, metrics)


def _progress(layers: Mapping[str, LayerInput], label: str) -> Iterable[tuple[str, LayerInput]]:
    return tqdm(layers.items(), desc=label, leave=False, delay=2)
