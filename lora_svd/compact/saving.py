"""Saving of a compact model so that a kill or a full disk loses nothing, and damage is found when it is loaded."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LoraSVDError
from .card import card_of
from .folder import checksums
from .mlx import write_mlx
from .remote_code import write_code


def save_compact(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    self_contained: bool = False,
    mlx: bool = False,
) -> None:
    """``save_pretrained``, checksums and a model card, in a new folder that takes an old one's place when complete.

    A full disk or a killed process leaves the previous checkpoint whole: in its place or, if killed between the two
    renames, beside it as ``.FOLDER-old``, from where the next save puts it back. A killed save also leaves its
    unfinished folder, ``.FOLDER-*.part``, which the next one names in a warning. Plain ``save_pretrained`` writes in
    place.

    Reload with ``import lora_svd`` and the auto class that the card names, such as
    ``AutoModelForCausalLM.from_pretrained(folder)``; with ``self_contained`` also without this package, by
    ``from_pretrained(folder, trust_remote_code=True)``, which runs the code that is then saved with it and compares no
    checksums. With this package it compares the SHA-256 of the weights' files with those in ``config.json``, so that a
    changed bit or a file of another save is found; not a change of ``config.json`` itself, nor of a tokenizer. What was
    saved by plain ``save_pretrained`` has no checksums: there only files that are cut off, and tensors that are missing
    or of another shape, are found.

    With ``mlx`` the folder gets ``mlx_model.py``, with which mlx-lm loads it:
    ``mlx_lm.generate --model folder --trust-remote-code``.

    Raises:
        LoraSVDError: the folder holds something else than a model, which would be lost, or it cannot be written.
    """
    folder = Path(folder).absolute()
    try:
        _save(model, folder, tokenizer, self_contained, mlx)
    except (OSError, SafetensorError) as error:
        raise LoraSVDError(f"folder: cannot save to {folder}: {error}; an earlier model there is untouched") from error


def _save(
    model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None, self_contained: bool, mlx: bool
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    old = folder.with_name(f".{folder.name}-old")
    if old.exists() and not folder.exists():  # a process was killed just before it put the new one in place
        old.rename(folder)
    check_replaceable(folder)
    left = [str(path) for path in folder.parent.glob(f".{folder.name}-????????.part")]
    if left:
        warnings.warn(f"{', '.join(left)}: left by a save that did not end; delete it", stacklevel=3)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".part", dir=folder.parent))
    try:
        model.save_pretrained(staging)
        if self_contained:
            write_code(model, staging)
        if mlx:
            write_mlx(model, staging)
        add_checksums(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(card_of(model, staging, folder.name), encoding="utf-8")
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


def check_replaceable(folder: Path) -> None:
    """Raise if a folder holds something else than a model, which saving one there would lose."""
    if folder.exists() and not (folder / "config.json").exists() and (folder.is_file() or any(folder.iterdir())):
        raise LoraSVDError(f"folder: {folder} holds something else than a model (no config.json); name another folder")


def add_checksums(folder: Path) -> None:
    """Write the SHA-256 of a compact model's weights into its config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    said = config.get("quantization_config", {})
    if said.get("quant_method") == "lora_svd":
        said["checksums"] = checksums(folder, folder.glob("*.safetensors"))
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
