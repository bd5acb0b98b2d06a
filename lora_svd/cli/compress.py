"""One run from a dense model to a compact one on disk: what ``lora-svd compress`` does, in order."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerState, set_seed

from ..compact import parameter_report, save_compact
from ..compact.saving import check_replaceable
from ..errors import LoraSVDError
from ..evaluation import (
    Perplexity,
    leading_tokens,
    perplexity,
    put_in_front,
    text_tokens,
    token_blocks,
)
from ..generation import own_text
from ..tuner.callback import attach
from ..tuner.checkpoints import last_whole_checkpoint
from .arguments import CompressArguments
from .inputs import (
    about,
    adapted,
    bitsandbytes_config,
    hold_out,
    load_model,
    load_tokenizer,
    read_text,
    write_text,
)
from .plan import make_plan
from .recipe import Recipe
from .report import Measured, Messages, ReportData, TrainedRun, bytes_by_part, recorded_messages, write_report
from .results import RunResults

# Relative difference between perplexity in memory and after reloading that rounding may cause, bfloat16 included.
_RELOAD_TOLERANCE = 1e-3


def compress(recipe: Recipe, say: Callable[[str], None]) -> RunResults:
    """Plan, load, measure, train, merge, measure, save, and measure again in a new process.

    The compact model, its tokenizer, its model card and ``report.json`` go to ``output``. An earlier model there is
    replaced only when the new one is complete. A page with figures goes to ``OUTPUT_DIR/report``.

    Args:
        recipe: what to do.
        say: receives the lines that are meant for the user.

    Raises:
        LoraSVDError: the recipe cannot be carried out, or the saved model differs from the one in memory.
    """
    if recipe.training.world_size > 1:
        raise LoraSVDError(
            f"lora-svd compress: started in {recipe.training.world_size} processes, expected one. Several can train "
            "with Trainer and attach in a script; save its adapter, and merge that in one process"
        )
    with recorded_messages() as messages:
        return _compress(recipe, say, messages)


@dataclass(frozen=True)
class _Texts:
    """What a run reads.

    Attributes:
        tokenizer: of the model.
        blocks: token ids to train on, (blocks, length).
        evaluation: the text whose perplexity is measured.
        file: where that is.
    """

    tokenizer: PreTrainedTokenizerBase
    blocks: Tensor
    evaluation: str
    file: Path


def _compress(recipe: Recipe, say: Callable[[str], None], messages: Messages) -> RunResults:
    """Measure the dense model, train, export, verify what was saved, report."""
    run, clock, folder = recipe.run, _Clock(), recipe.compact_folder
    check_replaceable(folder)
    texts = _read_texts(recipe)
    plan = make_plan(recipe, len(texts.blocks) + run.own_text_blocks)
    say(f"{plan}\n")
    plan.check_memory()
    recipe.training.max_steps = plan.schedule.total_steps
    set_seed(recipe.training.seed)
    with clock("load"):
        quantization = bitsandbytes_config(run.base_quantization)
        model = load_model(run.model, run.dtype, recipe.training.device, quantization)
    with clock("evaluate dense"), about(str(texts.file)):
        dense = _measure(model, texts, run)
        say(f"perplexity of {run.model}: {dense.perplexity}")
    blocks = texts.blocks
    if run.own_text_blocks:
        with clock("own text"):
            blocks = torch.cat((blocks, _own_text(model, texts, run)))
    with clock("train and compress"):
        tuned, state = _train(model, blocks, recipe)
    trained = TrainedRun(tuned.base_model, state)
    with clock("merge"):
        model = tuned.merge_and_unload(quantization_config=bitsandbytes_config(run.export_quantization))
    with clock("evaluate compact"):
        compact = _measure(model, texts, run)
        say(f"perplexity of the compact model: {compact.perplexity}")
    with clock("save"):
        save_compact(model, folder, texts.tokenizer)
    with clock("reload and evaluate"):
        reloaded = _evaluate_in_new_process(folder, texts, recipe)
    with clock("report"):
        perplexities, training = _other_sizes(trained, model, texts, run), trained.summary()
    results = _results(recipe, dense, compact, reloaded, clock.seconds, trained.sketched())
    results.write(folder)
    data = ReportData(results, dense, compact, training, perplexities, run.prompt, messages)
    page = write_report(data, recipe.run_folder / "report")
    _check_reloaded(compact.perplexity, reloaded, folder)
    say(f"\n{results.table()}\n\nThe compact model is in {folder}, a report with figures in {page}.")
    say(f"The perplexities are those of {texts.file}.")
    if run.prompt:
        say(f"\nDense:   {dense.says}\n\nCompact: {compact.says}")
    return results


def _read_texts(recipe: Recipe) -> _Texts:
    """The texts in tokens; without one for the evaluation the end of the other goes to a file of the run's folder."""
    run = recipe.run
    tokenizer, text = load_tokenizer(run.model), read_text("text", run.text)
    if run.eval_text:
        file, evaluation = Path(run.eval_text), read_text("eval_text", run.eval_text)
    else:
        file = recipe.run_folder / "held_out.txt"
        with about(run.text):
            text, evaluation = hold_out(text, tokenizer, run.window)
        write_text("output_dir", file, evaluation)
    with about(run.text):
        blocks = token_blocks(tokenizer, text, run.block_length, bos=run.bos, field="block_length")
    return _Texts(tokenizer, blocks, evaluation, file)


def _own_text(model: PreTrainedModel, texts: _Texts, run: CompressArguments) -> Tensor:
    """Blocks that the dense model generates."""
    options = {"start": run.own_text_start or None, "bos": run.bos}
    return own_text(model, texts.tokenizer, run.own_text_blocks, run.block_length, **options)


def _measure(model: Any, texts: _Texts, run: CompressArguments) -> Measured:
    return Measured(
        size=parameter_report(model),
        bytes_by_part=bytes_by_part(model),
        perplexity=perplexity(model, texts.tokenizer, texts.evaluation, window=run.window, bos=run.bos),
        says=_continue_prompt(model, texts.tokenizer, run),
    )


def _other_sizes(
    trained: TrainedRun, model: PreTrainedModel, texts: _Texts, run: CompressArguments
) -> dict[float | None, Perplexity]:
    """Perplexity by size for the report; of a model in 4 bits none, whose other sizes would be in full precision."""
    options = {"text": texts.evaluation, "window": run.window, "max_tokens": run.report_tokens, "bos": run.bos}
    sizes = run.report_sizes if run.report_tokens and run.export_quantization == "none" else ()
    return trained.perplexities(model, sizes, partial(perplexity, tokenizer=texts.tokenizer, **options))


def _train(model: PreTrainedModel, blocks: Tensor, recipe: Recipe) -> tuple[Any, TrainerState]:
    """Train a LoraSVD adapter, which compresses the weights on the way; the PEFT model and the Trainer's state."""
    tuned: Any = adapted(model, recipe.config)
    trainer = Trainer(
        model=tuned,
        args=recipe.training,
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],  # pyright: ignore[reportArgumentType] - any sized sequence will do
    )
    attach(trainer)
    resume = recipe.training.resume_from_checkpoint
    if resume == "last":
        resume = last_whole_checkpoint(recipe.training.output_dir or ".")
    trainer.train(resume_from_checkpoint=resume)
    return tuned, trainer.state


def _evaluate_in_new_process(folder: Path, texts: _Texts, recipe: Recipe) -> Perplexity:
    """Perplexity of the saved model as a user gets it, in a process that nothing of this one can help."""
    run = recipe.run
    options = {"text": texts.file, "window": run.window, "bos": run.bos}
    options |= {"dtype": run.dtype, "device": recipe.training.device}
    command = [sys.executable, "-m", "lora_svd.cli", "evaluate", str(folder), "--json"]
    command += [f"--{name}={value}" for name, value in options.items() if value is not None]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise LoraSVDError(f"{folder}: saved, but a new process could not evaluate it (exit code {done.returncode})")
    return Perplexity(**json.loads(done.stdout))


def _results(
    recipe: Recipe,
    dense: Measured,
    compact: Measured,
    reloaded: Perplexity,
    seconds: dict[str, float],
    sketched: dict[str, float],
) -> RunResults:
    return RunResults(
        model=recipe.run.model,
        dense_bytes=dense.size.bytes,
        size=compact.size,
        perplexity_dense=dense.perplexity.value,
        perplexity_compact=compact.perplexity.value,
        perplexity_reloaded=reloaded.value,
        perplexity_tokens=dense.perplexity.tokens,
        window=recipe.run.window,
        seconds=seconds,
        recipe=recipe.chosen,
        bos=dense.perplexity.bos,
        sketched=sketched,
    )


def _check_reloaded(after: Perplexity, reloaded: Perplexity, folder: Path) -> None:
    if abs(reloaded.value - after.value) > _RELOAD_TOLERANCE * after.value:
        raise LoraSVDError(
            f"{folder}: perplexity is {after.value} in memory but {reloaded.value} when reloaded; do not use it"
        )


def _continue_prompt(model: Any, tokenizer: PreTrainedTokenizerBase, run: CompressArguments) -> str:
    """The prompt and its greedy continuation, the penalty lest a small model repeats itself; empty without a prompt."""
    if not run.prompt:
        return ""
    prompt = put_in_front(leading_tokens(tokenizer, run.bos), text_tokens(tokenizer, run.prompt))[None].to(model.device)
    options: Any = {"do_sample": False, "repetition_penalty": 1.2, "max_new_tokens": run.max_new_tokens}
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


class _Clock:
    """Says which phase begins, and keeps its wall time, in seconds, in the order they ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        tqdm.write(f"lora-svd: {phase}", file=sys.stderr)
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start
