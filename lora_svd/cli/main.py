"""``lora-svd compress``, ``stream``, ``evaluate`` and ``analyze``: a thin layer over the package.

Results go to stdout, progress and logs to stderr. Exit code 2: a request that cannot be carried out, said in one line.
A command imports what it needs when it runs.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import LoraSVDError
from .arguments import AnalyzeArguments, EvaluateArguments, StreamArguments


def run(command: str, words: list[str]) -> int:
    """Run a command with the words behind it; returns the exit code."""
    # PEFT 0.21 asks transformers 5.23 in a deprecated way; nothing that a user of this command could mend.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    try:
        _function(command)(words)
    except LoraSVDError as error:
        print(f"lora-svd: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _function(command: str) -> Callable[[list[str]], None]:
    functions = {"analyze": _analyze, "compress": _compress, "evaluate": _evaluate, "stream": _stream}
    if command not in functions:
        raise LoraSVDError(f"unknown command {command!r}, expected one of {sorted(functions)}")
    return functions[command]


def _compress(words: list[str]) -> None:
    from .recipe import read_recipe, recipe_parser

    if words == ["--help-all"]:
        recipe_parser().print_help()
        return
    if not words or words[0].startswith("-"):
        raise LoraSVDError(
            f"compress: the first word is {words[0] if words else 'missing'}, expected a model or a recipe, as in "
            "`lora-svd compress MODEL --text FILE --output FOLDER` or `lora-svd compress RECIPE.yaml`"
        )
    from .compress import compress

    compress(read_recipe(words[0], words[1:]), say=lambda line: print(line, flush=True))


def _evaluate(words: list[str]) -> None:
    from ..evaluation import perplexity
    from .inputs import about, find_device, load_model, load_tokenizer, read_text

    options, model_name = _parse("evaluate", EvaluateArguments, "A local folder or a name on the Hub.", words)
    text = read_text("text", options.text)
    model, tokenizer = load_model(model_name, options.dtype, find_device(options.device)), load_tokenizer(model_name)
    with about(options.text):
        result = perplexity(model, tokenizer, text, window=options.window, bos=options.bos)
    print(json.dumps(dataclasses.asdict(result)) if options.json else f"perplexity {result}")


def _stream(words: list[str]) -> None:
    from ..config import LoraSVDConfig
    from ..evaluation import token_blocks
    from ..streaming import compress_checkpoint
    from .inputs import about, find_device, load_tokenizer, read_text

    options, folder = _parse("stream", StreamArguments, "A local folder with a dense model.", words)
    chosen = ("param_ratio", "importance", "allocation", "neurons", "heads", "factor_format")
    limit = options.statistics_limit or None
    config = LoraSVDConfig(statistics_limit=limit, **{name: getattr(options, name) for name in chosen})
    if options.samples < 1:
        raise LoraSVDError(f"samples: got {options.samples}, expected an integer >= 1")
    tokenizer, text = load_tokenizer(folder), read_text("text", options.text)
    with about(options.text):
        ids = token_blocks(tokenizer, text, options.length, bos=options.bos)[: options.samples]
    device = find_device(options.device)
    size = compress_checkpoint(folder, options.output, ids, config, tokenizer=tokenizer, device=device)
    print(f"param_ratio {size.param_ratio:.4f}, model_param_ratio {size.model_param_ratio:.4f}, bytes {size.bytes:,}")


def _analyze(words: list[str]) -> None:
    from ..analysis.models import analyze_folder
    from ..analysis.report import AnalysisReport

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


def _parse(command: str, arguments: type, model_help: str, words: list[str]) -> tuple[Any, str]:
    """The options of a command, and the model that it is about."""
    from .recipe import OneLineParser

    parser = OneLineParser(arguments, prog=f"lora-svd {command}")
    parser.add_argument("model", help=model_help)
    options, positional, rest = parser.parse_args_into_dataclasses(
        args=words, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise LoraSVDError(f"{command}: unknown option {rest[0]!r}; `lora-svd {command} --help` lists them")
    return options, positional.model
