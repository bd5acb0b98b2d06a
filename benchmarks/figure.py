"""The figures and the tables of a benchmark, from its results.

    python benchmarks/figure.py benchmarks/language_model.jsonl --texts wikitext2 c4 \
        --tasks arc_easy hellaswag lambada

prints a table for each text and for the mean accuracy over the tasks, and writes a figure for each text beside the
results.

A result is a dict with ``row`` (the method), ``param_ratio`` (1.0: not compressed), ``seed``, and values by the name of
what was measured: a perplexity for a text, a share of right answers for a task of ``tasks/``. What one result lacks is
left out. Results of a row at a size are averaged.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import cycle
from pathlib import Path
from statistics import fmean, stdev
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

Result = dict[str, Any]

DENSE = "dense"
MEAN = "mean accuracy"
LIMIT = 100.0  # times the dense perplexity: far from a usable model
TICKS = (0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 7, 10, 20, 30, 50, 100)
# Okabe-Ito, without the yellow, which is hard to see on white
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
OTHER_DASHES = ((0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
MARKERS = "osDvPX<>*hpd8"
ARROW = {"marker": "^", "markersize": 9, "linestyle": "none"}


def draw(results: list[Result], text: str, path: Path) -> None:
    """Draw ``plot(results, text)`` to a PNG file, 1800 pixels wide to be shown at 900."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plot(results, text).savefig(path, format="png", dpi=200)


def plot(results: list[Result], text: str) -> Figure:
    """Perplexity on ``text``, in multiples of the dense model's, against param_ratio; one line per row.

    A point is the mean over seeds, its error bar their minimum and maximum. Points above ``LIMIT`` are arrows at the
    upper edge; rows without any below it are only named. A row keeps its color and marker in the figures of all texts
    of the same results. Rows whose names start with "ours" are thick and solid.

    Raises:
        ValueError: the results have no perplexity of the dense model on ``text``.
    """
    dense = _dense(results, text)
    # styles of all rows, those without this text included
    styles = _styles([row for row in _rows(results) if row != DENSE])
    lines = {row: _line_points(results, row, text, dense) for row in styles}
    sizes = sorted({size for points in lines.values() for size in points} or {1.0})
    span = sizes[-1] - sizes[0] or 1.0
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(1, color="0.3", linewidth=1.2, linestyle=(0, (8, 4)), label=f"{DENSE}, perplexity {dense:.4g}")
    above: list[float] = []
    nowhere = [row for row, points in lines.items() if points and min(map(fmean, points.values())) > LIMIT]
    for row, points in lines.items():
        if points and row not in nowhere:
            _draw_line(axes, row, points, styles[row])
            above += _draw_arrows(axes, points, styles[row]["color"], above, step=0.014 * span)
    _scale(axes, any_above=bool(above))
    axes.set_xlim(sizes[0] - 0.08 * span, sizes[-1] + 0.08 * span)
    axes.set_xticks(sizes)
    axes.set_xlabel("param_ratio (kept share of the targeted parameters)", fontsize=11)
    axes.set_ylabel(f"{text} perplexity, times dense", fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    if above:
        handles.append(Line2D([], [], color="0.3", **ARROW))
        labels.append(f"more than {LIMIT:g} times dense")
    if nowhere:
        handles.append(Line2D([], [], linestyle="none"))
        labels.append(fill(f"more than {LIMIT:g} at every size: {'; '.join(nowhere)}", 38))
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9.5, handlelength=3.4)
    return figure


def table(results: list[Result], columns: list[str]) -> str:
    """A GitHub table: a line for each row, a column for each of ``columns`` at each param_ratio, the largest first.

    An entry is the mean over seeds, with the sample standard deviation and the number of seeds if there are several:
    ``28.45 ± 0.12, n=3``. Behind a perplexity its ratio to the dense model's follows in parentheses; ``MEAN`` and the
    names of tasks in ``tasks/`` are accuracies, all others perplexities.

    Raises:
        ValueError: the results have no perplexity of the dense model for one of the columns.
    """
    cells = [(name, size) for name in columns for size in _sizes(results, None, name)]
    lines = ["| row | " + " | ".join(f"{name} {size}" for name, size in cells) + " |"]
    lines.append("|---|" + "---:|" * len(cells))
    for row in _rows(results):
        entries = [_entry(results, row, size, name) for name, size in cells]
        lines.append(f"| {row} | " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n"


def _entry(results: list[Result], row: str, size: float, name: str) -> str:
    values = _values(results, row, size, name)
    if not values:
        return "-"
    accuracy = name == MEAN or (Path(__file__).parent / "tasks" / f"{name}.yaml").exists()
    digits = 3 if accuracy else 2
    entry = _number(fmean(values), digits)
    if len(values) > 1:
        spread = stdev(values) if all(map(math.isfinite, values)) else math.inf
        entry += f" ± {_number(spread, digits)}, n={len(values)}"
    return entry if accuracy else f"{entry} ({_number(fmean(values) / _dense(results, name), 3)})"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if value < 1000 else f"{value:,.0f}"


def _rows(results: list[Result]) -> list[str]:
    """Names of rows in the order of their first result."""
    return list(dict.fromkeys(result["row"] for result in results))


def _sizes(results: list[Result], row: str | None, name: str) -> list[float]:
    """Every param_ratio at which ``name`` was measured, in one row or in any, the largest first."""
    found = {result["param_ratio"] for result in results if name in result and row in (None, result["row"])}
    return sorted(found, reverse=True)


def _values(results: list[Result], row: str, size: float, name: str) -> list[float]:
    """What the seeds gave."""
    return [
        result[name] for result in results if name in result and (result["row"], result["param_ratio"]) == (row, size)
    ]


def _dense(results: list[Result], name: str) -> float:
    values = _values(results, DENSE, 1.0, name)
    if not values:
        raise ValueError(
            f"no result of row {DENSE!r} at param_ratio 1.0 has {name!r}, to which the others are compared: measure it"
        )
    return fmean(values)


def _styles(rows: list[str]) -> dict[str, dict[str, Any]]:
    """Line properties by row; color, marker and dashes differ, so that any two of them tell the rows apart."""
    colors, other_colors = cycle(COLORS), cycle(COLORS[::-1])
    markers, dashes = cycle(MARKERS), cycle(OTHER_DASHES)
    styles = {}
    for row in rows:
        style: dict[str, Any] = {"marker": next(markers), "markeredgecolor": "white", "markeredgewidth": 0.6}
        if row.startswith("ours"):
            style |= {"color": next(colors), "linewidth": 2.8, "linestyle": "-", "markersize": 8.5, "zorder": 3}
        else:
            style |= {"color": next(other_colors), "linewidth": 1.3, "linestyle": next(dashes), "markersize": 7}
        styles[row] = style
    return styles


def _line_points(results: list[Result], row: str, text: str, dense: float) -> dict[float, list[float]]:
    """What the seeds gave, in multiples of ``dense``, by param_ratio."""
    return {size: [value / dense for value in _values(results, row, size, text)] for size in _sizes(results, row, text)}


def _draw_line(axes: Axes, row: str, points: dict[float, list[float]], style: dict[str, Any]) -> None:
    means = {size: fmean(values) for size, values in points.items()}
    # infinity has no place even outside the axes; a line to a very large value leaves them all the same
    axes.plot(list(means), [min(mean, 1e3 * LIMIT) for mean in means.values()], label=row, **style)
    several = [size for size, values in points.items() if len(values) > 1 and means[size] <= LIMIT]
    if several:
        below = [means[size] - min(points[size]) for size in several]
        over = [max(points[size]) - means[size] for size in several]
        heights = [means[size] for size in several]
        axes.errorbar(
            several, heights, [below, over], color=style["color"], linestyle="none", elinewidth=1.4, capsize=4
        )


def _draw_arrows(
    axes: Axes, points: dict[float, list[float]], color: str, taken: list[float], *, step: float
) -> list[float]:
    """Arrows for what lies above the upper edge, beside those that are there (``taken``); returns their sizes."""
    above = [size for size, values in points.items() if fmean(values) > LIMIT]
    for size in above:
        place = taken.count(size)
        shift = step * ((place + 1) // 2) * (-1) ** place  # 0, -1, 1, -2, 2 steps
        axes.plot([size + shift], [LIMIT], color=color, clip_on=False, **ARROW)
    return above


def _scale(axes: Axes, *, any_above: bool) -> None:
    """A logarithmic scale with plain numbers that fits what is drawn, and a grid behind it."""
    low, high = axes.dataLim.ymin, axes.dataLim.ymax
    axes.set_yscale("log")
    axes.set_ylim(0.95 * min(1, low), LIMIT if any_above else 1.15 * high)
    axes.yaxis.set_major_locator(FixedLocator(TICKS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_axisbelow(True)
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and figures of a benchmark.")
    parser.add_argument("results", type=Path, help="file of JSON lines")
    parser.add_argument("--texts", nargs="+", default=[], help="names of texts: perplexities")
    parser.add_argument("--tasks", nargs="+", default=[], help="names of tasks: accuracies")
    given = parser.parse_args()
    results = [json.loads(line) for line in given.results.read_text(encoding="utf-8").splitlines()]
    for name in given.texts:
        draw(results, name, given.results.with_name(f"{given.results.stem}-{name}.png"))
    for name in given.texts:
        print(table(results, [name]))
    if given.tasks:
        print(table(with_mean(results, given.tasks), [MEAN]))


def with_mean(results: list[Result], tasks: list[str]) -> list[Result]:
    """The results with their mean accuracy over ``tasks``, where all of them were measured."""
    measured = [result for result in results if all(task in result for task in tasks)]
    return [result | {MEAN: fmean(result[task] for task in tasks)} for result in measured]


if __name__ == "__main__":
    main()
