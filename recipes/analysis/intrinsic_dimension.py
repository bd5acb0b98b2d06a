"""How many dimensions does a sentence-classification task need? d_90 of an encoder, by training in random subspaces.

    python recipes/analysis/intrinsic_dimension.py --model ENCODER --train_file train.jsonl --eval_file dev.jsonl \
        --dimensions 10 100 1000 10000 --output_dir runs/intrinsic_dimension --num_train_epochs 3

The files have one JSON object ``{"sentence": text, "label": integer}`` a line. First all N parameters are trained, at
``--learning_rate``; then d coordinates, from the same start, at ``step_length * learning_rate * sqrt(N / d)``: with the
step length 1 an optimizer like Adam, whose steps have the length of the learning rate in each coordinate, moves the
parameters as far as in full training. One JSON line a result. The accuracy of a dimension is that of the best of
``--step_lengths``, on the evaluation file, as in the papers.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from lora_svd.analysis.intrinsic_dimension import intrinsic_dimension, random_subspace
from lora_svd.errors import LoraSVDError


@dataclass
class TaskArguments:
    """What is trained on what."""

    model: str = field(metadata={"help": "Encoder: a local folder or a name on the Hub."})
    train_file: str = field(metadata={"help": "JSON lines to train on."})
    eval_file: str = field(metadata={"help": "JSON lines to measure the accuracy on."})
    dimensions: list[int] = field(
        default_factory=lambda: [10, 30, 100, 300, 1000, 3000, 10000], metadata={"help": "Dimensions to try."}
    )
    step_lengths: list[float] = field(
        default_factory=lambda: [1.0, 3.0], metadata={"help": "In units of full training's; the best one counts."}
    )
    structure_aware: bool = field(default=False, metadata={"help": "SAID: a scale for each layer, counted as one."})
    max_train_samples: int = field(default=0, metadata={"help": "Lines of train_file to use; 0: all."})
    max_eval_samples: int = field(default=0, metadata={"help": "Lines of eval_file to use; 0: all."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a sentence that are read."})


# The subspace hides the signature that Trainer takes the names of columns and labels from.
DEFAULTS = {
    "save_strategy": "no",
    "report_to": "none",
    "remove_unused_columns": False,
    "label_names": ["labels"],
}


def read_samples(path: str, tokenizer: Any, max_length: int, count: int) -> list[dict[str, Any]]:
    """Tokenized lines of a file."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: count or None]]
    return [
        {**tokenizer(row["sentence"], truncation=True, max_length=max_length), "labels": row["label"]} for row in rows
    ]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the samples whose label has the highest score."""
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


def main() -> None:
    """Accuracy of full training and by dimension, and d_90."""
    parser = HfArgumentParser([TaskArguments, TrainingArguments])  # pyright: ignore[reportArgumentType] - dataclasses
    parser.set_defaults(**DEFAULTS)
    task, training = parser.parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    train = read_samples(task.train_file, tokenizer, task.max_length, task.max_train_samples)
    dev = read_samples(task.eval_file, tokenizer, task.max_length, task.max_eval_samples)
    num_labels = 1 + max(sample["labels"] for sample in train + dev)
    rate = training.learning_rate

    def measure(dimension: int | None, step_length: float = 1.0) -> float:
        set_seed(training.seed)  # the same new head and the same batches every time
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(task.model, num_labels=num_labels)
        training.learning_rate = rate
        if dimension is not None:
            training.learning_rate *= step_length * math.sqrt(sum(p.numel() for p in model.parameters()) / dimension)
            model = random_subspace(model, dimension, structure_aware=task.structure_aware, seed=training.seed)
        trainer = Trainer(
            model=model,
            args=training,
            train_dataset=train,  # pyright: ignore[reportArgumentType] - any sized sequence will do
            eval_dataset=dev,  # pyright: ignore[reportArgumentType]
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=accuracy,
        )
        trainer.train()
        value = trainer.evaluate()["eval_accuracy"]
        result = {
            "dimension": dimension or "full",
            "learning_rate": training.learning_rate,
            "accuracy": round(value, 4),
        }
        print(json.dumps(result), flush=True)
        return value

    full = measure(None)
    accuracies = {d: max(measure(d, length) for length in task.step_lengths) for d in sorted(task.dimensions)}
    try:
        print(json.dumps({"d_90": intrinsic_dimension(accuracies, full)}))
    except LoraSVDError as error:
        print(json.dumps({"d_90": None, "why": str(error)}))


if __name__ == "__main__":
    main()
