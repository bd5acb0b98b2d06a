"""The README.md of a compact model: how it was made and how to load it."""

from __future__ import annotations

from pathlib import Path
from string import Template

import yaml

from .run_report import RunReport

_TEMPLATE = Template("""\
---
library_name: transformers
$base_model_line
tags:
- lora-svd
- low-rank
- compression
---

# $name, compressed to $param_percent of its targeted parameters

Made from `$model` by `lora-svd compress`: LoRA bypasses were trained on the frozen model, the weights were replaced by
importance-weighted low-rank factors, and the bypasses were folded into the factors.

## Load

```python
import lora_svd  # before from_pretrained
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("$folder")
tokenizer = AutoTokenizer.from_pretrained("$folder")
```

> **Warning.** This needs the package `lora-svd`, and `import lora_svd` before loading. Without the import transformers
> does not know the low-rank layers, reports `MISMATCH` for their weights and refuses to load. Do not talk it into it
> with `ignore_mismatched_sizes=True`: these layers would have *random* weights.

## Results

Perplexity: window $window tokens, $tokens predicted tokens, non-overlapping windows, no special tokens.
`param_ratio` = parameters kept / original parameters over the weights of the targeted linear layers;
`model_param_ratio` = the same over the whole model.

$table

## Recipe

```yaml
$recipe
```

Versions: $versions.
""")


def model_card(report: RunReport, folder: str) -> str:
    """The card's text.

    Args:
        report: of the finished run.
        folder: name or path under which a reader loads the model.
    """
    # A local folder is no model id of the Hub, whose checker would refuse the card.
    local = Path(report.model).exists()
    return _TEMPLATE.substitute(
        base_model_line="# compressed from a local folder" if local else f"base_model: {report.model}",
        name=Path(report.model).name,
        param_percent=f"{report.size.param_ratio:.1%}",
        model=report.model,
        folder=folder,
        window=f"{report.window:,}",
        tokens=f"{report.perplexity_tokens:,}",
        table=report.table(),
        recipe=yaml.safe_dump(report.recipe, sort_keys=False).rstrip(),
        versions=", ".join(f"{name} {number}" for name, number in report.versions.items()),
    )
