"""Sentences to make choices on, so that nothing is tuned on a dev set: they are kept out of the training set.

SST-2's training set holds phrases of its sentences as well; those of a sentence that is kept out go with it.

    python benchmarks/keep_out.py --train train.jsonl --folder chosen_on [--number 1500]
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from task_data import write_split
from transformers import HfArgumentParser

WHOLE = 15  # words from which on a line is taken for a whole sentence


@dataclass
class Arguments:
    """What is divided."""

    train: str = field(metadata={"help": 'JSON lines {"sentence": text, "label": integer}.'})
    folder: str = field(metadata={"help": "Where train.jsonl, what is left, and dev.jsonl, what is kept out, go."})
    number: int = field(default=1500, metadata={"help": "Sentences that are kept out."})


def keep_out(samples: list[dict[str, Any]], number: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The samples without the kept-out ones and all that is a part of one or has one as a part; and the kept-out ones,
    drawn at random, by seed 0, from those of at least 15 words."""
    texts = [f" {sample['sentence'].strip()} " for sample in samples]
    whole = [index for index, text in enumerate(texts) if len(text.split()) >= WHOLE]
    chosen = random.Random(0).sample(whole, number)
    joined, held = "\n".join(texts[index] for index in chosen), [texts[index] for index in chosen]
    longer = {index for index in whole if any(text in texts[index] for text in held)}
    left = [index for index, text in enumerate(texts) if index not in longer and text not in joined]
    return [samples[index] for index in left], [samples[index] for index in chosen]


def main() -> None:
    parser: Any = HfArgumentParser(Arguments)  # pyright: ignore[reportArgumentType]
    (given,) = parser.parse_args_into_dataclasses()
    lines = Path(given.train).read_text(encoding="utf-8").splitlines()
    train, dev = keep_out([json.loads(line) for line in lines], given.number)
    write_split(Path(given.folder), train=train, dev=dev)


if __name__ == "__main__":
    main()
