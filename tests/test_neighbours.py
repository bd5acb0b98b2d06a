"""What other packages do with a model before, while and after it becomes compact."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from models import LLAMA, VOCABULARY, assert_kept, logits, make_trainer, settings, trained
from peft import PeftConfig, PeftModel, get_peft_model
from tiny_lm import make_text, save_tiny_lm
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_svd import LoraSVDCallback, LoraSVDError
from lora_svd.compact import densify, parameter_report

METHODS: dict[str, Callable[[], PeftConfig]] = {
    "dora": lambda: peft.LoraConfig(target_modules="all-linear", r=2, use_dora=True),
    "pissa": lambda: peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights="pissa"),
    "ia3": lambda: peft.IA3Config(target_modules="all-linear", feedforward_modules=[]),
    "loha": lambda: peft.LoHaConfig(target_modules="all-linear", r=2),
    "vera": lambda: peft.VeraConfig(target_modules="all-linear", r=2),
    "this one": lambda: settings(param_ratio=1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compact model; read only."""
    root = tmp_path_factory.mktemp("compact")
    trained(root / "run").merge_and_unload().save_pretrained(root / "compact")
    return root / "compact"


@pytest.mark.parametrize("name", METHODS)
def test_any_peft_method_on_top(name: str, folder: Path, tmp_path: Path) -> None:
    """Trained, saved, reloaded and merged; the model is as small as before."""
    untouched = LLAMA.model.from_pretrained(folder)
    model = get_peft_model(LLAMA.model.from_pretrained(folder), METHODS[name]())
    make_trainer(model, tmp_path, callbacks=[]).train()
    expected = logits(model)
    assert not torch.equal(expected, logits(untouched))
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(LLAMA.model.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert parameter_report(merged) == parameter_report(untouched)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(LLAMA.model.from_pretrained(tmp_path / "merged")), logits(merged))


def test_a_compact_model_is_compressed_again_only_from_its_dense_form(folder: Path, tmp_path: Path) -> None:
    """Factors of factors could not be loaded."""
    compact = LLAMA.model.from_pretrained(folder)
    with pytest.raises(LoraSVDError, match=r"^param_ratio: got 0\.3 for a model that is compact already.*densify"):
        get_peft_model(compact, settings(param_ratio=0.3))
    model = get_peft_model(densify(compact), settings(param_ratio=0.3))
    make_trainer(model, tmp_path).train()
    smaller = model.merge_and_unload()
    assert_kept(smaller, 0.3)
    smaller.save_pretrained(tmp_path / "smaller")
    assert torch.equal(logits(LLAMA.model.from_pretrained(tmp_path / "smaller")), logits(smaller))


def counting(step: int, num_rows: int, seed: int) -> Tensor:
    """Rows in which each token is the last one plus ``step``."""
    start = torch.randint(VOCABULARY, (num_rows, 1), generator=torch.Generator().manual_seed(seed))
    return (start + step * torch.arange(8)) % VOCABULARY


def fit(model: nn.Module, step: int, num_steps: int, learning_rate: float, tuner: nn.Module | None = None) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate)
    for index in range(num_steps):
        rows = counting(step, 32, seed=index)
        model.train()(input_ids=rows, labels=rows).loss.backward()
        if tuner is not None:
            tuner.update_and_allocate(index, num_steps)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss_of(model: nn.Module, step: int) -> float:
    rows = counting(step, 64, seed=10_000)
    return float(model.eval()(input_ids=rows, labels=rows).loss)


def test_train_small_infer_large() -> None:
    """A LoRA that was trained on compressed weights only, but for one step, teaches the dense model the task."""
    base = LLAMA.build()
    fit(base, step=1, num_steps=40, learning_rate=1e-2)
    before = loss_of(base, step=3)
    model = get_peft_model(base, settings(param_ratio=0.5, warmup=1))
    fit(model, step=3, num_steps=40, learning_rate=1e-2, tuner=model.base_model)
    small = loss_of(model, step=3)
    dense = model.merge_and_unload(compact=False)
    assert parameter_report(dense).param_ratio == 1
    assert loss_of(dense, step=3) < 0.2 * before
    assert small < 0.2 * before


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL asks transformers
@pytest.mark.parametrize("wrapped", [False, True])
def test_sft_trainer(wrapped: bool, tmp_path: Path) -> None:
    """It is given the config and wraps the model, or a model that is wrapped already."""
    from trl import SFTConfig, SFTTrainer  # late: it takes seconds

    save_tiny_lm(tmp_path / "dense")
    config, model = settings(task_type="CAUSAL_LM"), AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    arguments = SFTConfig(str(tmp_path), max_steps=5, learning_rate=1e-2, use_cpu=True, bf16=False, **quiet)
    trainer = SFTTrainer(
        get_peft_model(model, config) if wrapped else model,
        arguments,
        train_dataset=Dataset.from_dict({"text": [make_text(12, seed=i) for i in range(16)]}),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "dense"),
        callbacks=[LoraSVDCallback()],
        **({} if wrapped else {"peft_config": config}),
    )
    trainer.train()
    assert [entry["param_ratio"] < 0.61 for entry in trainer.state.log_history[:5]] == [False, *[True] * 4]
    assert_kept(trainer.model.merge_and_unload(), 0.6)


TASK = """
task: next_word
dataset_path: json
dataset_kwargs: {data_files: {test: next_word.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
"""


def test_lm_eval_by_its_command_line(tmp_path: Path) -> None:
    """The command of the README, with a task of our own, on a compact model that has learned the answers."""
    save_tiny_lm(tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), settings(warmup=1))
    rows = tokenizer([" ".join(f"w{(i + j) % 60}" for j in range(8)) for i in range(60)], return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for step in range(30):
        model(input_ids=rows, labels=rows).loss.backward()
        model.base_model.update_and_allocate(step, 30)
        optimizer.step()
        optimizer.zero_grad()
    model.merge_and_unload().save_pretrained(tmp_path / "compact")
    tokenizer.save_pretrained(tmp_path / "compact")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "next_word.yaml").write_text(TASK)
    choices = [[f"w{i + 1}", f"w{i + 30}"][:: 1 if i % 2 else -1] for i in range(20)]
    questions = [
        {"text": f"w{i}", "choices": given, "answer": given.index(f"w{i + 1}")} for i, given in enumerate(choices)
    ]
    (tmp_path / "next_word.jsonl").write_text("\n".join(map(json.dumps, questions)))
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"python -c '(.*)' \\\n", readme)
    options = [
        "--model_args",
        "pretrained=compact",
        "--tasks",
        "next_word",
        "--include_path",
        "tasks",
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-c", code, "--model", "hf", *options, "--output_path", "results"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (tmp_path / "results").rglob("results*.json")
    assert json.loads(found.read_text())["results"]["next_word"]["acc,none"] > 0.9
