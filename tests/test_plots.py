"""What the figures show is what they were given."""

from __future__ import annotations

import math
from pathlib import Path

import numpy
import pytest
from matplotlib.collections import QuadMesh
from PIL import Image

from lora_svd.analysis.plots import bar_figure, depth_map, grouped_bar_figure, line_figure, save_png
from lora_svd.errors import LoraSVDError


def texts(axes) -> list[str]:
    return [label.get_text() for label in axes]


class TestLineFigure:
    def test_lines_differ_in_more_than_colour(self):
        series = {f"s{index}": ([1.0, 2.0], [float(index), 3.0]) for index in range(7)}
        (axes,) = line_figure(series, title="t", x_label="x", y_label="y").axes
        assert [tuple(line.get_ydata()) for line in axes.lines] == [(float(index), 3.0) for index in range(7)]
        assert len({line.get_color() for line in axes.lines}) == 7
        assert len({(line.get_linestyle(), line.get_marker()) for line in axes.lines}) == 7

    def test_a_mark_has_a_label_or_the_colour_of_its_series(self):
        figure = line_figure(
            {"a": ([1, 2], [1, 2]), "b": ([1, 2], [2, 1])},
            title="t",
            x_label="x",
            y_label="y",
            log_y=True,
            marks={"b": 1.5, "half": 1.2},
        )
        (axes,) = figure.axes
        _, second, mark, other = axes.lines
        assert (mark.get_xdata()[0], other.get_xdata()[0]) == (1.5, 1.2)
        assert mark.get_color() == second.get_color() != other.get_color()
        assert texts(axes.texts) == ["half"]
        assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "log")
        assert texts(figure.legends[0].get_texts()) == ["a", "b"]

    def test_refuses_x_and_y_of_different_length(self):
        with pytest.raises(LoraSVDError, match="series 'a': 2 values of x and 1 of y"):
            line_figure({"a": ([1, 2], [1])}, title="t", x_label="x", y_label="y")


class TestDepthMap:
    def test_cells_rows_and_columns(self):
        values = {f"model.layers.{i}.mlp.{name}": 10.0 * i + j for i in (0, 1) for j, name in enumerate("ab")}
        figure = depth_map({**values, "lm_head": 7.0}, title="t", label="share")
        axes, bar = figure.axes
        (mesh,) = [artist for artist in axes.collections if isinstance(artist, QuadMesh)]
        nan = math.nan
        numpy.testing.assert_equal(mesh.get_array().filled(nan), [[0, 10, nan], [1, 11, nan], [nan, nan, 7]])
        assert texts(axes.get_yticklabels()) == ["a", "b", "lm_head"]
        assert texts(axes.get_xticklabels()) == ["0", "1", "none"]
        assert bar.get_xlabel() == "share"

    def test_modules_of_the_same_place_get_rows_of_their_own(self):
        names = ["encoder.block.0.q", "decoder.block.0.q", "decoder.block.1.q"]
        axes = depth_map(dict.fromkeys(names, 1.0), title="t", label="l").axes[0]
        assert texts(axes.get_yticklabels()) == ["encoder.block.*.q", "decoder.block.*.q"]

    def test_experts_of_one_layer(self):
        names = [f"layers.{depth}.experts.{expert}.w1" for depth in (0, 1) for expert in (0, 1)]
        axes = depth_map(dict.fromkeys(names, 1.0), title="t", label="l").axes[0]
        assert texts(axes.get_yticklabels()) == ["0.w1", "1.w1"]


class TestBars:
    def test_one_bar_a_value_from_above_to_below(self):
        (axes,) = bar_figure({"head": 1_500_000.0, "MLP": 0.25}, title="t", label="bytes").axes
        assert [bar.get_width() for bar in axes.patches] == [1_500_000.0, 0.25]
        assert axes.yaxis_inverted()
        assert texts(axes.get_yticklabels()) == ["head", "MLP"]
        assert texts(axes.texts) == ["1.5M", "0.25"]

    def test_groups_share_the_places_of_their_names(self):
        groups = {"dense": {"a": 3.0, "b": 2.0}, "compact": {"b": 1.0}}
        figure = grouped_bar_figure(groups, title="t", label="bytes")
        (axes,) = figure.axes
        middle = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
        assert middle == pytest.approx([-0.2, 0.8, 1.2])
        assert texts(figure.legends[0].get_texts()) == ["dense", "compact"]


def test_text_is_no_formula(tmp_path: Path):
    save_png(bar_figure({"$_{": 1.0}, title="$\\frac", label="$^^"), tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_png(tmp_path: Path):
    path = tmp_path / "new" / "map.png"
    save_png(depth_map({"layers.0.a": 1.0, "layers.1.a": 2.0}, title="t", label="l"), path)
    with Image.open(path) as image:
        colors = image.convert("RGB").getcolors(maxcolors=100_000)
        assert image.width == 920
    assert colors is not None
    assert {(0, 34, 78), (254, 232, 56)} <= {color for _, color in colors}  # both ends of cividis


@pytest.mark.parametrize("draw", [depth_map, bar_figure])
def test_refuses_to_draw_nothing(draw):
    with pytest.raises(LoraSVDError, match="values: empty"):
        draw({}, title="t", label="l")
