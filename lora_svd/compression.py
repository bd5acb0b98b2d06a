"""The pipeline: statistics -> metrics -> spectra -> widths and ranks -> factors -> absorbed factors. Values in, out.

For each targeted weight W, find W' of rank k that minimizes ``tr((W - W')^T row (W - W') column)``, the loss to second
order if row and column come from gradients and activations; choose all k together so that the summed minimum is least
under one budget of stored parameters; then fold the trained bypass in by the same truncation. Where layers share
neurons, how many of those stay is chosen with the ranks, by the same loss (:mod:`lora_svd.neurons`).

Weights come as functions, so that one dense float64 matrix is in memory at a time, whatever the base stores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .allocation import Allocation, Choice, LayerShape, allocate, given_ranks
from .decompositions import DECOMPOSITIONS, Factors, scattered
from .errors import LoraSVDError, in_module
from .inputs import CompressionSettings, LayerInput, layer_metrics, narrow, narrow_units, on_cpu, whole_metrics
from .neurons import GroupWeights, NeuronGroup, refit, width_spectra, widths

T = TypeVar("T")
_HEADS_GAIN = 0.01  # of the predicted loss, from which heads go


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
    possible = widths(given.units, 1 if given.group.heads else settings.rank_multiple)
    elimination = given.eliminated(possible[0])
    choices = []
    for width, error, spectra in width_spectra(given, elimination, possible):
        neurons = None if width == given.units else elimination.kept(width, given.units)
        shapes = {name: layer.shape for name, layer in narrow(layers, given.group, neurons).items()}
        choices.append(Choice(neurons, error, spectra, shapes, heads=bool(given.group.heads)))
    return choices


def best_neurons(
    layers: Mapping[str, LayerInput], group: NeuronGroup, width: int, settings: CompressionSettings
) -> Tensor:
    """The neurons or heads of a group that stay at a width, ascending."""
    consumer = layers[group.consumer]
    with in_module(group.consumer):
        metrics = layer_metrics(group.consumer, consumer, settings).definite
        given = GroupWeights(group, {group.consumer: consumer.weight()}, {group.consumer: metrics})
        return given.eliminated(width).kept(width, given.units)


def choose_size(choices: Mapping[str, list[Choice]], param_ratio: float, settings: CompressionSettings) -> Allocation:
    """Kept ranks by layer, the full one means dense, and the neurons of the groups that lose some.

    Heads go where that is predicted to be better by 1 % of the loss: a head is a larger change than one that the second
    order describes, and what it does on other text was not observed.
    """
    allocated = partial(
        allocate,
        param_ratio=param_ratio,
        allocation=settings.allocation,
        factor_format=settings.factor_format,
        rank_multiple=settings.rank_multiple,
    )
    found = allocated({name: of[-1:] if of[-1].heads else of for name, of in choices.items()})
    if not any(of[-1].heads for of in choices.values()):
        return found
    with_heads = allocated(choices)
    return with_heads if with_heads.error < (1 - _HEADS_GAIN) * found.error else found


def given_size(
    units: Mapping[str, Mapping[str, LayerInput]],
    groups: Mapping[str, NeuronGroup],
    ranks: Mapping[str, int],
    widths: Mapping[str, int],
    param_ratio: float,
    settings: CompressionSettings,
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Kept ranks by layer, and the neurons of the groups that lose some, of a size that the user gave.

    Raises:
        LoraSVDError: a width is none of a group, or more than it has; or as :func:`.allocation.given_ranks`.
    """
    shapes = _shapes(units)
    _check_widths(widths, groups, shapes)
    neurons = {name: best_neurons(units[name], groups[name], width, settings) for name, width in widths.items()}
    kept = _shapes(narrow_units(units, groups, neurons))
    return given_ranks(ranks, kept, param_ratio, settings.factor_format, of=shapes), neurons


def _shapes(units: Mapping[str, Mapping[str, LayerInput]]) -> dict[str, LayerShape]:
    return {name: layer.shape for of in units.values() for name, layer in of.items()}


def _check_widths(
    widths: Mapping[str, int], groups: Mapping[str, NeuronGroup], shapes: Mapping[str, LayerShape]
) -> None:
    """Raise if a width that the user gave is none of a group, or more than it has."""
    for name, width in widths.items():
        if name not in groups:
            raise LoraSVDError(
                f"compact_widths: got {width} for {name}, which takes no neurons or heads that other targeted layers "
                f"make one by one; expected some of {sorted(groups)}"
            )
        groups[name].check_width(width, shapes[name].in_features)


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
    return refit(weight, whole_metrics(name, layer, settings).definite.column, layer.columns)


def trained_weight(name: str, layer: LayerInput, settings: CompressionSettings) -> Tensor:
    """``W + (left right - W_k)``, (out, in), float64: the weight and what training has added to its truncation W_k, to
    the rank and the neurons of the factors."""
    weight, trained = layer.weight(), layer.trained
    if trained is None:
        return weight
    before = replace(layer, rows=on_cpu(trained.rows), columns=on_cpu(trained.columns))
    truncated = _narrowed(name, before, weight, settings)
    if trained.rank < min(truncated.shape):
        metrics = layer_metrics(name, before, settings).definite
        truncated = DECOMPOSITIONS[settings.decomposition].factorize(truncated, metrics, trained.rank).product()
    change = trained.product().cpu().double() - truncated
    return weight + scattered(change, weight.shape, before.rows, before.columns)


def absorb(name: str, layer: LayerInput, factors: Factors, bypass: Factors, settings: CompressionSettings) -> Factors:
    """The best approximation of ``W_k + s B A`` at the rank of the factors, in the layer's metrics: the bypass at no
    parameters. A bypass that is zero leaves the factors as they are."""
    if not (bool(bypass.left.any()) and bool(bypass.right.any())):
        return factors
    with in_module(name):
        metrics = layer_metrics(name, layer, settings).definite
        return DECOMPOSITIONS[settings.decomposition].absorb(factors, bypass, metrics)


def _progress(layers: Mapping[str, T], label: str) -> Iterable[tuple[str, T]]:
    return tqdm(layers.items(), desc=label, unit="layer", leave=False, delay=2)
