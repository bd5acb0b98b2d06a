"""What the benchmarks share: texts, a Trainer run, results that survive a kill,
and the memory and time that work takes."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed

from lora_svd import LoraSVDCallback, LoraSVDModel
from lora_svd.evaluation import leading_tokens, perplexity, token_blocks

CACHE = Path(".cache/benchmarks")
# how the published factorizations choose ranks and store factors
PUBLISHED: dict[str, Any] = {"allocation": "uniform", "factor_format": "factors", "rank_multiple": 1}


@dataclass
class TextArguments:
    """What every benchmark on texts is told."""

    model: str = field(metadata={"help": "Causal language model: a local folder or a name on the Hub."})
    train: list[str] = field(metadata={"help": "Text files to observe and to train on."})
    test: list[str] = field(metadata={"help": "NAME=FILE of each text to evaluate; nothing is tuned on them."})
    results: str = field(metadata={"help": "File of JSON lines to read earlier results from and to append to."})
    rows: list[str] = field(default_factory=list, metadata={"help": "Names of rows; none: all of them."})
    batch: int = field(default=2, metadata={"help": "Windows in a step."})
    window: int = field(default=1024, metadata={"help": "Tokens in a window, in training and evaluation."})
    bos: bool | None = field(default=None, metadata={"help": "Whether windows begin with BOS; unset: as tokenized."})
    eval_tokens: int = field(default=40960, metadata={"help": "Tokens of each test text that are evaluated."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of rows that train; cosine decay."})


@dataclass
class CostArguments:
    """What to measure of cost."""

    model: str = field(metadata={"help": "Causal language model: a local folder or a name on the Hub."})
    results: str = field(metadata={"help": "File of JSON lines to append to; rows that it has are not repeated."})
    rows: list[str] = field(default_factory=list, metadata={"help": "Names of rows; none: all of them."})
    batch: int = field(default=2, metadata={"help": "Windows in a step."})
    window: int = field(default=1024, metadata={"help": "Tokens in a window."})
    steps: int = field(default=60, metadata={"help": "Optimizer steps of a whole run."})
    repetitions: int = field(default=7, metadata={"help": "Of each of the two things that are compared."})
    blocks: int = field(default=3, metadata={"help": "Decoder blocks, of seven layers each, that are factorized."})
    compact: list[str] = field(default_factory=list, metadata={"help": "Folders of compact models."})


class Texts:
    """The texts that the arguments name, tokenized: ``examples`` to train on, ``held_out`` by name."""

    def __init__(self, given: TextArguments) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(given.model)
        self.window, self.bos = given.window, given.bos
        self.leading: list[int] = leading_tokens(self.tokenizer, given.bos).tolist()
        train = (read_text(Path(path)) for path in given.train)
        self.examples: Any = windows(self.tokenizer, train, given.window, given.bos)
        texts = ((name, read_text(Path(path))) for name, path in (entry.split("=", 1) for entry in given.test))
        self.held_out = {name: head(self.tokenizer, text, given.eval_tokens) for name, text in texts}

    def perplexities(self, model: Any) -> dict[str, Any]:
        """Perplexity on every held-out text, under the caller's autocast, and the ``bos`` that windows begin with, if
        there is one."""
        found: dict[str, Any] = {
            name: round(perplexity(model, self.tokenizer, text, window=self.window, bos=self.bos).value, 4)
            for name, text in self.held_out.items()
        }
        return found | ({"bos": "".join(self.tokenizer.convert_ids_to_tokens(self.leading))} if self.leading else {})


def load(name: str) -> Any:
    """The dense model in float32."""
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def read_text(path: Path) -> str:
    """A text file by the WikiText convention (lines joined by blank lines), or the ``text`` fields of JSON lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".jsonl":
        return "\n\n".join(json.loads(line)["text"] for line in lines if line)
    return "\n\n".join(lines)


def head(tokenizer: Any, text: str, tokens: int) -> str:
    """The beginning of a text, ``tokens`` long."""
    return tokenizer.decode(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:tokens])


def windows(tokenizer: Any, texts: Iterable[str], length: int, bos: bool | None) -> list[dict[str, Any]]:
    """Training examples: consecutive windows of the joined texts."""
    blocks = token_blocks(tokenizer, "\n\n".join(texts), length, bos=bos)
    return [{"input_ids": block, "labels": block} for block in blocks]


def training_arguments(
    folder: Path, *, steps: int, batch: int, learning_rate: float, seed: int, **changes: Any
) -> TrainingArguments:
    """The settings of every run: AdamW, 5 steps of warm-up, cosine decay, bfloat16 autocast, but for ``changes``."""
    schedule: dict[str, Any] = {"lr_scheduler_type": "cosine", "warmup_steps": 5, "bf16": True}
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        use_cpu=not torch.accelerator.is_available(),
        logging_strategy="no",
        disable_tqdm=True,
        save_strategy="no",
        report_to=[],
        seed=seed,
        **{**schedule, **changes},
    )


def train(model: Any, examples: Any, arguments: TrainingArguments, *callbacks: TrainerCallback) -> Any:
    """Train in place, the same examples in the same order for the same seed."""
    set_seed(arguments.seed)
    Trainer(model=model, args=arguments, train_dataset=examples, callbacks=list(callbacks)).train()
    return model


def phases_of(model: Any) -> list[TrainerCallback]:
    """What takes a LoraSVD adapter through its phases, where the model has one."""
    return [LoraSVDCallback()] if isinstance(getattr(model, "base_model", None), LoraSVDModel) else []


def ranks_alone(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of ours as they were before neurons were priced, by the names of their results."""
    ours = {name: row for name, row in rows.items() if name.startswith("ours")}
    return {f"{name} (ranks alone)": replace(row, make=partial(row.make, neurons=False)) for name, row in ours.items()}


def cache_folder(kind: str, known: list[Any]) -> Path:
    """Where something is kept that ``known``, plain values, determine."""
    return CACHE / f"{kind}-{sha256(json.dumps(known).encode()).hexdigest()[:12]}"


class Results:
    """A file of JSON lines, one result a line, so that a kill loses nothing and two processes can fill one table."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All results so far."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def has(self, **key: Any) -> bool:
        """Whether a result with these values is there."""
        return any(all(result.get(name) == value for name, value in key.items()) for result in self.read())

    def add(self, result: dict[str, Any]) -> None:
        """Append one result and print it."""
        line = json.dumps(result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


class PeakMemory:
    """The most memory held while :meth:`watch` is open, in MiB: of the accelerator, or resident in this process,
    sampled ten times a second, where there is none."""

    mebibytes = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        if torch.accelerator.is_available():
            torch.accelerator.reset_peak_memory_stats()
            yield
            self.mebibytes = torch.accelerator.max_memory_allocated() >> 20
            return
        done, process = threading.Event(), psutil.Process()
        samples = [process.memory_info().rss]

        def sample() -> None:
            while not done.wait(0.1):
                samples.append(process.memory_info().rss)

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.mebibytes = max(samples) >> 20


def paired(ours: Callable[[], Any], theirs: Callable[[], Any], repetitions: int) -> dict[str, float]:
    """Median seconds of both, and the medians of the ratios ours / theirs of every pair in wall and CPU time."""
    wall: list[tuple[float, float]] = []
    cpu: list[tuple[float, float]] = []
    for index in range(repetitions + 1):
        walls, cpus = zip(*map(timed, (ours, theirs)), strict=True)
        if index:  # the first pair warms up
            wall.append(walls)
            cpu.append(cpus)
    return {
        "ours_seconds": round(statistics.median(mine for mine, _ in wall), 5),
        "theirs_seconds": round(statistics.median(other for _, other in wall), 5),
        "wall_ratio": round(statistics.median(mine / other for mine, other in wall), 4),
        "cpu_ratio": round(statistics.median(mine / other for mine, other in cpu), 4),
    }


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu
