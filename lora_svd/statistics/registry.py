"""The registry of statistics: what the package knows of each stands in a record beside its function."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor

from ..errors import LoraSVDError

COUNTS = ("token", "sample", "step")
SIDES = ("rows", "columns", "elements")


@dataclass(frozen=True)
class Statistic:
    """One sum kept for a layer; :func:`statistic` makes it.

    Attributes:
        summand: what one observation adds to the sum: of a :class:`TokenObservation` (tokens and samples of a backward
            pass) or a :class:`StepObservation` (an optimizer step); of Gram matrices with a second argument, the r of
            the sketch or None.
        side: whose metric it makes: "rows" of the weight (its outputs), "columns" (its inputs) or single "elements".
        per: what the sum runs over and is divided by: "token", "sample" or "step".
        needs: what an observation carries only where it is asked for: "weight", the frozen weight, costly to dequantize
            or gather; "gradients", for statistics of columns, which are otherwise observed in forward passes alone; or
            another statistic, which is then collected as well: "input_gram" and "input_sum", of what A lets through of
            the input, for statistics of steps.
        gram: whether it is a sum of ``v v^T``, which may be kept as a sketch.
        formerly: the name it has in adapters that were saved before it was renamed.
    """

    summand: Callable[..., Tensor]
    side: str
    per: str
    needs: frozenset[str] = frozenset()
    gram: bool = False
    formerly: str | None = None

    def shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of the sum for a weight (out, in)."""
        sides = {"rows": (out_features,), "columns": (in_features,), "elements": (out_features, in_features)}
        return sides[self.side] * (2 if self.gram else 1)

    @property
    def reads_gradients(self) -> bool:
        """Whether it can only be observed in a backward pass."""
        return self.side != "columns" or "gradients" in self.needs

    @property
    def reads_bypass(self) -> bool:
        """Whether it can only be observed where a LoRA is trained."""
        return self.per == "step"


STATISTICS: dict[str, Statistic] = {}


def statistic(
    name: str, *, side: str, per: str, needs: Collection[str] = (), gram: bool = False, formerly: str | None = None
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register the decorated function as the summand of a statistic, by a name that importances can ask for.

    Raises:
        LoraSVDError: the name is taken, or a value is not one that :class:`Statistic` knows.
    """
    if name in STATISTICS:
        raise LoraSVDError(f"statistic: {name!r} is registered already, expected another name")
    for field, value, valid in (("side", side, SIDES), ("per", per, COUNTS)):
        if value not in valid:
            raise LoraSVDError(f"statistic {name}: got {field}={value!r}, expected one of {valid}")
    if gram and (side == "elements" or per == "step"):
        raise LoraSVDError(
            f"statistic {name}: got gram=True, expected a sum over tokens or samples, of rows or columns"
        )

    def register(summand: Callable[..., Tensor]) -> Callable[..., Tensor]:
        STATISTICS[name] = Statistic(summand, side, per, frozenset(needs), gram, formerly)
        return summand

    return register


def stored_shape(name: str, out_features: int, in_features: int, rank: int | None = None) -> tuple[int, ...]:
    """Shape of a layer's statistic: the full sum, or its rank-``rank`` sketch."""
    whole = STATISTICS[name].shape(out_features, in_features)
    return whole if rank is None else (rank + 1, whole[1])
