"""One run from a recipe to a compact model on disk: what ``lora-svd compress`` does, in order."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerState,
    set_seed,
)

from .checkpoints import last_whole_checkpoint
from .compact import parameter_report, save_compact
from .errors import LoraSVDError
from .evaluation import Perplexity, check_positions, perplexity, token_blocks
from .html_report import Measured, Messages, ReportData, TrainedRun, bytes_by_part, recorded_messages, write_report
from .model_card import model_card
from .own_text import own_text
from .recipe import DTYPES, CompressArguments, Recipe
from .run_report import RunReport
from .training import LoraSVDCallback

# Relative difference between perplexity in memory and after reloading that rounding may cause, bfloat16 included.
_RELOAD_TOLERANCE = 1e-3


def compress(recipe: Recipe, say: Callable[[str], None]) -> RunReport:
    """Load, measure, train, merge, measure, save, and measure again in a new process.

    The compact model, its tokenizer, its model card and ``report.json`` go to ``OUTPUT_DIR/compact``. An earlier model
    there is replaced only when the new one is complete. A page with figures goes to ``OUTPUT_DIR/report``.

    Args:
        recipe: what to do.
        say: receives the lines that are meant for the user.

    Raises:
        LoraSVDError: the recipe cannot be carried out, or the saved model differs from the one in memory.
    """
    if recipe.training.world_size > 1:
        raise LoraSVDError(
            f"lora-svd compress: started in {recipe.training.world_size} processes, expected one. Several can train "
            "with Trainer and LoraSVDCallback in a script; save its adapter, and merge that in one process"
        )
    with recorded_messages() as messages:
        return _compress(recipe, say, messages)


def _compress(recipe: Recipe, say: Callable[[str], None], messages: Messages) -> RunReport:
    run, clock = recipe.run, _Clock()
    folder = Path(recipe.training.output_dir or ".") / "compact"
    set_seed(recipe.training.seed)
    with clock("load"):
        train_text, eval_text = read_text("train_text", run.train_text), read_text("eval_text", run.eval_text)
        given = _bitsandbytes(run.base_quantization)
        tokenizer, model = load_model(run.model, run.dtype, recipe.training.device, given)
        with about(run.train_text):
            blocks = token_blocks(tokenizer, train_text, run.block_length, field="block_length")
        check_positions(model, run.block_length, "block_length")
    with clock("evaluate dense"), about(run.eval_text):
        dense = _measure(model, tokenizer, eval_text, run)
        say(f"perplexity of {run.model}: {dense.perplexity}")
    if run.own_text_blocks:
        with clock("own text"):
            start = run.own_text_start or None
            own = own_text(model, tokenizer, run.own_text_blocks, run.block_length, start=start)
            blocks = torch.cat((blocks, own))
    with clock("train and compress"):
        tuned, state = _train(model, blocks, recipe)
    trained = TrainedRun(tuned.base_model, state)
    with clock("merge"):
        model = tuned.merge_and_unload(quantization_config=_bitsandbytes(run.export_quantization))
    with clock("evaluate compact"):
        compact = _measure(model, tokenizer, eval_text, run)
        say(f"perplexity of the compact model: {compact.perplexity}")
    with clock("save"):
        save_compact(model, folder, tokenizer)
    with clock("reload and evaluate"):
        reloaded = _evaluate_in_new_process(folder, recipe)
    with clock("report"):
        options = {"tokenizer": tokenizer, "text": eval_text, "window": run.window, "max_tokens": run.report_tokens}
        # Other sizes would be in full precision, and not comparable with factors in 4 bits.
        others = run.report_sizes if run.report_tokens and run.export_quantization == "none" else ()
        perplexities = trained.perplexities(model, others, partial(perplexity, **options))
        training = trained.summary()
    report = RunReport(
        model=run.model,
        dense_bytes=dense.size.bytes,
        size=compact.size,
        perplexity_dense=dense.perplexity.value,
        perplexity_compact=compact.perplexity.value,
        perplexity_reloaded=reloaded.value,
        perplexity_tokens=dense.perplexity.tokens,
        window=run.window,
        seconds=clock.seconds,
        recipe=recipe.chosen,
        sketched=trained.sketched(),
    )
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    (folder / "README.md").write_text(model_card(report, folder), encoding="utf-8")
    data = ReportData(report, dense, compact, training, perplexities, run.prompt, messages)
    page = write_report(data, folder.with_name("report"))
    _check_reloaded(compact.perplexity, reloaded, folder)
    say(f"\n{report.table()}\n\nThe compact model is in {folder}, a report with figures in {page}.")
    if run.prompt:
        say(f"\nDense:   {dense.says}\n\nCompact: {compact.says}")
    return report


def load_model(
    name: str, dtype: str, device: torch.device, quantization_config: BitsAndBytesConfig | None = None
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and causal language model, dense or compact, from a local folder or the Hub.

    Raises:
        LoraSVDError: there is no such model, or it cannot be loaded.
    """
    if dtype not in DTYPES:
        raise LoraSVDError(f"dtype: unknown value {dtype!r}, expected one of {sorted(DTYPES)}")
    try:
        safe: Any = {"trust_remote_code": False}  # without it transformers asks, where there is a terminal
        tokenizer = AutoTokenizer.from_pretrained(name, **safe)
        # bitsandbytes quantizes where the weights are loaded to, and 8-bit models cannot be moved
        quantized = {"device_map": {"": device}, "quantization_config": quantization_config}
        options: Any = quantized if quantization_config else {}
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **safe, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise LoraSVDError(f"model: cannot load {name!r}: {error}") from error
    return tokenizer, model if quantization_config else model.to(device)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or of the Hub.

    Raises:
        LoraSVDError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise LoraSVDError(f"model: cannot load the tokenizer of {name!r}: {error}") from error


def _bitsandbytes(quantization: str) -> BitsAndBytesConfig | None:
    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_use_double_quant=True)


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is the accelerator if there is one, else the CPU.

    Raises:
        LoraSVDError: torch knows no such device, or finds none.
    """
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # torch raises the latter if it was built without CUDA
            raise LoraSVDError(f"device: cannot use {name!r}: {error}") from error
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def read_text(field: str, path: str) -> str:
    """A UTF-8 text file.

    Raises:
        LoraSVDError: it cannot be read; the message names the field.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoraSVDError(f"{field}: cannot read {path!r} as UTF-8 text: {error}") from error


@contextmanager
def about(path: str) -> Iterator[None]:
    """Names the file that an error inside is about."""
    try:
        yield
    except LoraSVDError as error:
        raise type(error)(f"{path}: {error}") from error


def _measure(model: Any, tokenizer: PreTrainedTokenizerBase, text: str, run: CompressArguments) -> Measured:
    return Measured(
        size=parameter_report(model),
        bytes_by_part=bytes_by_part(model),
        perplexity=perplexity(model, tokenizer, text, window=run.window),
        says=_continue_prompt(model, tokenizer, run),
    )


def _train(model: PreTrainedModel, blocks: Tensor, recipe: Recipe) -> tuple[Any, TrainerState]:
    """The PEFT model after the Trainer's run, its weights compressed on the way, and what the Trainer logged."""
    try:
        tuned = get_peft_model(model, recipe.config)
    except (ValueError, TypeError) as error:  # how PEFT refuses a configuration, LoraSVDError included
        raise LoraSVDError(str(error)) from error
    trainer = Trainer(
        model=tuned,
        args=recipe.training,
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],  # pyright: ignore[reportArgumentType] - any sized sequence will do
    )
    # Before those that report, so that they get the size that it adds to the log; after the one that controls the run.
    trainer.callback_handler.callbacks.insert(1, LoraSVDCallback())
    resume = recipe.training.resume_from_checkpoint
    if resume == "last":
        resume = last_whole_checkpoint(recipe.training.output_dir or ".")
    trainer.train(resume_from_checkpoint=resume)
    return tuned, trainer.state


def _evaluate_in_new_process(folder: Path, recipe: Recipe) -> Perplexity:
    """What a user of the saved model gets: nothing of this process can help."""
    run = recipe.run
    options = {"text": run.eval_text, "window": run.window, "dtype": run.dtype, "device": recipe.training.device}
    command = [sys.executable, "-m", "lora_svd.cli", "evaluate", str(folder), "--json"]
    command += [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise LoraSVDError(f"{folder}: saved, but a new process could not evaluate it (exit code {done.returncode})")
    return Perplexity(**json.loads(done.stdout))


def _check_reloaded(after: Perplexity, reloaded: Perplexity, folder: Path) -> None:
    if abs(reloaded.value - after.value) > _RELOAD_TOLERANCE * after.value:
        raise LoraSVDError(
            f"{folder}: perplexity is {after.value} in memory but {reloaded.value} when reloaded; do not use it"
        )


def _continue_prompt(model: Any, tokenizer: PreTrainedTokenizerBase, run: CompressArguments) -> str:
    """The prompt and its greedy continuation, the penalty lest a small model repeats itself; empty without a prompt."""
    if not run.prompt:
        return ""
    given = tokenizer(run.prompt, return_tensors="pt").to(model.device)
    ids = model.generate(**given, max_new_tokens=run.max_new_tokens, do_sample=False, repetition_penalty=1.2)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


class _Clock:
    """Wall time by phase, in seconds, in the order they ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start
