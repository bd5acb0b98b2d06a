"""Phases in steps, and the budget along them."""

import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_svd.errors import LoraSVDError
from lora_svd.schedule import build_schedule

examples = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def budgets(**changes):
    """step -> budget where it falls."""
    schedule = build_schedule(
        **{"warmup": 4, "compression": 0, "interval": 1, "total_steps": 20, "param_ratio": 0.4, **changes}
    )
    found, before = {}, None
    for step in range(schedule.total_steps):
        if (budget := schedule.budget(step)) != before:
            found[step] = before = budget
    return found


def test_one_shot_compresses_once_when_the_last_step_of_the_warmup_was_observed():
    assert budgets() == {3: 0.4}


def test_budget_falls_on_a_cubic():
    found = budgets(compression=4)
    assert found == pytest.approx({3 + i: reference.cubic((i + 1) / 5, 0.4) for i in range(5)})
    assert found[7] == 0.4


def test_interval_skips_steps_but_not_the_last():
    every, some = budgets(compression=10), budgets(compression=10, interval=4)
    assert list(some) == [3, 7, 11, 13]
    assert some == {step: every[step] for step in some}


@pytest.mark.parametrize(
    ("given_as_steps", "given_as_fractions"),
    [((4, 0), (0.2, 0.0)), ((5, 5), (0.25, 0.25)), ((1, 10), (0.05, 0.5)), ((10, 10), (0.5, 0.5))],
)
def test_fractions_and_steps_mean_the_same(given_as_steps, given_as_fractions):
    (warmup, compression), (share, compression_share) = given_as_steps, given_as_fractions
    assert budgets(warmup=warmup, compression=compression) == budgets(warmup=share, compression=compression_share)


@pytest.mark.parametrize("warmup", [0, 0.0, 0.001, 1, 1.0])
def test_one_step_is_always_observed(warmup):
    assert budgets(warmup=warmup) == {0: 0.4}


@examples
@given(
    warmup=st.sampled_from([0.0, 0.1, 0.25, 0.4, 0.5]),
    compression=st.sampled_from([0.0, 0.1, 0.25, 0.4, 0.5]),
    interval=st.integers(1, 7),
    total_steps=st.integers(1, 60),
    param_ratio=st.floats(0.05, 1),
)
def test_every_run_ends_at_the_target_by_falling_budgets(**chosen):
    """Fractions that sum to at most the run fit into it, whatever the rounding."""
    found = list(budgets(**chosen).values())
    assert found[-1] == chosen["param_ratio"]
    assert found == sorted(found, reverse=True)
    assert all(chosen["param_ratio"] <= budget <= 1 for budget in found)


def test_the_target_is_in_force_from_its_step_on():
    schedule = build_schedule(warmup=2, compression=2, interval=1, total_steps=10, param_ratio=0.5)
    assert schedule.budget(-1) is None
    assert schedule.budget(2) > 0.5
    assert all(schedule.budget(step) == 0.5 for step in range(3, 30))


def test_a_budget_is_in_force_for_an_interval():
    schedule = build_schedule(warmup=2, compression=6, interval=3, total_steps=10, param_ratio=0.5)
    found = [schedule.budget(step) for step in range(10)]
    assert found[0] is None
    assert found[1] == found[2] == found[3] > found[4] == found[5] == found[6] > found[7] == found[8] == found[9] == 0.5


@pytest.mark.parametrize("total_steps", [None, 0, -1])
def test_unknown_length_is_an_error(total_steps):
    with pytest.raises(LoraSVDError, match=rf"total_steps: got {total_steps}, .* LoraSVDCallback"):
        budgets(total_steps=total_steps)


@pytest.mark.parametrize(
    ("warmup", "compression", "steps"), [(15, 6, r"15 \+ 6"), (0.75, 0.5, r"15 \+ 10"), (21, 0, r"21 \+ 0")]
)
def test_phases_longer_than_the_run_are_an_error(warmup, compression, steps):
    with pytest.raises(LoraSVDError, match=rf"{warmup} and {compression} are {steps} steps, but the run has only 20"):
        budgets(warmup=warmup, compression=compression)
