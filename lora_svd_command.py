"""The ``lora-svd`` command, beside the package: importing that loads PEFT, which takes seconds, and help needs none."""

from __future__ import annotations

import sys
from collections.abc import Sequence

USAGE = """\
usage: lora-svd compress RECIPE.yaml [--field value ...]   make a model smaller, as the recipe says
       lora-svd stream MODEL --text FILE --output FOLDER   without training, one block of the model in memory at a time
       lora-svd evaluate MODEL --text FILE [--window N]    perplexity of a dense or compact model
       lora-svd analyze MODEL [--before MODEL]             what is inside the weights of a model or an adapter's run
       lora-svd COMMAND --help                             all fields of a command
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of ``lora_svd.cli``, or print the help; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    from lora_svd.cli.main import run

    return run(words[0], words[1:])
