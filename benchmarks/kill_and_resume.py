"""Kill a training run again and again, resume it, and compare the end with that of a run that was left alone.

Every attempt is a process with a real Trainer run of a tiny model: it resumes from the last whole checkpoint, is
observed, compressed on a cubic, recovers, saves a checkpoint every other step, keeps two of them, and exports over an
earlier export. It is killed with SIGKILL at a random moment of a phase; each phase has its turn. At the end the files
of the last checkpoint and of the compact model must be those of the uninterrupted run, to the bit.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Results
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lora_svd import LoraSVDCallback, LoraSVDConfig, LoraSVDError
from lora_svd.compact import save_compact
from lora_svd.compact.folder import checksums
from lora_svd.tuner.checkpoints import check_checkpoint, last_whole_checkpoint

STEPS, EVERY, WARMUP, COMPRESSION = 12, 2, 3, 6
PHASES = ("load", "observe", "compress", "recover", "checkpoint", "merge", "export")
CUBIC = {"warmup": WARMUP, "compression": COMPRESSION, "compression_interval": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": CUBIC,
    "trained factors, distillation": {**CUBIC, "train_factors": True, "distillation": 0.5},
    "kronecker": {**CUBIC, "importance": "kronecker"},
}
Report = Callable[[str, int], object]


def build() -> LlamaForCausalLM:
    """The same random weights every time."""
    torch.manual_seed(0)
    sizes: Any = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def wrap(**settings: Any) -> Any:
    """The model with its adapter, untrained."""
    return get_peft_model(build(), LoraSVDConfig(r=4, param_ratio=0.6, rank_multiple=1, **settings))


class Reporter(TrainerCallback):
    """Says which phase begins; after ``LoraSVDCallback``, so that its checksums belong to the checkpoint."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        compressed = WARMUP + COMPRESSION
        phase = (
            "observe" if state.global_step < WARMUP - 1 else "compress" if state.global_step < compressed else "recover"
        )
        self.report(phase, state.global_step)

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        if control.should_save:
            self.report("checkpoint", state.global_step)


def attempt(folder: Path, settings: dict[str, Any], report: Report) -> None:
    """Resume, train to the end, merge, export."""
    report("load", 0)
    model = wrap(lora_dropout=0.1, **settings)
    rows = torch.randint(3, 64, (16, 8), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=EVERY,
        save_total_limit=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],  # pyright: ignore[reportArgumentType]
        callbacks=[LoraSVDCallback(), Reporter(report)],
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder / "run"))
    report("merge", STEPS)
    compact = model.merge_and_unload()
    report("export", STEPS)
    save_compact(compact, folder / "compact")
    report("end", STEPS)


@dataclass(frozen=True)
class Moment:
    """The beginning of a phase: its name, the step, and the time on a clock that all processes share."""

    phase: str
    step: int
    seconds: float


def in_new_process(log: Path, work: Callable[[Report], None]) -> tuple[int, Iterator[Moment]]:
    """Fork, which costs milliseconds where a start of Python costs seconds: the process, and what it reports."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, _moments(reading)
    status = 1
    try:
        os.close(reading)
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            work(lambda phase, step: os.write(writing, f"{phase} {step} {time.monotonic()}\n".encode()))
            status = 0
    except BaseException:  # noqa: BLE001 - a forked process must not go on as its parent
        log.write_text(traceback.format_exc())
    finally:
        os._exit(status)


def _moments(reading: int) -> Iterator[Moment]:
    with os.fdopen(reading) as lines:
        for line in lines:
            phase, step, seconds = line.split()
            yield Moment(phase, int(step), float(seconds))


def uninterrupted(folder: Path, work: Callable[[Report], None]) -> list[Moment]:
    """All moments of a run to its end."""
    process, moments = in_new_process(folder / "log", work)
    seen = list(moments)
    _, status = os.waitpid(process, 0)
    if status:
        raise SystemExit(f"a run that was not killed failed:\n{(folder / 'log').read_text()}")
    return seen


def killed(folder: Path, work: Callable[[Report], None], target: Moment, delay: float) -> str | None:
    """Kill a run ``delay`` seconds after the target began: the phase it was in, or None if it came to its end."""
    process, moments = in_new_process(folder / "log", work)
    seen = []
    for moment in moments:
        seen.append(moment)
        if (moment.phase, moment.step) == (target.phase, target.step):
            time.sleep(max(0.0, moment.seconds + delay - time.monotonic()))
            os.kill(process, signal.SIGKILL)
            break
    seen += list(moments)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return seen[-1].phase if seen[-1].phase != "end" else None
    if status:
        raise SystemExit(f"a run could not be resumed:\n{(folder / 'log').read_text()}")
    return None


def end_state(folder: Path) -> dict[str, str]:
    """Checksums of what counts at the end: the model shipped, and the adapter and optimizer of the last checkpoint."""
    last = folder / "run" / f"checkpoint-{STEPS}"
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)  # noqa: TID251 - as Trainer saves it
    # Of its content: how it is pickled depends on where its objects come from.
    content = hashlib.sha256(json.dumps(optimizer, default=torch.Tensor.tolist).encode()).hexdigest()
    return {**export(folder / "compact"), **checksums(last, [last / "adapter_model.safetensors"]), "optimizer": content}


def export(compact: Path) -> dict[str, str]:
    return checksums(compact, [compact / "model.safetensors", compact / "config.json"])


def num_torn(folder: Path) -> int:
    """Checkpoints that are not whole."""
    torn = 0
    for checkpoint in (folder / "run").glob("checkpoint-*"):
        try:
            check_checkpoint(checkpoint)
        except LoraSVDError:
            torn += 1
    return torn


@dataclass
class Reference:
    """What an uninterrupted run gives, and what was exported before it."""

    settings: dict[str, Any]
    previous: Path
    moments: list[Moment]
    end: dict[str, str]

    @classmethod
    def make(cls, folder: Path, settings: dict[str, Any]) -> Reference:
        previous = folder / "previous"
        folder.mkdir()
        uninterrupted(folder, lambda _: save_compact(wrap(importance="none").merge_and_unload(), previous))
        shutil.copytree(previous, folder / "compact")
        moments = uninterrupted(folder, lambda report: attempt(folder, settings, report))
        return cls(settings, previous, moments, end_state(folder))

    def targets(self, phases: list[str], rng: random.Random) -> list[tuple[Moment, float]]:
        """A random moment in each phase, in the order in which a run comes to them."""
        ends = dict(zip(self.moments, self.moments[1:], strict=False))
        chosen = [rng.choice([moment for moment in ends if moment.phase == phase]) for phase in phases]
        chosen.sort(key=lambda moment: moment.seconds if moment.phase != "load" else rng.choice(self.moments).seconds)
        return [(moment, rng.random() * (ends[moment].seconds - moment.seconds)) for moment in chosen]


def one_run(folder: Path, reference: Reference, targets: list[tuple[Moment, float]]) -> dict[str, Any]:
    """A run that is killed at every target and then left alone; what happened."""
    start, kills, torn, kept = time.monotonic(), Counter(), 0, True
    folder.mkdir()
    shutil.copytree(reference.previous, folder / "compact")
    exports = [export(reference.previous), {name: reference.end[name] for name in ("config.json", "model.safetensors")}]

    def work(report: Report) -> None:
        attempt(folder, reference.settings, report)

    for target, delay in targets:
        phase = killed(folder, work, target, delay)
        if phase is None:
            continue
        kills[phase] += 1
        torn += num_torn(folder)
        in_place = folder / "compact"
        kept &= export(in_place if in_place.exists() else folder / ".compact-old") in exports
    uninterrupted(folder, work)
    return {
        "kills": {phase: kills[phase] for phase in PHASES if kills[phase]},
        "torn_checkpoints": torn,
        "export_whole_after_every_kill": kept,
        "different": [name for name, digest in end_state(folder).items() if reference.end[name] != digest],
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> None:
    """Runs until there are enough kills; stops with an error at the first run that ends otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60, help="Least number of kills.")
    parser.add_argument("--kills_per_run", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, required=True, help="File of JSON lines to append to.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    wrap()  # fills transformers' tables, which take seconds, once for all processes
    gc.collect()
    gc.freeze()
    rng, results, phases = random.Random(given.seed), Results(given.results), itertools.cycle(PHASES)
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as root:
        references: dict[str, Reference] = {}
        for number, name in enumerate(itertools.cycle(SETTINGS)):
            if name not in references:
                references[name] = Reference.make(Path(root) / f"reference-{len(references)}", SETTINGS[name])
            targets = references[name].targets(list(itertools.islice(phases, given.kills_per_run)), rng)
            folder = Path(root) / f"run-{number}"
            found = {"settings": name, "run": number, **one_run(folder, references[name], targets)}
            results.add(found)
            if not (not found["different"] and found["export_whole_after_every_kill"]):
                raise SystemExit(f"run {number} ({name}) did not survive its kills")
            shutil.rmtree(folder)
            total.update(found["kills"])
            if total.total() >= given.kills:
                break
    print(f"{total.total()} kills: {dict(total)}")


if __name__ == "__main__":
    main()
