"""The ``lora-svd`` command, beside the package: importing that loads PEFT, which takes seconds, and help needs none."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

USAGE = """\
usage: lora-svd compress MODEL --text FILE --output FOLDER   make a model smaller, --param_ratio 0.6 of its parameters
       lora-svd compress RECIPE.yaml                         the same, as a file says
       lora-svd stream MODEL --text FILE --output FOLDER     without training, one block in memory at a time
       lora-svd evaluate MODEL --text FILE                   perplexity of a dense or compact model
       lora-svd analyze MODEL                                what is inside the weights of a model or an adapter's run
       lora-svd COMMAND --help                               the options of a command
"""
_HELP_TEXTS = Path(__file__).with_name("lora_svd") / "cli" / "help_texts"  # written by lora_svd/cli/help.py


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of ``lora_svd.cli``, or print the help; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    texts = {path.stem: path for path in _HELP_TEXTS.glob("*.txt")}
    if words[0] in texts and not {"-h", "--help"}.isdisjoint(words):
        print(texts[words[0]].read_text(encoding="utf-8"), end="")
        return 0
    from lora_svd.cli.main import run

    return run(words[0], words[1:])
