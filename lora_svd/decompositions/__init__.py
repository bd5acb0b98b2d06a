"""Forms in which a weight can be stored with fewer numbers, by the name used in ``LoraSVDConfig.decomposition``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..linalg import Metrics
from . import elementwise, kronecker, svd
from .factors import Factors, Split, balance, dense_sum, scattered
from .pivots import PivotedFactors, pivot


@dataclass(frozen=True)
class Decomposition:
    """One way to approximate a weight.

    Attributes:
        spectrum: ``(weight, metrics) -> (full rank,)``, the error that each further rank removes, descending.
        factorize: ``(weight, metrics, rank) -> Factors``, the best approximation of that rank.
        absorb_low_rank: ``(factors, bypass, metrics) -> Factors``, the best approximation of the sum of both at the
            rank of the first, where that takes less than factorizing the dense sum.
        split: ``(out, in) -> Split``, in which order the weight is factorized; ranks, their cost and the shapes of the
            factors are those of the matrix that it makes.
        elementwise: whether it takes ``Metrics.elements``, and no other; factors of a lower rank are then not the
            leading ones of a higher.
    """

    spectrum: Callable[[Tensor, Metrics], Tensor]
    factorize: Callable[[Tensor, Metrics, int], Factors]
    absorb_low_rank: Callable[[Factors, Factors, Metrics], Factors] | None = None
    split: Callable[[int, int], Split] = Split.none
    elementwise: bool = False

    def absorb(self, factors: Factors, bypass: Factors, metrics: Metrics) -> Factors:
        """The best approximation of the sum of both products at the rank of ``factors``."""
        if self.absorb_low_rank is not None:
            return self.absorb_low_rank(factors, bypass, metrics)
        return self.factorize(dense_sum(factors, bypass), metrics, factors.rank)

    @property
    def is_low_rank(self) -> bool:
        """Whether the factors multiply to the weight itself."""
        return self.split == Split.none


DECOMPOSITIONS: dict[str, Decomposition] = {
    "svd": Decomposition(svd.weighted_spectrum, svd.weighted_svd, svd.absorb),
    "kronecker": Decomposition(kronecker.spectrum, kronecker.factorize, split=kronecker.kronecker_split),
    "elementwise": Decomposition(elementwise.spectrum, elementwise.factorize, elementwise=True),
}

__all__ = ["DECOMPOSITIONS", "Decomposition", "Factors", "PivotedFactors", "Split", "balance", "pivot", "scattered"]
