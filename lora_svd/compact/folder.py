"""Checksums of the files in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def checksum(path: Path) -> str:
    """SHA-256 of a file, as ``sha256sum`` prints it; the file is read once, in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Of files in a folder, by their path in it."""
    return {path.relative_to(folder).as_posix(): checksum(path) for path in sorted(paths)}
