"""Forms in which a weight can be stored with fewer numbers, by the name used in ``LoraSVDConfig.decomposition``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..linalg import Metrics
from . import elementwise, kronecker, svd
from .factors import Factors, PivotedFactors, Split, balance, pivot


@dataclass(frozen=True)
class Decomposition:
    """One way to approximate a weight.

    Attributes:
        spectrum: ``(weight, metrics) -> (full rank,)``, the error that each further rank removes, descending.
        factorize: ``(weight, metrics, rank) -> Factors``, the best approximation of that rank.
        absorb: ``(factors, bypass, metrics) -> Factors``, of the sum of both, at the rank of the first.
        split: ``(out, in) -> Split``, in which order the weight is factorized; ranks, their cost and the shapes of the
            factors are those of the matrix that it makes.
        elementwise: whether it takes ``Metrics.elements``, and no other; factors of a lower rank are then not the
            leading ones of a higher.
    """

    spectrum: Callable[[Tensor, Metrics], Tensor]
    factorize: Callable[[Tensor, Metrics, int], Factors]
    absorb: Callable[[Factors, Factors, Metrics], Factors]
    split: Callable[[int, int], Split] = Split.none
    elementwise: bool = False

    @property
    def is_low_rank(self) -> bool:
        """Whether the factors multiply to the weight itself."""
        return self.split == Split.none


DECOMPOSITIONS: dict[str, Decomposition] = {
    "svd": Decomposition(spectrum=svd.weighted_spectrum, factorize=svd.weighted_svd, absorb=svd.absorb),
    "kronecker": Decomposition(
        spectrum=kronecker.spectrum,
        factorize=kronecker.factorize,
        absorb=kronecker.absorb,
        split=kronecker.kronecker_split,
    ),
    "elementwise": Decomposition(
        spectrum=elementwise.spectrum,
        factorize=elementwise.factorize,
        absorb=elementwise.absorb,
        elementwise=True,
    ),
}

__all__ = ["DECOMPOSITIONS", "Decomposition", "Factors", "PivotedFactors", "Split", "balance", "pivot"]
