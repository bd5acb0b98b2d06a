"""Saving of a compact model so that a kill or a full disk loses nothing."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LoraSVDError
from .card import compact_card
from .report import parameter_report
from .self_contained import write_code


def save_compact(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    self_contained: bool = False,
) -> None:
    """``save_pretrained``, and a model card, into a new folder that takes the place of an old one when it is complete.

    A full disk or a killed process leaves the previous checkpoint whole. Reload with
    ``import lora_svd; AutoModelForCausalLM.from_pretrained(folder)``; with ``self_contained`` also without this
    package, by ``from_pretrained(folder, trust_remote_code=True)``, which runs the code that is then saved with it.

    Raises:
        LoraSVDError: the folder holds something else than a model, which would be lost.
    """
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    old = folder.with_name(f".{folder.name}-old")
    if old.exists() and not folder.exists():  # a process was killed just before it put the new one in place
        old.rename(folder)
    if folder.exists() and not (folder / "config.json").exists() and (folder.is_file() or any(folder.iterdir())):
        raise LoraSVDError(f"folder: {folder} holds something else than a model (no config.json); name another folder")
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(staging)
        if self_contained:
            write_code(model, staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        card = compact_card(parameter_report(model), model.name_or_path or "", folder.name)
        (staging / "README.md").write_text(card, encoding="utf-8")
        staging.chmod(0o755)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        staging.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(staging, ignore_errors=True)
