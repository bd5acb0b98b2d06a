"""The README.md of what ``lora-svd compress`` makes: the card of a compact model, with results and recipe."""

from __future__ import annotations

from pathlib import Path
from string import Template

import yaml

from .compact import compact_card
from .run_report import RunReport

_SECTIONS = Template("""\
## Results

Perplexity: window $window tokens, $tokens predicted tokens, non-overlapping windows, no special tokens.
`param_ratio` = parameters kept / original parameters over the weights of the targeted linear layers;
`model_param_ratio` = the same over the whole model.

$table

## Recipe

```yaml
$recipe
```

Versions: $versions.""")


def model_card(report: RunReport, folder: Path) -> str:
    """The card's text.

    Args:
        report: of the finished run.
        folder: where the model is, and is loaded from.
    """
    sections = _SECTIONS.substitute(
        window=f"{report.window:,}",
        tokens=f"{report.perplexity_tokens:,}",
        table=report.table(),
        recipe=yaml.safe_dump(report.recipe, sort_keys=False).rstrip(),
        versions=", ".join(f"{name} {number}" for name, number in report.versions.items()),
    )
    return compact_card(report.size, report.model, folder, str(folder), sections)
