"""How vLLM runs in these tests, and where the models and references are that ``write_references.py`` has written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, so that its errors arrive here
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="session")
def models() -> Path:
    return Path(os.environ["LORA_SVD_REFERENCES"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled graphs of other runs are not what is tested."""
    os.environ["VLLM_CACHE_ROOT"] = str(tmp_path_factory.getbasetemp() / "vllm")
