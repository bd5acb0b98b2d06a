"""Perplexity against size: every importance and allocation of lora_svd on one model, one text and one token budget.

    python recipes/benchmarks/language_model.py --model MODEL --train wiki.valid.raw \
        --test wikitext2=wiki.test.raw c4=c4.txt --results recipes/benchmarks/language_model.json

A result is one row of the table at one size and seed. Results are written as they come; what is there is not run again.

One-shot rows share one observation: the adapter is trained with learning rate 0, so that it stays zero, while the
statistics are collected; each row then sets its importance and sizes on that model. Rows that train are one run each.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed

from lora_svd import LoraSVDCallback, LoraSVDConfig
from lora_svd.evaluation import perplexity
from lora_svd.importance import IMPORTANCES, Importance, plain
from lora_svd.statistics import STATISTICS

PUBLISHED = {"allocation": "uniform", "factor_format": "factors", "rank_multiple": 1}
OURS = {"allocation": "global", "factor_format": "pivoted", "rank_multiple": 8}
ONE_SHOT: dict[str, dict[str, Any]] = {
    "svd": {"importance": "none", **PUBLISHED},
    "fwsvd": {"importance": "fisher", **PUBLISHED},
    "asvd": {"importance": "activation_scale", **PUBLISHED},
    "svd_llm": {"importance": "activation", **PUBLISHED},
    "kfac_svd": {"importance": "kronecker", **PUBLISHED},
    "lora, as published": {"importance": "lora", **PUBLISHED},
    "ours, lora_activation": {"importance": "lora_activation", **OURS},
    "ours, gradient_activation": {"importance": "gradient_activation", **OURS},
    "ours, kronecker": {"importance": "kronecker", **OURS},
}
TRAINED: dict[str, dict[str, Any]] = {
    "svd_llm + LoRA": {"importance": "activation", **PUBLISHED},
    "ours + recovery": {"train_factors": True},
    "ours, kronecker + recovery": {"train_factors": True, "importance": "kronecker"},
}


@dataclass
class Arguments:
    """What to run."""

    model: str = field(metadata={"help": "Causal language model: a local folder or a name on the Hub."})
    train: list[str] = field(metadata={"help": "Text files to observe and to train on."})
    test: list[str] = field(metadata={"help": "NAME=FILE of each text to evaluate; nothing is tuned on them."})
    results: str = field(metadata={"help": "JSON file to read earlier results from and to write to."})
    rows: list[str] = field(default_factory=list, metadata={"help": "Names of rows; none: all of them."})
    sizes: list[float] = field(default_factory=lambda: [0.8, 0.6, 0.4, 0.2], metadata={"help": "param_ratio."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of the rows that train."})
    steps: int = field(default=100, metadata={"help": "Optimizer steps of a run, observation included."})
    observed_steps: int = field(default=40, metadata={"help": "Steps observed by the one-shot rows."})
    batch: int = field(default=2, metadata={"help": "Windows in a step."})
    window: int = field(default=1024, metadata={"help": "Tokens in a window, in training and evaluation."})
    eval_tokens: int = field(default=40960, metadata={"help": "Tokens of each test text that are evaluated."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of the rows that train; cosine decay."})
    config: str = field(default="{}", metadata={"help": "JSON of LoraSVDConfig fields for 'ours', for ablations."})
    label: str = field(default="", metadata={"help": "Put behind the row's name, for ablations."})


def main() -> None:
    parser: Any = HfArgumentParser(Arguments)  # pyright: ignore[reportArgumentType]
    (given,) = parser.parse_args_into_dataclasses()
    bench = Benchmark(given)
    for name in given.rows or ["dense", *ONE_SHOT, "dense + LoRA", *TRAINED]:
        bench.run(name)


class Benchmark:
    """Texts, results and the model that the one-shot rows share."""

    def __init__(self, given: Arguments) -> None:
        self.given = given
        self.path = Path(given.results)
        self.results: list[dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else []
        self.tokenizer = AutoTokenizer.from_pretrained(given.model)
        self.texts = {name: read_text(Path(path)) for name, path in (entry.split("=", 1) for entry in given.test)}
        self._observed: Any = None

    def run(self, name: str) -> None:
        """All sizes and seeds of a row that have no result yet."""
        if name == "dense":
            if self._missing(name, 1.0, 0):
                self._measure(name, 1.0, 0, load(self.given.model), 0.0)
        elif name in ONE_SHOT:
            for size in self.given.sizes:
                if self._missing(name, size, 0):
                    start = time.perf_counter()
                    model = self._compressed(ONE_SHOT[name], size)
                    self._measure(name, size, 0, model, time.perf_counter() - start)
        else:
            config = {"param_ratio": 1.0} if name == "dense + LoRA" else TRAINED[name] | json.loads(self.given.config)
            for size in [1.0] if name == "dense + LoRA" else self.given.sizes:
                for seed in self.given.seeds:
                    if self._missing(name, size, seed):
                        start = time.perf_counter()
                        model = self._trained({**config, "param_ratio": size}, seed)
                        self._measure(name, size, seed, model, time.perf_counter() - start)

    def _compressed(self, choices: dict[str, Any], size: float) -> Any:
        """The observed model at another importance, allocation and size."""
        if self._observed is None:
            presets = {ONE_SHOT[row]["importance"] for row in self.given.rows or ONE_SHOT if row in ONE_SHOT}
            needed = {name for preset in presets for name in IMPORTANCES[preset].statistics}
            # the order of the registry, so that a statistic finds the ones it is built on
            IMPORTANCES["benchmark"] = Importance(tuple(name for name in STATISTICS if name in needed), plain)
            config = LoraSVDConfig(param_ratio=0.99, importance="benchmark", warmup=self.given.observed_steps)
            self._observed = self._train(config, self.given.observed_steps, learning_rate=0.0, seed=0)
        config = self._observed.peft_config["default"]
        for field_name, value in choices.items():
            setattr(config, field_name, value)
        self._observed.base_model.set_param_ratio(size)
        return self._observed

    def _trained(self, choices: dict[str, Any], seed: int) -> Any:
        tuned = self._train(LoraSVDConfig(**choices), self.given.steps, self.given.learning_rate, seed)
        return tuned.merge_and_unload()

    def _train(self, config: LoraSVDConfig, steps: int, learning_rate: float, seed: int) -> Any:
        set_seed(seed)
        tuned = get_peft_model(load(self.given.model), config)
        arguments = TrainingArguments(
            output_dir=str(self.path.with_suffix("")) + "-runs",
            max_steps=steps,
            per_device_train_batch_size=self.given.batch,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            bf16=True,
            use_cpu=not torch.accelerator.is_available(),
            logging_strategy="no",
            disable_tqdm=True,
            save_strategy="no",
            report_to=[],
            seed=seed,
        )
        dataset: Any = list(self._windows())
        Trainer(model=tuned, args=arguments, train_dataset=dataset, callbacks=[LoraSVDCallback()]).train()
        return tuned

    def _windows(self) -> Iterator[dict[str, Any]]:
        text = "\n\n".join(read_text(Path(path)) for path in self.given.train)
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids) - self.given.window + 1, self.given.window):
            window = ids[start : start + self.given.window]
            yield {"input_ids": window, "labels": window}

    def _missing(self, name: str, size: float, seed: int) -> bool:
        key = (name + self.given.label, size, seed)
        return all((row["row"], row["param_ratio"], row["seed"]) != key for row in self.results)

    def _measure(self, name: str, size: float, seed: int, model: Any, seconds: float) -> None:
        result = {"row": name + self.given.label, "param_ratio": size, "seed": seed, "seconds": round(seconds, 1)}
        with torch.autocast(device_type=model.device.type, dtype=torch.bfloat16):
            for text_name, text in self.texts.items():
                value = perplexity(model, self.tokenizer, self._head(text), window=self.given.window)
                result[text_name] = round(value.value, 4)
        self.results.append(result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.results, indent=1) + "\n")
        print(json.dumps(result), flush=True)

    def _head(self, text: str) -> str:
        """The beginning of a text, of the number of tokens that is evaluated."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: self.given.eval_tokens]
        return self.tokenizer.decode(ids)


def load(name: str) -> Any:
    """The dense model in float32."""
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def read_text(path: Path) -> str:
    """A text file by the WikiText convention (lines joined by blank lines), or the ``text`` fields of JSON lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".jsonl":
        return "\n\n".join(json.loads(line)["text"] for line in lines if line)
    return "\n\n".join(lines)


if __name__ == "__main__":
    main()
