"""PEFT's contract test matrix, from the sdist of the installed PEFT, against ``LoraSVDConfig``.

``expected.json`` holds, for each version of PEFT, the digest of its sdist, and the least number of passed and the
largest number of skipped tests of each suite: a run that collects less than it should cannot pass.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TypedDict

import contract_run
import peft_source
import pytest
from filelock import FileLock

EXPECTED_FILE = Path(__file__).with_name("expected.json")
SHOWN_FAILURES = 10

pytestmark = [
    pytest.mark.timeout(2 * contract_run.RUN_SECONDS),  # the first test waits for the run of all of them
    pytest.mark.xdist_group("contract"),
]


class Counts(TypedDict):
    min_passed: int
    max_skipped: int


class Expected(TypedDict):
    sdist_sha256: str
    suites: dict[str, Counts]


@pytest.fixture(scope="session")
def expected() -> Expected:
    version = peft_source.installed_version()
    table: dict[str, Expected] = json.loads(EXPECTED_FILE.read_text())
    if version not in table:
        pytest.fail(f"{EXPECTED_FILE.name} has no entry for the installed peft {version}, only for {sorted(table)}")
    return table[version]


@pytest.fixture(scope="session")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, expected: Expected
) -> dict[str, contract_run.Outcome]:
    """One run for all selected suites, and for all workers of a parallel test session: starting it is what costs."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    selected = [suite for suite in contract_run.SUITES if _is_selected(suite, request.session)]
    workdir = shared / "contract"
    report = workdir / "report.xml"
    with FileLock(shared / "contract.lock"):
        if not report.is_file():
            contract_run.run(peft_source.fetch(expected["sdist_sha256"]), workdir, selected)
    return contract_run.read(report)


def _is_selected(suite: str, session: pytest.Session) -> bool:
    return any(item.name == f"{test_peft_contract.__name__}[{suite}]" for item in session.items)


@pytest.mark.parametrize("suite", contract_run.SUITES)
def test_peft_contract(suite: str, outcomes: dict[str, contract_run.Outcome], expected: Expected) -> None:
    """No failure, no skip but PEFT's own, and as many tests as recorded."""
    outcome, counts = outcomes[suite], expected["suites"][suite]
    passed, skipped, failed = len(outcome.passed), len(outcome.skipped), len(outcome.failed)
    summary = f"{suite}: {passed} passed, {skipped} skipped, {failed} failed"
    shown = [f"{test}\n{text}" for test, text in list(outcome.failed.items())[:SHOWN_FAILURES]]
    assert not failed, "\n\n".join([summary, *outcome.failed, *shown])
    foreign = {test: text for test, text in outcome.skipped.items() if "peft-" not in text.partition(": ")[0]}
    assert not foreign, f"{summary}; skipped by something other than PEFT's tests: {foreign}"
    assert passed >= counts["min_passed"], f"{summary}; {EXPECTED_FILE.name} expects {counts['min_passed']} passed"
    assert skipped <= counts["max_skipped"], (
        f"{summary}; {EXPECTED_FILE.name} allows {counts['max_skipped']} skipped: {outcome.skipped}"
    )


def test_every_suite_has_expected_counts(expected: Expected) -> None:
    assert set(expected["suites"]) == set(contract_run.SUITES)
    assert all(counts["min_passed"] > 0 for counts in expected["suites"].values())
