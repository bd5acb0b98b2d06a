"""The pytest plugin that points PEFT's own test modules at ``LoraSVDConfig``.

Loaded with ``-p`` by the process that runs PEFT's tests. Parametrization keeps a reference to a module's table, so
replacing the table's content after the import and before collection is enough; nothing of PEFT's is copied or edited.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import rows
import tiny_models
import torch

from lora_svd import LoraSVDConfig, LoraSVDModel
from lora_svd.tuner.adapter import LayerFactors


def _set_custom_models(module: ModuleType) -> None:
    module.TEST_CASES[:] = rows.CUSTOM_MODELS
    module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = rows.MULTIPLE_ADAPTERS
    module.ALL_PEFT_CONFIG_CLASSES[:] = [LoraSVDConfig]


def _set_architectures(*task_types: str, tables: Sequence[str] = ("ALL_CONFIGS",)) -> Callable[[ModuleType], None]:
    def replace(module: ModuleType) -> None:
        for name, task_type in zip(tables, task_types, strict=True):
            getattr(module, name)[:] = rows.architecture_rows(task_type)

    return replace


def _set_configs(module: ModuleType) -> None:
    """This table is a tuple, so the marks that refer to it are replaced instead."""
    for test in vars(module.TestPeftConfig).values():
        marks = getattr(test, "pytestmark", [])
        for index, mark in enumerate(marks):
            if mark.name == "parametrize" and mark.args[1] is module.ALL_CONFIG_CLASSES:
                marks[index] = pytest.mark.parametrize(mark.args[0], rows.CONFIGS, **mark.kwargs).mark
    module.LAYER_INDEXING_CONFIG_CLASSES[:] = rows.CONFIGS


def _set_quantization(module: ModuleType) -> None:
    module.TEST_CASES[:] = rows.QUANTIZATION
    module.QUANTIZATION_BACKENDS[:] = [
        Evaluated4bit(backend) if isinstance(backend, module.Bnb4bitLoader) else backend
        for backend in module.QUANTIZATION_BACKENDS
    ]


class Evaluated4bit:
    """PEFT's 4-bit loader, of a model that was evaluated before, as one does to know the baseline.

    On CPUs with AVX512-BF16, bitsandbytes packs the weights in an evaluation pass, and dequantizing them is wrong from
    then on. PEFT therefore skips the merging of what its ``Bnb4bitLoader`` loads on a CPU. Our layer has to cope with
    packed weights, so this is another type, for which the test runs.
    """

    def __init__(self, loader: Any) -> None:
        self.name: str = loader.name
        self.backend_cls: type = loader.backend_cls
        self.supports_merge: bool = loader.supports_merge
        self.supports_non_quantized_comparison: bool = loader.supports_non_quantized_comparison
        self.model_id: str = loader.model_id
        self.expected_layer_count: int = loader.expected_layer_count
        self._load: Callable[[], torch.nn.Module] = loader.load_model

    def load_model(self) -> torch.nn.Module:
        model = self._load().eval()
        with torch.no_grad():
            model(torch.arange(10).view(1, -1))
        return model


MODULES: dict[str, Callable[[ModuleType], None]] = {
    "test_config": _set_configs,
    "test_custom_models": _set_custom_models,
    "test_decoder_models": _set_architectures("CAUSAL_LM"),
    "test_encoder_decoder_models": _set_architectures("SEQ_2_SEQ_LM"),
    "test_feature_extraction_models": _set_architectures("FEATURE_EXTRACTION"),
    "test_quantization": _set_quantization,
    "test_seq_classifier": _set_architectures("SEQ_CLS"),
    "test_token_classification_qa": _set_architectures(
        "TOKEN_CLS", "QUESTION_ANS", tables=("TOKEN_CLS_CONFIGS", "QA_CONFIGS")
    ),
}


def pytest_configure(config: pytest.Config) -> None:
    """Put the models where PEFT's tests look for them first, once for all workers."""
    if not hasattr(config, "workerinput"):
        tiny_models.build(Path.cwd())


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Import a test module, which pytest is about to search for tests, and put our tables into it."""
    if isinstance(collector, pytest.Module):
        utilities = importlib.import_module("tests.testing_utils")
        utilities.hub_online_once = contextlib.nullcontext  # would lift HF_HUB_OFFLINE for the first use of a model
        MODULES[collector.path.stem](collector.obj)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that are about our config; the modules also hold tests of a single other method."""
    config.hook.pytest_deselected(items=[item for item in items if not _is_ours(item)])
    items[:] = [item for item in items if _is_ours(item)]


def _is_ours(item: Any) -> bool:
    call = getattr(item, "callspec", None)
    params = call.params if call else {}
    kwargs = params.get("config_kwargs")
    if isinstance(kwargs, dict) and kwargs.get("compressed") and item.function.__name__ in rows.IDENTITY_TESTS:
        return False
    return any(value is LoraSVDConfig or isinstance(value, LoraSVDConfig) for value in params.values())


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Some tests draw unseeded inputs: with a seed, the result does not depend on the worker that runs them."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _zero_factors_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a compressed adapter are made from its config alone; without a checkpoint its factors are zero."""
    monkeypatch.setattr(LayerFactors, "_check_filled", lambda _: None)


@pytest.fixture(autouse=True)
def _merge_as_peft_means_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's ``merge_and_unload`` keeps the output of the adapter; ours does with ``compact=False``.

    Only rows with a ``param_ratio`` below 1 feel it: with the whole budget both are the same.
    """
    merge = LoraSVDModel.merge_and_unload

    def merge_dense(self: LoraSVDModel, *args: Any, **kwargs: Any) -> torch.nn.Module:
        compact = all(config.param_ratio == 1 for config in self.peft_config.values())
        return merge(self, *args, **{"compact": compact, **kwargs})

    monkeypatch.setattr(LoraSVDModel, "merge_and_unload", merge_dense)
