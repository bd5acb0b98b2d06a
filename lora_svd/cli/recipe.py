"""A run described by a YAML file and overridden on the command line.

One flat list of fields: ``CompressArguments``, ``LoraSVDConfig`` and transformers' ``TrainingArguments``. Each is
declared once, where it belongs. HfArgumentParser makes options of the first and the last; the fields of
``LoraSVDConfig`` may hold lists and dictionaries, which it cannot read, so that their options take YAML values.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from argparse import ArgumentTypeError
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from peft import PeftConfig, TaskType
from transformers import HfArgumentParser, TrainingArguments

from ..config import LoraSVDConfig
from ..errors import LoraSVDError
from .arguments import CompressArguments

# Written by PEFT and by the tuner, not chosen by a user.
_BOOKKEEPING = {entry.name for entry in dataclasses.fields(PeftConfig)} | {"compressed"}


@dataclass(frozen=True)
class Recipe:
    """A complete run.

    Attributes:
        run: what to read, measure and show.
        config: the tuner's configuration.
        training: the Trainer's arguments; ``output_dir`` is where the compact model goes.
        chosen: the values of the recipe and of the command line, by field name.
    """

    run: CompressArguments
    config: LoraSVDConfig
    training: TrainingArguments
    chosen: dict[str, Any]


class OneLineParser(HfArgumentParser):
    """Options of dataclasses; says what is wrong in one line and leaves the exit to the caller."""

    def __init__(self, *types: Any, **options: Any) -> None:
        super().__init__(types, allow_abbrev=False, **options)

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
    recipe, parser = _read_yaml(path), recipe_parser()
    parts = [_names(part) for part in (CompressArguments, LoraSVDConfig, TrainingArguments)]
    valid, unset = set().union(*parts), object()
    _check_names(recipe, valid, path.name)
    # argparse converts and checks the defaults that are texts
    texts = {name: _as_text(value) for name, value in recipe.items() if name not in parts[1]}
    parser.set_defaults(**dict.fromkeys(valid, unset) | texts)
    values, rest = parser.parse_known_args(list(overrides))
    _check_names((word.removeprefix("--").split("=")[0].replace("-", "_") for word in rest), valid, "the command line")
    chosen = recipe | {name: value for name, value in vars(values).items() if value is not unset}
    of_run, of_config, of_training = ({name: chosen[name] for name in chosen if name in names} for names in parts)
    try:
        run, training = CompressArguments(**of_run), TrainingArguments(**of_training)
        config = LoraSVDConfig(task_type=TaskType.CAUSAL_LM, **of_config)
    except LoraSVDError:
        raise
    except (ValueError, TypeError) as error:  # how TrainingArguments refuses values
        raise LoraSVDError(f"{path.name}: {error}") from error
    if run.export_quantization != "none" and config.factor_format != "factors":
        raise LoraSVDError(
            f"export_quantization: {run.export_quantization} needs factor_format: factors, got {config.factor_format}, "
            "which amplifies rounding"
        )
    return Recipe(run=run, config=config, training=training, chosen=chosen)


def recipe_parser() -> OneLineParser:
    """The parser of all fields of a recipe."""
    parser = OneLineParser(
        CompressArguments,
        TrainingArguments,
        usage="lora-svd compress RECIPE.yaml [--field value ...]",
        description="Every field can stand in the recipe as `field: value` or on the command line.",
    )
    group = parser.add_argument_group("compression (lora_svd.LoraSVDConfig)")
    for entry in dataclasses.fields(LoraSVDConfig):
        if entry.name not in _BOOKKEEPING:
            spellings = dict.fromkeys(f"--{name}" for name in (entry.name, entry.name.replace("_", "-")))
            may_be_alone: Any = {"nargs": "?", "const": True} if isinstance(entry.default, bool) else {}
            help_text = entry.metadata["help"].replace("%", "%%")
            group.add_argument(*spellings, type=_yaml_value, default=entry.default, help=help_text, **may_be_alone)
    return parser


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2, and not a text, as in YAML 1.1."""


_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def _yaml_value(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ArgumentTypeError(f"not a YAML value: {text!r} (quote a text with special characters)") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise LoraSVDError(f"recipe: no file {str(path)!r} (working directory: {Path.cwd()})")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LoraSVDError(f"recipe: {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise LoraSVDError(f"recipe: {path} must be a mapping from field names to values, got {type(values).__name__}")
    return values


def _names(part: Any) -> set[str]:
    """Fields that a user sets."""
    return {entry.name for entry in dataclasses.fields(part) if entry.init} - _BOOKKEEPING


def _as_text(value: Any) -> Any:
    """A single value as the text that argparse converts; lists, dictionaries and None as they are."""
    return value if value is None or isinstance(value, list | dict) else str(value)


def _check_names(names: Iterable[str], valid: set[str], where: str) -> None:
    for name in names:
        if name not in valid:
            close = difflib.get_close_matches(name, valid, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lora-svd compress --help` lists all fields"
            raise LoraSVDError(f"{where}: unknown field {name!r}; {hint}")
