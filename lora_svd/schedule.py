"""Step -> phase and current budget. Pure.

warm-up (full size, observed) -> compression (the budget falls on a cubic) -> recovery (target size)
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import LoraSVDError


@dataclass(frozen=True)
class Schedule:
    """Phases of one run, in optimizer steps counted from 0.

    Attributes:
        warmup_end: first step after the warm-up; the factorization takes place before the update of step
            ``warmup_end - 1``, when that step's gradients have been observed.
        compression_end: first step after the compression phase, equal to ``warmup_end`` for one shot.
        total_steps: length of the run.
        param_ratio: budget from the end of compression on.
        interval: steps between two factorizations while the budget falls.
    """

    warmup_end: int
    compression_end: int
    total_steps: int
    param_ratio: float
    interval: int = 1

    def budget(self, step: int) -> float | None:
        """The ``param_ratio`` that the model is to have once this step's gradients are observed; None: its full size.

        A larger model is cut, at whatever step it is found: a run that is resumed with a shorter schedule may be past
        the factorization. A smaller one is not grown back. During compression ``target + (1 - target) (1 - t)^3``, in
        force for ``interval`` steps, with t in (0, 1] the share of the phase that is over (Zhu and Gupta 2017; also
        LoRAPrune's).
        """
        first, last = self.warmup_end - 1, max(self.compression_end - 1, self.warmup_end - 1)
        if step < first:
            return None
        if step >= last:
            return self.param_ratio
        since = (step - first) // self.interval * self.interval
        done = (since + 1) / (last - first + 1)
        return self.param_ratio + (1 - self.param_ratio) * (1 - done) ** 3


def build_schedule(
    *, warmup: float, compression: float, interval: int, total_steps: int | None, param_ratio: float
) -> Schedule:
    """Resolve fractions of the run (below 1) and step counts (1 and above) against its length.

    Raises:
        LoraSVDError: the length is unknown, or warm-up and compression do not fit into it.
    """
    if total_steps is None or total_steps < 1:
        raise LoraSVDError(
            f"total_steps: got {total_steps}, expected the number of optimizer steps of the run. Set it in "
            "LoraSVDConfig, pass update_and_allocate(step, total_steps=...), or train with Trainer and LoraSVDCallback"
        )
    warmup_steps = max(1, _steps(warmup, total_steps))
    compression_steps = _steps(compression, total_steps)
    if compression < 1 and warmup + compression <= 1:  # fractions that fit together do so whatever way they are rounded
        compression_steps = min(compression_steps, total_steps - warmup_steps)
    if warmup_steps + compression_steps > total_steps:
        raise LoraSVDError(
            f"warmup and compression: {warmup} and {compression} are {warmup_steps} + {compression_steps} steps, but "
            f"the run has only {total_steps}. Lower them, or train longer"
        )
    return Schedule(warmup_steps, warmup_steps + compression_steps, total_steps, param_ratio, interval)


def _steps(value: float, total_steps: int) -> int:
    return round(value * total_steps) if value < 1 else round(value)
