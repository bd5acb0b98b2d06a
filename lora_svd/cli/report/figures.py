"""The figures of the report."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from ...analysis.plots import depth_map, grouped_bar_figure, line_figure
from ...analysis.summary import depth_and_projection
from .data import ReportData
from .trained import LayerSummary, TrainingSummary

FIGURES = ("sizes", "ranks", "neurons", "spectra", "importance", "loss", "size", "bytes")


def draw_figures(data: ReportData) -> dict[str, Figure]:
    """All figures by name, in the order of ``FIGURES``. Figures without data are skipped."""
    drawn = {
        "sizes": _sizes(data),
        "ranks": _ranks(data.training.layers),
        "neurons": _neurons(data.training),
        "spectra": _spectra(data.training.layers),
        "importance": _importance(data.training.layers),
        "loss": _loss(data),
        "size": _size(data),
        "bytes": _bytes(data),
    }
    return {name: figure for name in FIGURES if (figure := drawn[name]) is not None}


def _sizes(data: ReportData) -> Figure | None:
    points = {ratio: measured.value for ratio, measured in data.perplexities.items() if ratio is not None}
    if len(points) < 2:
        return None
    ratios = sorted(points)
    return line_figure(
        {
            "compact": (ratios, [points[ratio] for ratio in ratios]),
            "dense, not trained on the text": ([1.0], [data.perplexities[None].value]),
        },
        title="Perplexity against size",
        x_label="param_ratio (kept / targeted parameters)",
        y_label="perplexity",
        marks={"trained size": data.run.size.param_ratio},
    )


def _ranks(layers: Mapping[str, LayerSummary]) -> Figure | None:
    if not layers:
        return None
    shares = {name: layer.kept_share for name, layer in layers.items()}
    return depth_map(shares, title="Kept rank", label="kept rank / full rank (1 = dense)")


def _neurons(training: TrainingSummary) -> Figure | None:
    if not (training.layers and training.neurons):
        return None
    return depth_map(training.neurons, title="Kept neurons and heads", label="kept / all (1 = none is gone)")


def _spectra(layers: Mapping[str, LayerSummary]) -> Figure | None:
    if not layers:
        return None
    chosen = examples(layers)
    series = {
        f"{name} (rank {layer.rank} of {layer.shape.full_rank})": _positive(layer) for name, layer in chosen.items()
    }
    return line_figure(
        series,
        title="Weighted spectra and where they are cut",
        x_label="index",
        y_label="squared singular value",
        log_y=True,
        marks={key: layer.rank for key, layer in zip(series, chosen.values(), strict=True)},
    )


def examples(layers: Mapping[str, LayerSummary]) -> dict[str, LayerSummary]:
    """The layers with the highest, the median and the lowest kept share, dense layers aside where there are others."""
    cut = [name for name, layer in layers.items() if layer.kept_share < 1] or list(layers)
    ordered = sorted(cut, key=lambda name: layers[name].kept_share, reverse=True)
    return {name: layers[name] for name in (ordered[0], ordered[len(ordered) // 2], ordered[-1])}


def _positive(layer: LayerSummary) -> tuple[list[int], list[float]]:
    """Index and value of what a logarithmic axis can show: beyond float64's reach of the largest is rounding."""
    values = layer.spectrum.tolist()
    kept = [(index, value) for index, value in enumerate(values, 1) if value > 1e-16 * values[0]]
    return [index for index, _ in kept], [value for _, value in kept]


def _importance(layers: Mapping[str, LayerSummary]) -> Figure | None:
    totals, discarded = defaultdict(float), defaultdict(float)
    for name, layer in layers.items():
        depth, _ = depth_and_projection(name)
        if depth is not None:
            totals[depth] += layer.importance
            discarded[depth] += layer.discarded
    if len(totals) < 2:
        return None
    depths = sorted(totals)
    return line_figure(
        {
            "whole": (depths, [totals[depth] for depth in depths]),
            "discarded": (depths, [discarded[depth] or math.nan for depth in depths]),
        },
        title="Importance by depth",
        x_label="depth",
        y_label="sum of squared singular values",
        log_y=True,
    )


def _loss(data: ReportData) -> Figure | None:
    series: dict[str, Any] = {}
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        entries = [(entry["step"], entry[key]) for entry in data.training.log if key in entry]
        if entries:
            series[label] = tuple(zip(*entries, strict=True))
    if not series:
        return None
    marks = {"factorized": data.training.schedule.warmup_end} if data.training.layers else {}
    return line_figure(series, title="Loss", x_label="optimizer step", y_label="loss", marks=marks)


def _size(data: ReportData) -> Figure | None:
    if not data.training.layers:
        return None
    x, y = [0.0], [1.0]
    for step in range(data.training.steps):
        budget = data.training.schedule.budget(step)
        if budget not in (None, y[-1]):
            x += [step + 1, step + 1]
            y += [y[-1], budget]
    series = {"size": ([*x, data.training.steps], [*y, y[-1]])}
    return line_figure(series, title="Size", x_label="optimizer step", y_label="param_ratio")


def _bytes(data: ReportData) -> Figure:
    groups = {"dense": data.dense.bytes_by_part, "compact": data.compact.bytes_by_part}
    shown = {group: {name: float(count) for name, count in parts.items() if count} for group, parts in groups.items()}
    return grouped_bar_figure(shown, title="Bytes by part of the model", label="bytes")
