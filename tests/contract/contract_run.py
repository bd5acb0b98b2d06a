"""Runs PEFT's own tests against ``LoraSVDConfig`` in a process of their own and reads what became of each of them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUN_SECONDS = 1500
TEST_SECONDS = 120
MAX_WORKERS = 4
TEST_FAILURES = 1  # pytest's exit code when tests ran and some failed; higher ones mean that it could not do its work

# Suite -> the classes it consists of, each as module::class in PEFT's ``tests`` folder.
SUITES: dict[str, tuple[str, ...]] = {
    "custom_models": (
        "test_custom_models::TestPeftCustomModel",
        "test_custom_models::TestRequiresGrad",
        "test_custom_models::TestPeftFsdpStateDict",
    ),
    "multiple_active_adapters": ("test_custom_models::TestMultipleActiveAdapters",),
    "config": ("test_config::TestPeftConfig",),
    "decoder": ("test_decoder_models::TestDecoderModels",),
    "encoder_decoder": ("test_encoder_decoder_models::TestEncoderDecoderModels",),
    "sequence_classification": ("test_seq_classifier::TestSequenceClassificationModels",),
    "feature_extraction": ("test_feature_extraction_models::TestPeftFeatureExtractionModel",),
    "token_classification_qa": (
        "test_token_classification_qa::TestTokenClassificationModels",
        "test_token_classification_qa::TestQuestionAnsweringModels",
    ),
    "quantization": ("test_quantization::TestQuantization",),
}


class ContractRunError(RuntimeError):
    """PEFT's tests could not be run to the end."""


@dataclass
class Outcome:
    """What became of a suite's tests, by their ids; skips and failures with their texts."""

    passed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def run(source: Path, workdir: Path, suites: Iterable[str]) -> Path:
    """Run the suites from PEFT's extracted sdist, with ``workdir`` as the working directory; returns the JUnit report.

    The report also holds the failures of single tests. Anything worse raises.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    report = workdir / "report.xml"
    (workdir / "pytest.ini").write_text("[pytest]\njunit_family = xunit2\n")  # PEFT's own settings ask for coverage
    classes = [name for suite in suites for name in SUITES[suite]]
    tests = [f"{source}/tests/{name.replace('::', '.py::', 1)}" for name in classes]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *_options(source, workdir, report), *tests],
        cwd=workdir,
        env=_environment(source),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    (workdir / "output.txt").write_text(process.stdout)
    if process.returncode not in (0, TEST_FAILURES) or not report.is_file():
        raise ContractRunError(f"pytest on PEFT's tests exited with {process.returncode}:\n{process.stdout[-8000:]}")
    return report


def _options(source: Path, workdir: Path, report: Path) -> list[str]:
    workers = min(MAX_WORKERS, os.cpu_count() or 1)
    options = ["-c", str(workdir / "pytest.ini"), "--rootdir", str(source), "--junit-xml", str(report)]
    options += ["-q", "--tb=short", "-p", "contract_plugin", "-p", "no:cacheprovider"]
    options += ["-p", "no:warnings"]  # deprecations between PEFT and transformers are not ours to fail on
    options += ["-p", "xdist.plugin", "-n", str(workers), "-p", "pytest_timeout", "--timeout", str(TEST_SECONDS)]
    return options


def _environment(source: Path) -> dict[str, str]:
    """No network, one thread a worker, and none of the settings of a surrounding pytest."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "HF_"))}
    paths = [str(source), str(HERE), str(_package_root()), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def _package_root() -> Path:
    """The folder that this process imports ``lora_svd`` from, so that PEFT's tests see the same package."""
    spec = importlib.util.find_spec("lora_svd")
    if spec is None or spec.origin is None:
        raise ContractRunError("lora_svd is not importable")
    return Path(spec.origin).parents[1]


def read(report: Path) -> dict[str, Outcome]:
    """The outcomes of all suites in a JUnit report. A test of no suite is an error, so that none is lost."""
    outcomes = {suite: Outcome() for suite in SUITES}
    for case in ET.parse(report).getroot().iter("testcase"):
        module, _, class_name = case.get("classname", "").rpartition(".")
        outcome = outcomes[_suite_of(f"{module.removeprefix('tests.')}::{class_name}", case.get("name", ""))]
        _add(outcome, f"{class_name}::{case.get('name')}", case)
    return outcomes


def _suite_of(class_id: str, name: str) -> str:
    for suite, classes in SUITES.items():
        if class_id in classes:
            return suite
    raise ContractRunError(f"the report has a test outside of every suite: {class_id}::{name}")


def _add(outcome: Outcome, test: str, case: ET.Element) -> None:
    texts = {kind: case.find(kind) for kind in ("failure", "error", "skipped")}
    for kind in ("failure", "error"):
        if (element := texts[kind]) is not None:
            outcome.failed[f"{test} ({kind})"] = f"{element.get('message')}\n{element.text}"
    if (element := texts["skipped"]) is not None:
        outcome.skipped[test] = element.text or element.get("message") or ""
    elif all(element is None for element in texts.values()):
        outcome.passed.append(test)
