"""What a run of ``lora-svd compress`` found: the closing table, ``report.json``, and the numbers of the model card."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from . import __version__
from .compact import ParameterReport


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that determine the numbers."""
    hosts = ("peft", "transformers", "torch", "accelerate")
    return {"lora-svd": __version__, "python": platform.python_version(), **{name: version(name) for name in hosts}}


@dataclass(frozen=True)
class RunReport:
    """Everything a finished run reports.

    Attributes:
        model: what was compressed, as the recipe names it.
        dense_bytes: of the model as loaded, in the same dtype as the compact one.
        size: of the compact model.
        perplexity_dense: of the model as loaded; see ``lora_svd.evaluation.perplexity``.
        perplexity_compact: of the compact model in memory.
        perplexity_reloaded: of the saved compact model, measured by a new process.
        perplexity_tokens: tokens that each perplexity is the mean over.
        window: tokens in one evaluation window.
        seconds: wall time by phase, in the order they ran.
        recipe: the values that were set, by field name.
        sketched: the layers that kept a sketch of a Gram matrix (``statistics_limit``), and their share of the
            targeted parameters.
        versions: of what produced the numbers.
    """

    model: str
    dense_bytes: int
    size: ParameterReport
    perplexity_dense: float
    perplexity_compact: float
    perplexity_reloaded: float
    perplexity_tokens: int
    window: int
    seconds: dict[str, float]
    recipe: dict[str, Any]
    sketched: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=installed_versions)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """What was measured: a heading, then name, dense, compact, their ratio."""
        size, share = self.size, f"{sum(self.sketched.values()):.4f} of targeted parameters"
        return [
            ("", "dense", "compact", "compact / dense"),
            _row("parameters", size.dense_parameters, size.parameters, "model_param_ratio"),
            _row("targeted parameters", size.dense_targeted_parameters, size.targeted_parameters, "param_ratio"),
            _row("bytes", self.dense_bytes, size.bytes, ""),
            ("perplexity", f"{self.perplexity_dense:.3f}", f"{self.perplexity_compact:.3f}", ""),
            ("perplexity, reloaded", "", f"{self.perplexity_reloaded:.3f}", ""),
            *([("sketched statistics", "", f"{len(self.sketched)} layers", share)] if self.sketched else []),
        ]

    def table(self) -> str:
        """The closing table, plain text that is a Markdown table as well."""
        rows = self.rows()
        rows += [(f"seconds: {phase}", "", f"{seconds:.1f}", "") for phase, seconds in self.seconds.items()]
        rows += [("seconds: total", "", f"{sum(self.seconds.values()):.1f}", "")]
        return markdown_table(rows)

    def to_json(self) -> str:
        """All fields but the single layers' sizes, with both ratios, indented."""
        values = dataclasses.asdict(self)
        del values["size"]["layers"]
        values["size"] |= {"param_ratio": self.size.param_ratio, "model_param_ratio": self.size.model_param_ratio}
        return json.dumps(values, indent=2) + "\n"


def _row(name: str, dense: int, compact: int, ratio_name: str) -> tuple[str, str, str, str]:
    return name, f"{dense:,}", f"{compact:,}", f"{ratio_name} {compact / dense:.4f}".strip()


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the heading; the first column is left aligned, the others right."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ("-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:]))
    return "\n".join(_line(row, widths) for row in (rows[0], rule, *rows[1:]))


def _line(row: Sequence[str], widths: list[int]) -> str:
    cells = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
    cells[0] = row[0].ljust(widths[0])
    return "| " + " | ".join(cells) + " |"
