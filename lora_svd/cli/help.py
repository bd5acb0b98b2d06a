"""What ``lora-svd COMMAND --help`` prints, from the fields of the command, written to files beside it.

The fields come from modules that take seconds to import, a file is read at once. After a change of a field:

    python -m lora_svd.cli.help
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..config import LoraSVDConfig
from .arguments import AnalyzeArguments, CompressArguments, EvaluateArguments, StreamArguments
from .recipe import USAGE, TrainArguments, user_fields

FOLDER = Path(__file__).with_name("help_texts")
_WIDTH = 80
_ABOUT_COMPRESS = """\
Makes a causal language model smaller while a LoRA is trained. What is an option \
here can stand in a recipe as `field: value`; so can every other field of \
transformers' TrainingArguments: `lora-svd compress --help-all` lists them too."""


def help_texts() -> dict[str, str]:
    """The help of every command, by its name."""
    ours = TrainArguments.__annotations__
    compress = {
        "run": user_fields(CompressArguments),
        "compression": user_fields(LoraSVDConfig),
        "training": [entry for entry in user_fields(TrainArguments) if entry.name in ours],
    }
    return {
        "compress": _text(USAGE, _ABOUT_COMPRESS, compress),
        "stream": _text(
            "lora-svd stream MODEL --text FILE --output FOLDER [--option value ...]",
            "Makes a causal language model smaller without training, one block of it in memory at a time.",
            {"options": user_fields(StreamArguments)},
        ),
        "evaluate": _text(
            "lora-svd evaluate MODEL --text FILE [--option value ...]",
            "Perplexity of a dense or compact model, a local folder or a name on the Hub.",
            {"options": user_fields(EvaluateArguments)},
        ),
        "analyze": _text(
            "lora-svd analyze MODEL [--option value ...]",
            "What is inside the weights of a folder: a model's, or a LoraSVD adapter's.",
            {"options": user_fields(AnalyzeArguments)},
        ),
    }


def _text(usage: str, about: str, groups: dict[str, list[dataclasses.Field[Any]]]) -> str:
    lines = [f"usage: {usage}", "", *_wrapped(about)]
    for title, entries in groups.items():
        lines += ["", f"{title}:", *_options(entries)]
    return "\n".join(lines) + "\n"


def _options(entries: Iterable[dataclasses.Field[Any]]) -> Iterator[str]:
    for entry in entries:
        default = _default(entry)
        yield f"  --{entry.name}" + (f" ({default})" if default else "")
        yield from _wrapped(entry.metadata["help"], indent=6)


def _default(entry: dataclasses.Field[Any]) -> str:
    """The default of a field as it would be typed; empty: unset."""
    if entry.default_factory is not dataclasses.MISSING:
        return " ".join(map(str, entry.default_factory()))
    if entry.default is dataclasses.MISSING:
        return "required"
    if isinstance(entry.default, bool):
        return str(entry.default).lower()
    return "" if entry.default is None else str(entry.default)


def _wrapped(text: str, indent: int = 0) -> list[str]:
    margin = " " * indent
    return textwrap.wrap(text, _WIDTH, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)


def write_help(folder: Path = FOLDER) -> None:
    """Write the files that the command reads."""
    folder.mkdir(exist_ok=True)
    for name, text in help_texts().items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_help()
