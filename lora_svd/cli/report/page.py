"""HTML page of a report: ``page.html`` filled in. Everything that comes from a user or a model is escaped by jinja2."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from tqdm.auto import tqdm

from ...analysis.plots import save_png
from .data import ReportData
from .figures import FIGURES, draw_figures

_TEMPLATES = Environment(
    loader=PackageLoader("lora_svd.cli.report", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(data: ReportData, folder: Path) -> Path:
    """Write ``index.html``, which needs no other file, and its figures as PNG files into ``folder``.

    Those of an earlier report there are replaced.

    Returns:
        Path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        (folder / f"{name}.png").unlink(missing_ok=True)
    for name, figure in tqdm(draw_figures(data).items(), desc="figures", unit="figure", leave=False, delay=2):
        save_png(figure, folder / f"{name}.png")
    page = folder / "index.html"
    page.write_text(render(data, {path.stem: path.read_bytes() for path in folder.glob("*.png")}), encoding="utf-8")
    return page


def render(data: ReportData, figures: Mapping[str, bytes]) -> str:
    """HTML text of the page.

    Args:
        data: of the run.
        figures: PNG files by the names in ``FIGURES``.
    """
    return _TEMPLATES.get_template("page.html").render(
        data=data,
        run=data.run,
        name=Path(data.run.model).name,
        figures={name: base64.b64encode(png).decode() for name, png in figures.items()},
        warnings=[(count, _module(data, text), source, text) for (source, text), count in data.messages.items()],
        sizes=sorted(data.perplexities.items(), key=lambda item: 1.0 if item[0] is None else item[0], reverse=True),
        recipe=yaml.safe_dump(data.run.recipe, sort_keys=False).rstrip(),
    )


def _module(data: ReportData, text: str) -> str:
    """The targeted layer that a message is about."""
    return next((name for name in data.training.layers if text.startswith((f"{name}:", f"{name} "))), "")
