"""Which files, and which checkpoints of a Trainer run, are as they were saved.

Trainer writes a checkpoint file by file and deletes old ones file by file. A kill, a full disk or a power cut leaves
folders that look like checkpoints, and ``resume_from_checkpoint=True`` takes the newest and fails, or goes on without
what is missing. ``LoraSVDCallback`` therefore writes the checksums of its files into every checkpoint.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..compact.folder import checksum, checksums
from ..errors import LoraSVDError

CHECKSUMS = "checksums.json"


def seal(checkpoint: str | Path) -> None:
    """Write the checksums of a complete checkpoint into it."""
    folder = Path(checkpoint)
    target, partial = folder / CHECKSUMS, folder / f".{CHECKSUMS}"
    files = (path for path in folder.rglob("*") if path.is_file() and path not in (target, partial))
    partial.write_text(json.dumps(checksums(folder, files), indent=1), encoding="utf-8")
    partial.replace(target)  # whole or not there


def check_checkpoint(checkpoint: str | Path) -> None:
    """Raise unless a checkpoint was saved to its end and, if it is sealed, every file is what it was, to the bit.

    Raises:
        LoraSVDError: what is wrong with which file.
    """
    folder = Path(checkpoint)
    name = CHECKSUMS if (folder / CHECKSUMS).exists() else TRAINER_STATE_NAME  # Trainer writes its state last
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        sealed = content if name == CHECKSUMS else {}
        changed = [name for name, digest in sealed.items() if checksum(folder / name) != digest]
        problem = f"{changed[0]} is not the file that was saved (SHA-256)" if changed else ""
    except (OSError, ValueError, AttributeError, TypeError) as error:
        problem = f"{name} cannot be read, so it was not saved to its end or is being deleted: {error}"
    if problem:
        raise LoraSVDError(f"{folder}: {problem}; resume from an earlier checkpoint")


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a run that is whole, for ``Trainer.train(resume_from_checkpoint=...)``.

    Newer ones that are not are named in a warning. None: there is none, and the run starts from its beginning.
    """
    for folder in reversed(sort_checkpoints(str(output_dir), PREFIX_CHECKPOINT_DIR)):
        try:
            check_checkpoint(folder)
        except LoraSVDError as error:
            warnings.warn(str(error), stacklevel=2)
        else:
            return folder
    return None
