"""``lora-svd compress RECIPE.yaml`` and ``lora-svd evaluate MODEL``: a thin layer over the package.

Results go to stdout, progress and logs to stderr. Exit code 2: a request that cannot be carried out, said in one line.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import LoraSVDError
from .evaluation import perplexity
from .recipe import OneLineParser, read_recipe, recipe_parser
from .run import about, compress, find_device, load_model, read_text

_USAGE = """\
usage: lora-svd compress RECIPE.yaml [--field value ...]   make a model smaller, as the recipe says
       lora-svd evaluate MODEL --text FILE [--window N]    perplexity of a dense or compact model
       lora-svd COMMAND --help                             all fields of a command
"""


@dataclass
class EvaluateArguments:
    """Options of ``lora-svd evaluate``."""

    text: str = field(metadata={"help": "UTF-8 text file."})
    window: int = field(default=1024, metadata={"help": "Tokens in one window."})
    dtype: str = field(default="auto", metadata={"help": "Type to load the model in; auto: as it was saved."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, ...; auto: an accelerator if there is one."})
    json: bool = field(default=False, metadata={"help": "Print one JSON object instead of a line of text."})


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``lora-svd`` command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # PEFT 0.21 asks transformers 5.23 in a deprecated way; nothing that a user of this command could mend.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if words else 2
    try:
        _command(words[0])(words[1:])
    except LoraSVDError as error:
        print(f"lora-svd: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _command(name: str) -> Callable[[list[str]], None]:
    commands = {"compress": _compress, "evaluate": _evaluate}
    if name not in commands:
        raise LoraSVDError(f"unknown command {name!r}, expected one of {sorted(commands)}")
    return commands[name]


def _compress(words: list[str]) -> None:
    if words[:1] in (["-h"], ["--help"]):
        recipe_parser().print_help()
        return
    if not words or words[0].startswith("-"):
        raise LoraSVDError("compress: the first word must be the recipe, as in `lora-svd compress RECIPE.yaml`")
    compress(read_recipe(Path(words[0]), words[1:]), say=lambda line: print(line, flush=True))


def _evaluate(words: list[str]) -> None:
    parser = OneLineParser(EvaluateArguments, prog="lora-svd evaluate")
    parser.add_argument("model", help="A local folder or a name on the Hub.")
    options, positional, rest = parser.parse_args_into_dataclasses(
        args=words, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise LoraSVDError(f"evaluate: unknown option {rest[0]!r}; `lora-svd evaluate --help` lists them")
    text = read_text("text", options.text)
    tokenizer, model = load_model(positional.model, options.dtype, find_device(options.device))
    with about(options.text):
        result = perplexity(model, tokenizer, text, window=options.window)
    print(json.dumps(dataclasses.asdict(result)) if options.json else f"perplexity {result}")


if __name__ == "__main__":
    sys.exit(main())
