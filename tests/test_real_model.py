"""The quickstart on the real model, shortened: what ``make demo`` does, in a few steps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModel, AutoTokenizer

from lora_svd import LoraSVDConfig
from lora_svd.compact import parameter_report

ROOT = Path(__file__).parents[1]
STEPS = 4
TEXT = Path(".cache/quickstart/text/eval.txt")


def run(*words: str | Path) -> str:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.real_model
@pytest.mark.timeout(1800)
def test_quickstart_in_a_few_steps(tmp_path: Path):
    run("recipes/quickstart/prepare.py")
    shorter = tmp_path / "eval.txt"
    shorter.write_text((ROOT / TEXT).read_text(encoding="utf-8")[:6000], encoding="utf-8")
    options = {
        "eval_text": shorter,
        "window": 512,
        "block_length": 256,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "max_new_tokens": 8,
        "report_tokens": 0,
        "output_dir": tmp_path,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    out = run("-m", "lora_svd.cli", "compress", "recipes/quickstart/quickstart.yaml", *words)

    report = json.loads((tmp_path / "compact" / "report.json").read_text())
    assert 0.595 < report["size"]["param_ratio"] <= 0.6
    assert report["size"]["dense_parameters"] == 134_515_008
    assert report["size"]["bytes"] < 0.7 * report["dense_bytes"]
    assert 10 < report["perplexity_dense"] < 25
    assert math.isfinite(report["perplexity_reloaded"])
    assert report["perplexity_reloaded"] == pytest.approx(report["perplexity_compact"], rel=1e-3)
    # Truncation without any importance gives 1e4 and more on this model; observing 1,024 tokens is worth that much.
    assert report["perplexity_compact"] < 1000
    assert 'Compact: The "if" statement is used for' in out


@pytest.mark.real_model
@pytest.mark.timeout(300)
def test_sentence_encoder(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2, trained for a few steps on two views of the same sentences: embeddings stay where they were."""
    run("benchmarks/task_data.py", "--cache", tmp_path)
    reviews = [(tmp_path / "movie_reviews" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "dev")]
    assert [len(lines) for lines in reviews] == [8484, 2121]
    assert {json.loads(line)["label"] for line in reviews[1]} == {0, 1}
    folder = tmp_path / "all-MiniLM-L6-v2"
    dense, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    sentences = [line.strip() for topic in topics.topics.values() for line in topic.split(". ") if 40 < len(line) < 200]
    seen, unseen = sentences[: 16 * STEPS], sentences[16 * STEPS : 16 * STEPS + 64]
    # sentence embeddings do without the pooler
    config = LoraSVDConfig(param_ratio=0.8, warmup=STEPS // 2, exclude_modules=["pooler.dense"])
    model = get_peft_model(AutoModel.from_pretrained(folder), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    for step in range(STEPS):
        batch = seen[16 * step : 16 * (step + 1)]
        one, other = (embed(model.train(), tokenizer, batch) for _ in range(2))
        torch.nn.functional.cross_entropy(20 * one @ other.T, torch.arange(16)).backward()
        model.base_model.update_and_allocate(step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
    compact = model.merge_and_unload().eval()
    compact.save_pretrained(tmp_path / "compact")
    again = AutoModel.from_pretrained(tmp_path / "compact").eval()
    with torch.no_grad():
        expected, found = (embed(given, tokenizer, unseen) for given in (dense, again))
        assert torch.equal(found, embed(compact, tokenizer, unseen))
    assert parameter_report(again).param_ratio <= 0.8
    own = (expected * found).sum(dim=1)
    assert own.mean() > 0.85
    assert torch.equal((found @ expected.T).argmax(dim=1), torch.arange(len(unseen)))


def embed(model: Any, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    """Mean of the last hidden states over the tokens of each sentence, of length 1."""
    batch = tokenizer(sentences, padding=True, truncation=True, max_length=48, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    hidden = model(**batch).last_hidden_state
    return torch.nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1)
