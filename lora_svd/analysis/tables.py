"""Tables in Markdown, and the versions that numbers were made with."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version

from .. import __version__


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that determine the numbers."""
    hosts = ("peft", "transformers", "torch", "accelerate")
    return {"lora-svd": __version__, "python": platform.python_version(), **{name: version(name) for name in hosts}}


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the heading; the first column is left aligned, the others right."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ("-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:]))
    return "\n".join(_line(row, widths) for row in (rows[0], rule, *rows[1:]))


def _line(row: Sequence[str], widths: list[int]) -> str:
    cells = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
    cells[0] = row[0].ljust(widths[0])
    return "| " + " | ".join(cells) + " |"
