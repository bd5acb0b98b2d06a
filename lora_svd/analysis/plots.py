"""Figures in one style: readable on a phone (4.6 inches wide at 10 points), told apart without colour. No pyplot state.

Colours are Okabe and Ito's (2008) and cividis, which colour-blind readers see alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from ..errors import LoraSVDError
from .summary import depth_and_projection

WIDTH = 4.6  # inches
PNG_DPI = 200
# Okabe-Ito without the yellow, which is hard to see on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_MARKERS, _DASHES = "osD^vPX", ("-", "--", "-.", ":")
_GREY = "0.35"
_MAX_MARKERS = 12


def line_figure(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    marks: Mapping[str, float] | None = None,
) -> Figure:
    """One line a series, told apart by colour, dashes and markers.

    Args:
        series: name -> (x, y), of equal length. With one series the legend is left out.
        title: above the axes.
        x_label: with the unit.
        y_label: with the unit.
        log_x: logarithmic x axis; what is not positive is left out of it.
        log_y: the same for y.
        marks: labelled vertical lines at these x; a mark with the name of a series has its colour and no label.

    Raises:
        LoraSVDError: there is no series, or x and y of one differ in length.
    """
    _check_any(series, "series")
    figure, axes = _figure(title, height=3.5)
    colors = dict(zip(series, cycle(COLORS)))
    styles = zip(cycle(_MARKERS), cycle(_DASHES))
    for (name, (x, y)), (marker, dash) in zip(series.items(), styles, strict=False):
        if len(x) != len(y):
            raise LoraSVDError(f"series {name!r}: {len(x)} values of x and {len(y)} of y, expected as many")
        every = max(1, math.ceil(len(x) / _MAX_MARKERS))
        axes.plot(x, y, dash, color=colors[name], marker=marker, markevery=every, markersize=5, label=_text(name))
    axes.set_xscale("log" if log_x else "linear")
    axes.set_yscale("log" if log_y else "linear")
    if not log_x and all(float(value).is_integer() for x, _ in series.values() for value in x):
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    for name, x in (marks or {}).items():
        _draw_mark(axes, name, x, colors.get(name))
    axes.set_xlabel(_text(x_label))
    axes.set_ylabel(_text(y_label))
    axes.grid(color="0.9", linewidth=0.8)
    if len(series) > 1:
        _legend(figure, columns=1 if max(map(len, series)) > 20 else 3, handlelength=3)
    return figure


def depth_map(values: Mapping[str, float], *, title: str, label: str) -> Figure:
    """Values by module name as a heat map: a row for each projection, a column for each depth.

    Depth is the first integer in a module's name, the projection its last component, or as many of the last ones as
    tell the modules apart. A module without a depth has the last column; a cell without a module is hatched.

    Args:
        values: by module name; NaN is shown as no module.
        title: above the map.
        label: of the colour bar, with the unit.

    Raises:
        LoraSVDError: there are no values.
    """
    _check_any(values, "values")
    cells = _cells(values)
    depths = sorted({depth for depth, _ in cells.values() if depth is not None})
    columns = [*depths, *([None] if any(depth is None for depth, _ in cells.values()) else [])]
    rows = list(dict.fromkeys(row for _, row in cells.values()))
    grid = [[math.nan] * len(columns) for _ in rows]
    for name, (depth, row) in cells.items():
        grid[rows.index(row)][columns.index(depth)] = values[name]
    figure, axes = _figure(title, height=1.7 + 0.27 * len(rows))
    axes.set_facecolor("0.92")
    axes.patch.set(hatch="///", edgecolor="0.7")
    image = axes.pcolormesh(grid, cmap="cividis", edgecolor="white", linewidth=0.4)
    axes.invert_yaxis()
    axes.set_yticks([index + 0.5 for index in range(len(rows))], [_text(row) for row in rows])
    step = math.ceil(len(columns) / 12)
    shown = [index for index, depth in enumerate(columns) if depth is None or index % step == 0]
    names = ["none" if columns[index] is None else str(columns[index]) for index in shown]
    axes.set_xticks([index + 0.5 for index in shown], names)
    axes.set_xlabel("depth")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, location="bottom", aspect=35, pad=0.02)
    bar.set_label(_text(label))
    bar.ax.tick_params(labelsize=9)
    return figure


def bar_figure(values: Mapping[str, float], *, title: str, label: str) -> Figure:
    """Horizontal bars with their values.

    Args:
        values: by name, from above to below.
        title: above the axes.
        label: of the value axis, with the unit.

    Raises:
        LoraSVDError: there are no values.
    """
    return grouped_bar_figure({"": values}, title=title, label=label)


def grouped_bar_figure(groups: Mapping[str, Mapping[str, float]], *, title: str, label: str) -> Figure:
    """As :func:`bar_figure`, one bar of each group beside that of the same name in the others.

    Args:
        groups: group -> values by name; a name that a group lacks has no bar in it.
        title: above the axes.
        label: of the value axis, with the unit.

    Raises:
        LoraSVDError: there are no values.
    """
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    _check_any(names, "values")
    figure, axes = _figure(title, height=1.2 + 0.1 * len(names) + 0.24 * len(names) * len(groups))
    thickness = 0.8 / len(groups)
    for index, ((group, values), color) in enumerate(zip(groups.items(), cycle(COLORS))):
        places = [names.index(name) + (index - (len(groups) - 1) / 2) * thickness for name in values]
        bars = axes.barh(places, list(values.values()), 0.92 * thickness, color=color, label=_text(group))
        axes.bar_label(bars, fmt=_short, padding=3, fontsize=9, color="black")
    axes.set_yticks(range(len(names)), [_text(name) for name in names])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.16)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    axes.set_xlabel(_text(label))
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    if len(groups) > 1:
        _legend(figure, columns=3)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure to ``path``, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=PNG_DPI)


def _figure(title: str, *, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set_title(_text(title), fontsize=11, loc="left", wrap=True)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    return figure, axes


def _legend(figure: Figure, *, columns: int, **options: Any) -> None:
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9, **options)


def _short(value: float) -> str:
    """Three or four digits, with an SI prefix from a thousand on."""
    return f"{value:.3g}" if abs(value) < 1000 else EngFormatter(places=1, sep="")(value)


def _draw_mark(axes: Axes, name: str, x: float, color: Any) -> None:
    axes.axvline(x, color=color or _GREY, linewidth=1.2, linestyle=(0, (2, 2)))
    if color is None:
        place = {"xy": (x, 0.02), "xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(_text(name), xytext=(3, 0), rotation=90, fontsize=9, color=_GREY, va="bottom", **place)


def _cells(names: Iterable[str]) -> dict[str, tuple[int | None, str]]:
    """(depth, row) by module name, no two alike."""
    parts = {}
    for name in names:
        components = name.split(".")
        depth, _ = depth_and_projection(name)
        if depth is not None:
            components[next(i for i, part in enumerate(components) if part.isdecimal())] = "*"
        parts[name] = (depth, components)
    length, longest = 1, max(len(components) for _, components in parts.values())
    while True:
        cells = {name: (depth, ".".join(components[-length:])) for name, (depth, components) in parts.items()}
        if len(set(cells.values())) == len(cells) or length == longest:
            return cells
        length += 1


def _check_any(values: Any, what: str) -> None:
    if not values:
        raise LoraSVDError(f"{what}: empty, expected at least one to draw")


def _text(text: str) -> str:
    """Text as it stands: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")
