"""A run described by a YAML file and overridden on the command line.

One flat list of fields: ``CompressArguments`` (below), ``LoraSVDConfig`` and transformers' ``TrainingArguments``. Each
is declared once, where it belongs; HfArgumentParser makes the options, the help and the types from the declarations.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from argparse import ArgumentTypeError
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from peft import PeftConfig, TaskType
from transformers import HfArgumentParser, TrainingArguments

from .config import LoraSVDConfig, option
from .errors import LoraSVDError

QUANTIZATIONS = ("none", "nf4", "fp4", "int8")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Written by PEFT and by the tuner, not chosen by a user.
_BOOKKEEPING = {entry.name for entry in dataclasses.fields(PeftConfig)} | {"compressed"}


@dataclass
class CompressArguments:
    """What a run reads, measures and shows; paths are relative to the working directory."""

    _argument_group_name = "run"

    model: str = option("", "The causal language model to compress: a local folder or a name on the Hub.")
    train_text: str = option("", "UTF-8 text file to train on and to take the statistics from.")
    eval_text: str = option("", "UTF-8 text file, not trained on, whose perplexity is measured before and after.")
    dtype: str = option("auto", f"Type the model is loaded, evaluated and saved in: {', '.join(DTYPES)}.")
    base_quantization: str = option("none", f"Form the dense weights are loaded in: {', '.join(QUANTIZATIONS)}.")
    export_quantization: str = option(
        "none", "Form the compact weights are saved in: none, nf4, fp4; needs factor_format: factors."
    )
    block_length: int = option(512, "Tokens in one training sequence.")
    own_text_blocks: int = option(0, "Training sequences that the dense model writes itself, added to train_text's.")
    own_text_start: str = option("", "Token that its documents begin with; empty: the tokenizer's bos_token.")
    window: int = option(1024, "Tokens in one window of the perplexity evaluation.")
    prompt: str = option("", "Text that the dense and the compact model continue; empty: none.")
    max_new_tokens: int = option(48, "Tokens to continue the prompt by.")
    report_sizes: list[float] = field(
        default_factory=lambda: [0.9, 0.75],
        metadata={"help": "Further values of param_ratio whose perplexity the report shows; none if empty."},
    )
    report_tokens: int = option(2048, "Tokens of eval_text that it is measured on, in whole windows; 0: not at all.")

    def __post_init__(self) -> None:
        for name in ("model", "train_text", "eval_text"):
            if not getattr(self, name):
                raise LoraSVDError(f"{name}: missing; set it in the recipe or give --{name}")
        for name in ("train_text", "eval_text"):
            if not Path(getattr(self, name)).is_file():
                raise LoraSVDError(f"{name}: no file {getattr(self, name)!r} (working directory: {Path.cwd()})")
        limits = {"block_length": 2, "own_text_blocks": 0, "window": 2, "max_new_tokens": 1, "report_tokens": 0}
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise LoraSVDError(f"{name}: got {getattr(self, name)}, expected an integer >= {least}")
        for size in self.report_sizes:
            if isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size <= 1:
                raise LoraSVDError(f"report_sizes: got {size!r}, expected numbers in (0, 1]")
        for name, valid in (
            ("dtype", DTYPES),
            ("base_quantization", QUANTIZATIONS),
            ("export_quantization", QUANTIZATIONS[:3]),
        ):
            if getattr(self, name) not in valid:
                raise LoraSVDError(f"{name}: unknown value {getattr(self, name)!r}, expected one of {sorted(valid)}")


@dataclass(frozen=True)
class Recipe:
    """A complete run.

    Attributes:
        run: what to read, measure and show.
        config: the tuner's configuration.
        training: the Trainer's arguments; ``output_dir`` is where the compact model goes.
        chosen: the values that were given in the recipe or on the command line, by field name.
    """

    run: CompressArguments
    config: LoraSVDConfig
    training: TrainingArguments
    chosen: dict[str, Any]


class _YamlValue:
    """Argument type of fields whose declared type HfArgumentParser cannot read (unions, lists, dicts)."""

    def __new__(cls, text: str) -> Any:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ArgumentTypeError(f"not a YAML value: {text!r} (quote a text with special characters)") from error


class OneLineParser(HfArgumentParser):
    """Options from the given dataclasses; says what is wrong in one line and leaves the exit to the caller."""

    def __init__(self, *kinds: Any, **options: Any) -> None:
        super().__init__(kinds, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise LoraSVDError(message)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply command-line overrides.

    Args:
        path: YAML file, one mapping from field name to value.
        overrides: command-line words such as ``["--param_ratio", "0.5"]``.

    Raises:
        LoraSVDError: the file or a file it names is missing, a name is unknown (the closest valid ones are listed), or
            a value is invalid.
    """
    given = _read_yaml(path)
    parser = recipe_parser()
    types = _declared_types(parser)
    for name in given:
        _check_name(name, types, path.name)
    parser.set_defaults(**{name: _as_default(value, types[name]) for name, value in given.items()})
    try:
        *parts, rest = parser.parse_args_into_dataclasses(
            args=list(overrides), return_remaining_strings=True, look_for_args_file=False
        )
        for word in rest:
            _check_name(_option_name(word), types, "the command line")
        run, view, training = parts
        config = LoraSVDConfig(task_type=TaskType.CAUSAL_LM, **vars(view))
    except LoraSVDError:
        raise
    except (ValueError, TypeError) as error:  # how TrainingArguments refuses values
        raise LoraSVDError(f"{path.name}: {error}") from error
    if run.export_quantization != "none" and config.factor_format != "factors":
        raise LoraSVDError(
            f"export_quantization: {run.export_quantization} needs factor_format: factors, got {config.factor_format}, "
            "which amplifies rounding"
        )
    words = {_option_name(word).removeprefix("no_") for word in overrides if word.startswith("--")}
    changed = {name: _plain(getattr(part, name)) for part in parts for name in words & set(vars(part))}
    return Recipe(run=run, config=config, training=training, chosen=given | changed)


def recipe_parser() -> HfArgumentParser:
    """The parser of all fields of a recipe."""
    return OneLineParser(
        CompressArguments,
        _config_view(),
        TrainingArguments,
        usage="lora-svd compress RECIPE.yaml [--field value ...]",
        description="Every field can stand in the recipe as `field: value` or on the command line.",
    )


def _config_view() -> type:
    """A dataclass with the fields of LoraSVDConfig that a user chooses, in types HfArgumentParser can read."""
    hints = get_type_hints(LoraSVDConfig)
    view = dataclasses.make_dataclass(
        "CompressionFields",
        [
            (
                entry.name,
                hints[entry.name] if hints[entry.name] in (int, float, str, bool) else _YamlValue,
                field(default=entry.default, metadata={"help": entry.metadata["help"].replace("%", "%%")}),
            )
            for entry in dataclasses.fields(LoraSVDConfig)
            if entry.init and entry.name not in _BOOKKEEPING
        ],
    )
    view._argument_group_name = "compression (lora_svd.LoraSVDConfig)"
    return view


def _declared_types(parser: HfArgumentParser) -> dict[str, Any]:
    return {
        entry.name: entry.type for part in parser.dataclass_types for entry in dataclasses.fields(part) if entry.init
    }


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise LoraSVDError(f"recipe: no file {str(path)!r} (working directory: {Path.cwd()})")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LoraSVDError(f"recipe: {path} is not valid YAML: {error}") from error
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise LoraSVDError(f"recipe: {path} must be a mapping from field names to values, got {type(given).__name__}")
    return given


def _as_default(value: Any, declared: Any) -> Any:
    """A recipe's value as a default of argparse, which converts and checks strings and takes the rest as it is."""
    if value is None or isinstance(value, (list, dict)):
        return value
    if declared is _YamlValue:
        return json.dumps(value)
    return str(value)


def _plain(value: Any) -> Any:
    """TrainingArguments turns names into enum members; a recipe has the names."""
    return value.value if isinstance(value, Enum) else value


def _option_name(word: str) -> str:
    return word.removeprefix("--").split("=")[0].replace("-", "_")


def _check_name(name: str, valid: Iterable[str], where: str) -> None:
    if name in valid:
        return
    close = difflib.get_close_matches(name, list(valid), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`lora-svd compress --help` lists all fields"
    raise LoraSVDError(f"{where}: unknown field {name!r}; {hint}")
