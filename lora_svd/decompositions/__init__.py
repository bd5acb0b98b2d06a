"""Forms in which a weight can be stored with fewer numbers, by the name used in ``LoraSVDConfig.decomposition``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..linalg import Metrics
from .svd import Factors, PivotedFactors, balance, pivot, truncate, weighted_spectrum, weighted_svd


@dataclass(frozen=True)
class Decomposition:
    """One way to approximate a weight.

    Attributes:
        spectrum: ``(weight, metrics) -> (max_rank,)``, the error that each further rank removes, descending.
        factorize: ``(weight, metrics, rank) -> Factors``, the best approximation of that rank.
        truncate: ``(factors, metrics, rank) -> Factors``, the best approximation of a product of factors.
    """

    spectrum: Callable[[Tensor, Metrics], Tensor]
    factorize: Callable[[Tensor, Metrics, int], Factors]
    truncate: Callable[[Factors, Metrics, int], Factors]


DECOMPOSITIONS: dict[str, Decomposition] = {
    "svd": Decomposition(spectrum=weighted_spectrum, factorize=weighted_svd, truncate=truncate),
}

__all__ = ["DECOMPOSITIONS", "Decomposition", "Factors", "PivotedFactors", "balance", "pivot"]
