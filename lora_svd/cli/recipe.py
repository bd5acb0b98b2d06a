"""A run described by options, or by a YAML file whose fields they override.

One flat list of fields: ``CompressArguments``, ``LoraSVDConfig`` and transformers' ``TrainingArguments``. Each is
declared once, where it belongs. HfArgumentParser makes options of the first and the last; the fields of
``LoraSVDConfig`` may hold lists and dictionaries, which it cannot read, so that their options take YAML values.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from argparse import ArgumentError, ArgumentTypeError
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from peft import PeftConfig, TaskType
from transformers import HfArgumentParser, SchedulerType, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..config import LoraSVDConfig
from ..errors import LoraSVDError
from ..options import option
from .arguments import CompressArguments
from .inputs import load_config

# Written by PEFT and by the tuner, not chosen by a user.
_BOOKKEEPING = {entry.name for entry in dataclasses.fields(PeftConfig)} | {"compressed"}
_SUFFIXES = (".yaml", ".yml")
USAGE = """\
lora-svd compress MODEL --text FILE --output FOLDER [--field value ...]
       lora-svd compress RECIPE.yaml [--field value ...]"""


@dataclass
class TrainArguments(TrainingArguments):
    """transformers' ``TrainingArguments`` with defaults for a run of minutes."""

    _argument_group_name = "training (transformers.TrainingArguments)"

    output_dir: str | None = option(None, "Folder for the report and checkpoints; if not given: OUTPUT-run.")
    max_steps: int = option(-1, "Optimizer steps; -1: as many as num_train_epochs takes.")
    num_train_epochs: float = option(0.0, "Passes over the text; 0: one, but 30 steps at least and 500 at most.")
    per_device_train_batch_size: int = option(4, "Sequences in one forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes in one optimizer step.")
    learning_rate: float = option(1e-3, "The highest learning rate.")
    lr_scheduler_type: SchedulerType | str = option("cosine", "How the learning rate falls, see SchedulerType.")
    bf16: bool = option(False, "Autocast to bfloat16; if not given: where the weights are bfloat16.")
    use_cpu: bool = option(False, "Leave accelerators alone; if not given: where there is none.")
    logging_steps: float = option(10, "Steps between two lines of the log; below 1: as a share of the run.")
    save_strategy: SaveStrategy | str = option(
        "no", "When checkpoints are saved: 'no', 'epoch', 'steps' or 'best'; if not given but save_steps: 'steps'."
    )
    save_steps: float = option(500, "Steps between two checkpoints; below 1: as a share of the run.")
    seed: int = option(42, "Of all random numbers.")


@dataclass(frozen=True)
class Recipe:
    """A complete run.

    Attributes:
        run: what to read, measure and show.
        config: the tuner's configuration.
        training: the Trainer's arguments.
        chosen: the values of the recipe and of the command line, by field name.
    """

    run: CompressArguments
    config: LoraSVDConfig
    training: TrainArguments
    chosen: dict[str, Any]

    @property
    def run_folder(self) -> Path:
        """Where all goes that is not the compact model: checkpoints, the report, the text that is held out."""
        return Path(str(self.training.output_dir))

    @property
    def compact_folder(self) -> Path:
        """Where the compact model goes."""
        return Path(self.run.output) if self.run.output else self.run_folder / "compact"


class OneLineParser(HfArgumentParser):
    """Options of dataclasses; says what is wrong in one line and leaves the exit to the caller."""

    def __init__(self, *types: Any, **options: Any) -> None:
        super().__init__(types, add_help=False, allow_abbrev=False, exit_on_error=False, **options)

    def error(self, message: str) -> NoReturn:
        raise LoraSVDError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse; of an option with a wrong value the error names the field as recipes do."""
        try:
            return super().parse_known_args(args, namespace)
        except ArgumentError as error:
            field = (error.argument_name or "").split("/")[0].removeprefix("--")
            raise LoraSVDError(f"{field}: {error.message}") from error


def read_recipe(given: str | Path, options: Sequence[str] = ()) -> Recipe:
    """The run that a recipe and options describe.

    Args:
        given: the recipe, a YAML file with one mapping from field name to value; or the model, if its name has another
            ending.
        options: command-line words such as ``["--param_ratio", "0.5"]``; they override the recipe.

    Raises:
        LoraSVDError: the file or a file it names is missing, a name is unknown (the closest valid ones are listed), or
            a value is invalid.
    """
    path = Path(given)
    is_file = path.suffix in _SUFFIXES
    where = path.name if is_file else "the command line"
    recipe: dict[str, Any] = _read_yaml(path) if is_file else {"model": str(given)}
    parser = recipe_parser()
    parts = [{entry.name for entry in user_fields(part)} for part in (CompressArguments, LoraSVDConfig, TrainArguments)]
    valid, unset = set().union(*parts), object()
    _check_names(recipe, valid, where)
    # argparse converts and checks the defaults that are texts
    texts = {name: _as_text(value) for name, value in recipe.items() if name not in parts[1]}
    parser.set_defaults(**dict.fromkeys(valid, unset) | texts)
    values, rest = parser.parse_known_args(list(options))
    unknown = (word.removeprefix("--").split("=")[0].replace("-", "_") for word in rest if word.startswith("--"))
    _check_names(unknown, valid, "the command line")
    if rest:
        raise LoraSVDError(f"the command line: got {rest[0]!r} without a field, expected --field value")
    chosen = recipe | {name: value for name, value in vars(values).items() if value is not unset}
    of_run, of_config, of_training = ({name: chosen[name] for name in chosen if name in names} for names in parts)
    run, config = CompressArguments(**of_run), LoraSVDConfig(task_type=TaskType.CAUSAL_LM, **of_config)
    arguments = _implied(run, of_training) | of_training
    try:
        training = TrainArguments(**arguments)
    except (ValueError, TypeError) as error:  # how TrainingArguments refuses values
        raise LoraSVDError(f"{where}: {error}") from error
    if run.export_quantization != "none" and config.factor_format != "factors":
        raise LoraSVDError(
            f"export_quantization: {run.export_quantization} needs factor_format: factors, got {config.factor_format}, "
            "which amplifies rounding"
        )
    return Recipe(run=run, config=config, training=training, chosen=chosen)


def _implied(run: CompressArguments, training: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the Trainer that follow from the machine, the model and what else was chosen."""
    if not run.output and "output_dir" not in training:
        raise LoraSVDError("output: missing; give --output FOLDER, or set it in the recipe")
    implied = {"output_dir": f"{Path(run.output)}-run", "use_cpu": not torch.accelerator.is_available()}
    if "save_steps" in training:
        implied["save_strategy"] = "steps"
    if not training.keys() & {"bf16", "fp16"}:
        implied["bf16"] = load_config(run.model, run.dtype)[1] == torch.bfloat16
    return implied


def recipe_parser() -> OneLineParser:
    """The parser of all fields of a recipe."""
    parser = OneLineParser(
        CompressArguments,
        TrainArguments,
        usage=USAGE,
        description="Every field is an option, and can stand in the recipe as `field: value`.",
    )
    group = parser.add_argument_group("compression (lora_svd.LoraSVDConfig)")
    for entry in user_fields(LoraSVDConfig):
        spellings = dict.fromkeys(f"--{name}" for name in (entry.name, entry.name.replace("_", "-")))
        may_be_alone: Any = {"nargs": "?", "const": True} if isinstance(entry.default, bool) else {}
        help_text = entry.metadata["help"].replace("%", "%%")
        group.add_argument(*spellings, type=_yaml_value, default=entry.default, help=help_text, **may_be_alone)
    return parser


def user_fields(part: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass that a user sets."""
    return [entry for entry in dataclasses.fields(part) if entry.init and entry.name not in _BOOKKEEPING]


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


def _as_text(value: Any) -> Any:
    """A single value as the text that argparse converts; lists, dictionaries and None as they are."""
    return value if value is None or isinstance(value, list | dict) else str(value)


def _check_names(names: Iterable[str], valid: set[str], where: str) -> None:
    for name in names:
        if name not in valid:
            close = difflib.get_close_matches(name, valid, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lora-svd compress --help` lists all fields"
            raise LoraSVDError(f"{where}: unknown field {name!r}; {hint}")
