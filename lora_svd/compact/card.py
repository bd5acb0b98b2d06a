"""The README.md of a compact model: what it is and how to load it."""

from __future__ import annotations

from pathlib import Path
from string import Template

from transformers import PreTrainedModel

from .remote_code import MODULE, auto_classes
from .size import ParameterReport, parameter_report

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

Made from `$model` by lora-svd: LoRA bypasses were trained on the frozen model, the weights were replaced by
importance-weighted low-rank factors, and the bypasses were folded into the factors.

## Load

```python
import lora_svd  # before from_pretrained
from transformers import $auto_classes

$loads
```

$needs

$sections
""")
_NEEDS_PACKAGE = """\
> **Warning.** This needs the package `lora-svd`, and `import lora_svd` before loading. Without the import transformers
> does not know the low-rank layers, reports `MISMATCH` for their weights and refuses to load. Do not talk it into it
> with `ignore_mismatched_sizes=True`: these layers would have *random* weights."""
_SELF_CONTAINED = f"""\
> Where the package `lora-svd` is not installed, leave its import out and load the model with `trust_remote_code=True`,
> which runs `{MODULE}.py`, saved with it."""
_SIZE = Template("""\
## Size

`param_ratio` = parameters kept / original parameters over the weights of the targeted linear layers: $param_ratio.
`model_param_ratio` = the same over the whole model: $model_param_ratio, $parameters of $dense_parameters parameters,
$bytes bytes.""")


def card_of(model: PreTrainedModel, saved: Path, folder: str) -> str:
    """The text for a model that is saved and will be loaded from ``folder``."""
    auto_class = next(iter(auto_classes(model)), "AutoModel")
    return compact_card(parameter_report(model), model.name_or_path or "", saved, folder, auto_class=auto_class)


def compact_card(
    size: ParameterReport,
    model: str,
    saved: Path,
    folder: str,
    sections: str = "",
    auto_class: str = "AutoModelForCausalLM",
) -> str:
    """The card's text.

    Args:
        size: of the compact model.
        model: what it was made from, a local folder or a name on the Hub.
        saved: where the compact model is, with its tokenizer or processor, if it has one.
        folder: name or path under which a reader loads it.
        sections: Markdown with what is known of it; empty: its size.
        auto_class: the class of transformers that loads it.
    """
    # A local folder is no model id of the Hub, whose checker would refuse the card.
    is_name = bool(model) and not Path(model).exists()
    counts = {name: f"{getattr(size, name):,}" for name in ("parameters", "dense_parameters", "bytes")}
    ratios = {name: f"{getattr(size, name):.4f}" for name in ("param_ratio", "model_param_ratio")}
    loaded = {"model": auto_class} | _processing(saved)
    return _TEMPLATE.substitute(
        base_model_line=f"base_model: {model}" if is_name else "# compressed from a local folder",
        name=Path(model).name or "A model",
        param_percent=f"{size.param_ratio:.1%}",
        model=model or "a model",
        auto_classes=", ".join(loaded.values()),
        loads="\n".join(f'{name} = {of}.from_pretrained("{folder}")' for name, of in loaded.items()),
        needs=_SELF_CONTAINED if (saved / f"{MODULE}.py").exists() else _NEEDS_PACKAGE,
        sections=sections or _SIZE.substitute(counts, **ratios),
    )


def _processing(saved: Path) -> dict[str, str]:
    """Name and auto class of what makes the inputs of a saved model; none if it was saved alone."""
    if any((saved / f"{kind}_config.json").exists() for kind in ("processor", "preprocessor")):
        return {"processor": "AutoProcessor"}
    return {"tokenizer": "AutoTokenizer"} if (saved / "tokenizer_config.json").exists() else {}
