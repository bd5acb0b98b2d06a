"""Fetches the sdist of the installed PEFT, the only public place that ships PEFT's tests for exactly that version.

The archive is cached, never committed: PEFT's test code stays PEFT's.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CACHE_DIR = Path(__file__).resolve().parents[2] / ".cache" / "contract"
DOWNLOAD_SECONDS = 300


class PeftSourceError(RuntimeError):
    """The sdist cannot be had, or is not the source of the PEFT that is installed."""


def installed_version() -> str:
    return importlib.metadata.version("peft")


def fetch(sha256: str) -> Path:
    """The extracted sdist of the installed PEFT: verified against its recorded digest and the installed files."""
    version = installed_version()
    archive = CACHE_DIR / f"peft-{version}.tar.gz"
    if not archive.is_file():
        _download(version, archive)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != sha256:
        raise PeftSourceError(f"{archive}: sha256 is {digest}, expected {sha256}; delete the file and check the index")
    source = CACHE_DIR / f"peft-{version}-{digest[:12]}"
    if not source.is_dir():
        _extract(archive, source, top_level=f"peft-{version}")
    _check_matches_installed(source)
    return source


def _download(version: str, archive: Path) -> None:
    """``pip download`` in a private folder, then one rename: parallel test processes may do this at the same time."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "peft", f"peft=={version}"]
    if importlib.util.find_spec("setuptools"):
        command.append("--no-build-isolation")  # pip reads the metadata through setuptools; isolation installs it anew
    CACHE_DIR.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE_DIR) as folder:
        run = subprocess.run(
            [*command, "--dest", folder],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        found = sorted(Path(folder).glob("*.tar.gz"))
        if run.returncode or len(found) != 1:
            raise PeftSourceError(f"no sdist of peft {version} from pip ({found}):\n{run.stdout}\n{run.stderr}")
        found[0].replace(archive)


def _extract(archive: Path, source: Path, *, top_level: str) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE_DIR) as folder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        extracted = Path(folder) / top_level
        # The modules import each other relatively, but the sdist leaves this file out.
        (extracted / "tests" / "__init__.py").touch()
        try:
            extracted.rename(source)
        except OSError:
            if not source.is_dir():  # another process may have finished first
                raise
            shutil.rmtree(extracted)


def _check_matches_installed(source: Path) -> None:
    """The tests must run against the PEFT they were released with, so the installed files must be the sdist's."""
    spec = importlib.util.find_spec("peft")
    if spec is None or spec.origin is None:
        raise PeftSourceError("peft is not importable")
    installed = Path(spec.origin).parent
    released = source / "src" / "peft"
    files = sorted(path.relative_to(released) for path in released.rglob("*.py"))
    if not files:
        raise PeftSourceError(f"{released}: no Python files")
    different = [str(path) for path in files if not _same_text(released / path, installed / path)]
    if different:
        raise PeftSourceError(f"installed peft {installed_version()} differs from its release in {different[:10]}")


def _same_text(first: Path, second: Path) -> bool:
    return second.is_file() and first.read_bytes().splitlines() == second.read_bytes().splitlines()
