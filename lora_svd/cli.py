"""``lora-svd compress RECIPE.yaml``, ``stream``, ``evaluate`` and ``analyze MODEL``: a thin layer over the package.

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
from typing import Any

from .analysis_report import AnalysisReport
from .analyze import analyze_folder
from .config import LoraSVDConfig
from .errors import LoraSVDError
from .evaluation import perplexity, token_blocks
from .recipe import OneLineParser, read_recipe, recipe_parser
from .run import about, compress, find_device, load_model, load_tokenizer, read_text
from .streaming import compress_checkpoint

_USAGE = """\
usage: lora-svd compress RECIPE.yaml [--field value ...]   make a model smaller, as the recipe says
       lora-svd stream MODEL --text FILE --output FOLDER   without training, one block of the model in memory at a time
       lora-svd evaluate MODEL --text FILE [--window N]    perplexity of a dense or compact model
       lora-svd analyze MODEL [--before MODEL]             what is inside the weights of a model or an adapter's run
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


@dataclass
class StreamArguments:
    """Options of ``lora-svd stream``."""

    text: str = field(metadata={"help": "UTF-8 text file to take the statistics from."})
    output: str = field(metadata={"help": "Folder for the compact model, which does not exist yet."})
    param_ratio: float = field(default=0.8, metadata={"help": "Kept / original parameters of the blocks' layers."})
    importance: str = field(default="kronecker", metadata={"help": "One that needs no LoRA, see LoraSVDConfig."})
    allocation: str = field(default="global", metadata={"help": "'global' or 'uniform'."})
    factor_format: str = field(default="pivoted", metadata={"help": "'pivoted' or 'factors'."})
    statistics_limit: int = field(default=0, metadata={"help": "Bytes for the statistics of one block; 0: no limit."})
    length: int = field(default=512, metadata={"help": "Tokens in one sequence."})
    samples: int = field(default=64, metadata={"help": "Sequences to read at most."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, ...; auto: an accelerator if there is one."})


@dataclass
class AnalyzeArguments:
    """Options of ``lora-svd analyze``."""

    before: str = field(default="", metadata={"help": "Folder of the model that MODEL was made from, to show both."})
    output: str = field(default="", metadata={"help": "JSON file for the numbers of every layer."})
    figures: str = field(default="", metadata={"help": "Folder for PNG figures."})
    spectra: bool = field(default=False, metadata={"help": "Write all singular values to the JSON file."})


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
    commands = {"analyze": _analyze, "compress": _compress, "evaluate": _evaluate, "stream": _stream}
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
    options, model_name = _parse("evaluate", EvaluateArguments, "A local folder or a name on the Hub.", words)
    text = read_text("text", options.text)
    tokenizer, model = load_model(model_name, options.dtype, find_device(options.device))
    with about(options.text):
        result = perplexity(model, tokenizer, text, window=options.window)
    print(json.dumps(dataclasses.asdict(result)) if options.json else f"perplexity {result}")


def _stream(words: list[str]) -> None:
    options, folder = _parse("stream", StreamArguments, "A local folder with a dense model.", words)
    chosen = ("param_ratio", "importance", "allocation", "factor_format")
    limit = options.statistics_limit or None
    config = LoraSVDConfig(statistics_limit=limit, **{name: getattr(options, name) for name in chosen})
    if options.samples < 1:
        raise LoraSVDError(f"samples: got {options.samples}, expected an integer >= 1")
    tokenizer, text = load_tokenizer(folder), read_text("text", options.text)
    with about(options.text):
        ids = token_blocks(tokenizer, text, options.length)[: options.samples]
    device = find_device(options.device)
    size = compress_checkpoint(folder, options.output, ids, config, tokenizer=tokenizer, device=device)
    print(f"param_ratio {size.param_ratio:.4f}, model_param_ratio {size.model_param_ratio:.4f}, bytes {size.bytes:,}")


def _analyze(words: list[str]) -> None:
    options, model = _parse("analyze", AnalyzeArguments, "A model folder, or a LoraSVD adapter folder.", words)
    if options.spectra and not options.output:
        raise LoraSVDError("spectra: they go to the JSON file; name it with --output")
    before = (options.before, analyze_folder(options.before)) if options.before else None
    report = AnalysisReport(model, analyze_folder(model), before)
    print(report.text())
    try:
        if options.output:
            Path(options.output).write_text(report.to_json(spectra=options.spectra), encoding="utf-8")
        if options.figures:
            report.write_figures(Path(options.figures))
    except OSError as error:
        raise LoraSVDError(f"analyze: cannot write: {error}") from error


def _parse(command: str, kind: type, model_help: str, words: list[str]) -> tuple[Any, str]:
    """The options of a command, and the model that it is about."""
    parser = OneLineParser(kind, prog=f"lora-svd {command}")
    parser.add_argument("model", help=model_help)
    options, positional, rest = parser.parse_args_into_dataclasses(
        args=words, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise LoraSVDError(f"{command}: unknown option {rest[0]!r}; `lora-svd {command} --help` lists them")
    return options, positional.model


if __name__ == "__main__":
    sys.exit(main())
