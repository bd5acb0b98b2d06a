"""Shared by all tests: no network, one thread a worker, a fixed seed, and the hosts' own warnings out of the way.

``tests`` are those of the package, ``benchmarks/tests`` those of the scripts beside it, marked ``benchmark``.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import pytest
import torch
from hypothesis import settings

# The same examples in every run, on a machine of any speed; `make test-extended` generates others, and many.
settings.register_profile("default", deadline=None, derandomize=True, database=None, max_examples=100)
settings.register_profile("extended", deadline=None, derandomize=False, print_blob=True, max_examples=4000)
settings.load_profile("default")

collect_ignore = ["tests/serving", "lora-svd-vllm"]  # `make serve-test` runs them where the servers are installed
BENCHMARKS = Path(__file__).parent / "benchmarks"
HOST_WARNINGS = (
    "ignore:`torch.jit.script:DeprecationWarning",  # bitsandbytes, on import
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # PEFT 0.21 asks transformers 5.23
)


def pytest_configure(config: pytest.Config) -> None:
    for line in HOST_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if BENCHMARKS in item.path.parents:
            item.add_marker("benchmark")


def pytest_collection_finish() -> None:
    """Exempt what the imports made from garbage collection, which takes most of a tiny Trainer run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
