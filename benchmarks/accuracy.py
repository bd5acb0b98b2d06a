"""Accuracy on ARC-Easy, HellaSwag and LAMBADA, zero-shot, through lm-eval and from local files.

``tasks/*.yaml`` are lm-eval's own definitions of the tasks, but for the names of the columns; each says which file
below the data folder it reads and which metric it reports.
"""

from __future__ import annotations

import copy
import glob
import math
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict
from torch import Tensor, nn

from lora_svd.errors import NumericalError
from lora_svd.evaluation import evaluation_mode, leading_tokens, put_in_front, text_tokens

TASKS = Path(__file__).parent / "tasks"


def task_accuracies(
    model: nn.Module,
    tokenizer: Any,
    data: Path,
    limit: int | None = None,
    batch_size: int = 8,
    bos: bool | None = None,
) -> dict[str, float]:
    """The share of documents, from 0 to 1, that ``model`` answers rightly, by task.

    Convention: zero-shot, without chat template; in front of the question the BOS token where the tokenizer puts it in
    front of a text, and no other special tokens.
    ``arc_easy`` (lm-eval's ``acc``): the choice of the highest log-likelihood is the right one; chance is 1/4.
    ``hellaswag`` (``acc_norm``): the same, the log-likelihood divided by the characters of the choice; chance is 1/4.
    ``lambada`` (``acc``): every token of the last word is the most likely one; chance is 0.
    Others report ``acc_norm`` of ARC-Easy or ``acc`` of HellaSwag: such numbers are not comparable with these.

    The model is used as it is: its dtype and device, adapters included, under the caller's autocast if there is one.
    Log-probabilities are reduced in float32. Evaluation mode is set during the call and restored after it.

    Args:
        model: a causal language model of transformers, with or without PEFT adapters.
        tokenizer: its tokenizer; not changed.
        data: folder with ``arc_easy/test.jsonl``, ``hellaswag/validation_1000.jsonl`` and ``lambada/test.jsonl``.
        limit: documents of each task, the first ones; None: all of them.
        batch_size: sequences in one forward pass; changes memory and speed, and the log-likelihoods by rounding only.
        bos: whether a question begins with the BOS token, see ``lora_svd.evaluation.leading_tokens``.

    Raises:
        ValueError: ``limit`` or ``batch_size`` is below 1.
        FileNotFoundError: ``data`` lacks a file.
        NumericalError: a log-likelihood is not finite.
    """
    if limit is not None and limit < 1:  # lm-eval takes 0 for all documents and a fraction for a share of them
        raise ValueError(f"limit is {limit}; it must be at least 1 document, or None for all of them")
    if batch_size < 1:  # lm-eval takes 0 for one batch of everything
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    tasks = load_tasks(data)
    with evaluation_mode(model):
        # simple_evaluate would also seed all generators, and run git and pip to describe the environment
        results: Any = evaluate(
            lm=_language_model(model, tokenizer, batch_size, bos),
            task_dict=tasks,
            limit=limit,
            bootstrap_iters=0,
        )
    return {name: _accuracy(results, name, task) for name, task in tasks["tasks"].items()}


def load_tasks(data: Path) -> TaskDict:
    """lm-eval's tasks of ``tasks/*.yaml`` on the files of the folder ``data``, with all documents in memory."""
    configs = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(TASKS.glob("*.yaml"))]
    for config in configs:
        files = config["dataset_kwargs"]["data_files"]
        for split, name in files.items():
            path = data.resolve() / name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: {config['task']} reads {name} below the data folder")
            files[split] = glob.escape(str(path))
    with tempfile.TemporaryDirectory() as cache:  # or every version of the files stays in the user's cache
        for config in configs:
            config["dataset_kwargs"] |= {"cache_dir": cache, "keep_in_memory": True}
        return TaskManager(include_defaults=False).load(configs)


def _accuracy(results: Any, name: str, task: Any) -> float:
    """The one metric that the task's file lists; an error instead of a guess where the model gave no number."""
    for sample in results["samples"][name]:
        likelihoods = [likelihood for likelihood, _ in sample["filtered_resps"]]
        if not all(map(math.isfinite, likelihoods)):
            raise NumericalError(
                f"document {sample['doc_id']} of {name} has log-likelihoods {likelihoods}: the weights hold NaN, or "
                "activations overflow"
            )
    (metric,) = task.get_config("metric_list")
    return float(results["results"][name][f"{metric['metric']},none"])


class _LanguageModel(cast(Any, HFLM)):  # the registry hides its parameters from type checkers
    """lm-eval's view of a model that reads its text behind the tokens ``leading``.

    lm-eval itself knows whether the tokenizer adds its special tokens, not where: it takes one that is put behind the
    question for a part of the answer.
    """

    leading: Tensor

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        ids = text_tokens(self.tokenizer, string)
        return (ids if add_special_tokens is False else put_in_front(self.leading, ids)).tolist()


def _language_model(model: Any, tokenizer: Any, batch_size: int, bos: bool | None) -> Any:
    """lm-eval's view of the model, which it sets to evaluation mode."""
    device, leading = model.device.type, leading_tokens(tokenizer, bos)
    made = _LanguageModel(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # lm-eval gives it a padding token if it has none
        batch_size=batch_size,
        softmax_dtype=torch.float32,  # sums of bfloat16 log-probabilities are too coarse to rank choices
        # without it, lm-eval switches the caller's autocast off
        mixed_precision_dtype=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        prefix_token_id=leading.tolist()[-1] if len(leading) else None,
    )
    made.leading = leading
    return made
