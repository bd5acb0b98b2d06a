"""What a run of ``lora-svd compress`` measured, as the closing table, ``report.json`` and the model card."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import yaml

from ..analysis.tables import installed_versions, markdown_table
from ..compact import ParameterReport
from ..compact.card import compact_card
from ..evaluation import Perplexity

_SECTIONS = Template("""\
## Results

Perplexity: $convention; non-overlapping windows, and the tokens are those that are predicted.
`param_ratio` = parameters kept / original parameters over the weights of the targeted linear layers;
`model_param_ratio` = the same over the whole model.

$table

## Recipe

```yaml
$recipe
```

Versions: $versions.""")


@dataclass(frozen=True)
class RunResults:
    """Everything that a finished run measured.

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
        bos: the token that every window begins with; None: windows begin with the text.
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
    bos: str | None = None
    sketched: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=installed_versions)

    @property
    def convention(self) -> str:
        """What the perplexities depend on besides model and text."""
        return Perplexity(self.perplexity_dense, self.perplexity_tokens, self.window, self.bos).convention

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Rows of the table: a heading, then name, dense, compact, their ratio."""
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

    def model_card(self, folder: Path) -> str:
        """The README.md of the compact model that is saved in ``folder`` and loaded from there."""
        sections = _SECTIONS.substitute(
            convention=self.convention,
            table=self.table(),
            recipe=yaml.safe_dump(self.recipe, sort_keys=False).rstrip(),
            versions=", ".join(f"{name} {number}" for name, number in self.versions.items()),
        )
        return compact_card(self.size, self.model, folder, str(folder), sections)

    def write(self, folder: Path) -> None:
        """Write ``report.json`` and the model card into the folder of the compact model."""
        (folder / "report.json").write_text(self.to_json(), encoding="utf-8")
        (folder / "README.md").write_text(self.model_card(folder), encoding="utf-8")


def _row(name: str, dense: int, compact: int, ratio_name: str) -> tuple[str, str, str, str]:
    return name, f"{dense:,}", f"{compact:,}", f"{ratio_name} {compact / dense:.4f}".strip()
