"""An analysis as tables, JSON and figures: what ``lora-svd analyze`` shows."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LoraSVDError
from .summary import SPECTRA, LayerAnalysis, by_depth, by_projection
from .tables import installed_versions, markdown_table

_NUM_EXTREMES = 5
_GRID = [step / 50 for step in range(51)]
_RANKS = {"stable_rank": "stable rank", "effective_rank": "effective rank", "effective_rank_share": "/ full rank"}
_ENERGIES = {f"rank_{percent}_share": f"{percent} % energy at" for percent in (90, 95, 99)}
_ENTRIES = {"variance": "variance", "kurtosis": "kurtosis", "sparsity": "sparsity", "outliers": "outliers"}


@dataclass(frozen=True)
class AnalysisReport:
    """The analysis of one model and, besides, of the one that it was made from.

    Attributes:
        model: what was analyzed, as it was named.
        layers: by module name.
        before: name and layers of the other model.
    """

    model: str
    layers: Mapping[str, LayerAnalysis]
    before: tuple[str, Mapping[str, LayerAnalysis]] | None = None

    def __post_init__(self) -> None:
        if self.before is not None and not self.layers.keys() & self.before[1].keys():
            raise LoraSVDError(f"before: {self.before[0]} has no layer in common with {self.model}")

    def text(self) -> str:
        """Tables by projection, and the layers with the lowest and the highest effective rank."""
        parts = [] if self.before is None else [_text(*self.before)]
        return "\n\n".join([*parts, _text(self.model, self.layers)])

    def to_json(self, *, spectra: bool = False) -> str:
        """Everything by layer, and the means by depth and projection; with ``spectra`` all singular values as well."""
        values = {"model": self.model, "versions": installed_versions(), **_plain(self.layers, spectra=spectra)}
        if self.before is not None:
            values["before"] = {"model": self.before[0], **_plain(self.before[1], spectra=spectra)}
        return json.dumps(values, indent=2) + "\n"

    def write_figures(self, folder: Path) -> list[Path]:
        """PNG files into ``folder``, which is made: energy against rank, effective rank by depth and projection,
        stable rank by depth, kurtosis. Returns their paths."""
        from .plots import bar_figure, depth_map, line_figure, save_png  # matplotlib takes its time to load

        x_label, y_label = "rank / full rank", "share of the energy kept"
        figures = {
            "energy": line_figure(
                self._energy_by_spectrum(), title="Energy kept, mean over layers", x_label=x_label, y_label=y_label
            ),
            "energy_by_projection": line_figure(
                {name: _energy_kept(group, "weight") for name, group in _groups(self.layers).items()},
                title="Energy of the weights kept, by projection",
                x_label=x_label,
                y_label=y_label,
            ),
            "kurtosis": bar_figure(
                {name: means["kurtosis"] for name, means in by_projection(self.layers).items()},
                title="Excess kurtosis of the weights (0: normal)",
                label="mean over layers",
            ),
        }
        if stable_ranks := self._stable_rank_by_depth():
            figures["stable_rank"] = line_figure(
                stable_ranks, title="Stable rank of the weights", x_label="depth", y_label="stable rank", log_y=True
            )
        for name, layers in self._by_spectrum().items():
            figures[f"effective_rank_{name.replace(' ', '_')}"] = depth_map(
                {layer.name: layer.spectra()[name.split()[0]].numbers()["effective_rank_share"] for layer in layers},
                title=f"Effective rank: {name}",
                label="effective rank / full rank",
            )
        paths = {folder / f"{name}.png": figure for name, figure in figures.items()}
        for path, figure in paths.items():
            save_png(figure, path)
        return list(paths)

    def _by_spectrum(self) -> dict[str, list[LayerAnalysis]]:
        """The layers that have each spectrum; "weight before" are those of the other model."""
        layers = {name: [layer for layer in self.layers.values() if name in layer.spectra()] for name in SPECTRA}
        if self.before is not None:
            layers["weight before"] = list(self.before[1].values())
        return {name: some for name, some in layers.items() if some}

    def _energy_by_spectrum(self) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
        return {name: _energy_kept(layers, name.split()[0]) for name, layers in self._by_spectrum().items()}

    def _stable_rank_by_depth(self) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
        series = {}
        for name, group in _groups(self.layers).items():
            means = by_depth({layer.name: layer for layer in group if layer.depth is not None})
            if means:
                depths = [depth for depth in means if depth is not None]
                series[name] = (depths, [means[depth]["weight.stable_rank"] for depth in depths])
        return series


def _groups(layers: Mapping[str, LayerAnalysis]) -> dict[str, list[LayerAnalysis]]:
    """Layers by projection."""
    groups: dict[str, list[LayerAnalysis]] = {}
    for layer in layers.values():
        groups.setdefault(layer.projection, []).append(layer)
    return groups


def _energy_kept(layers: Sequence[LayerAnalysis], name: str) -> tuple[Sequence[float], Sequence[float]]:
    """Shares of the full rank and the energy kept there, mean over layers."""
    spectra = [layer.spectra()[name] for layer in layers]
    return _GRID, [statistics.fmean(spectrum.energy_kept(share) for spectrum in spectra) for share in _GRID]


def _plain(layers: Mapping[str, LayerAnalysis], *, spectra: bool) -> dict[str, Any]:
    return {
        "by_projection": by_projection(layers),
        "by_depth": by_depth(layers),
        "layers": {name: _plain_layer(layer, spectra=spectra) for name, layer in layers.items()},
    }


def _plain_layer(layer: LayerAnalysis, *, spectra: bool) -> dict[str, Any]:
    """A layer as JSON values; with ``spectra`` all singular values as well."""
    plain: dict[str, Any] = {
        "depth": layer.depth,
        "projection": layer.projection,
        "shape": list(layer.shape),
        "rank": layer.rank,
        "entries": dataclasses.asdict(layer.entries),
    }
    for name, spectrum in layer.spectra().items():
        plain[name] = spectrum.numbers() | ({"singular_values": spectrum.singular_values.tolist()} if spectra else {})
    return plain


def _text(model: str, layers: Mapping[str, LayerAnalysis]) -> str:
    names = [name for name in SPECTRA if any(name in layer.spectra() for layer in layers.values())]
    shares = ", ".join(f"{name} {_mean_share(layers, name):.3f}" for name in names)
    blocks = [f"{model}: {len(layers)} linear layers\nrank for 90 % of the energy / full rank, mean: {shares}"]
    blocks += [f"{name}, means by projection\n{_table(layers, name)}" for name in names]
    ranked = sorted(layers.values(), key=lambda layer: layer.weight.effective_rank / layer.weight.size)
    for word, some in (("lowest", ranked[:_NUM_EXTREMES]), ("highest", ranked[: -_NUM_EXTREMES - 1 : -1])):
        lines = [f"  {layer.weight.effective_rank / layer.weight.size:.3f}  {layer.name}" for layer in some]
        blocks.append("\n".join([f"{word} effective rank of a weight / full rank", *lines]))
    return "\n\n".join(blocks)


def _mean_share(layers: Mapping[str, LayerAnalysis], name: str) -> float:
    spectra = (layer.spectra().get(name) for layer in layers.values())
    return statistics.fmean(spectrum.rank_90 / spectrum.size for spectrum in spectra if spectrum)


def _table(layers: Mapping[str, LayerAnalysis], spectrum: str) -> str:
    groups = _groups(layers)
    columns = {f"{spectrum}.{name}": title for name, title in (_RANKS | _ENERGIES).items()}
    columns |= _ENTRIES if spectrum == "weight" else {}
    rows = [("projection", "layers", "out x in", *columns.values())]
    for projection, means in by_projection(layers).items():
        shapes = {layer.shape for layer in groups[projection]}
        shape = "{} x {}".format(*shapes.pop()) if len(shapes) == 1 else "several"
        cells = (f"{means[name]:.3g}" if name in means else "" for name in columns)
        rows.append((projection, str(len(groups[projection])), shape, *cells))
    return markdown_table(rows)
