"""Which rank each layer keeps: spectra, shapes and a budget in, ranks out. Pure.

The full rank means "stored dense": it costs ``out * in`` numbers and has no error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import LoraSVDError

FACTOR_FORMATS = ("pivoted", "factors")


@dataclass(frozen=True)
class LayerShape:
    """A targeted weight, in the order in which it is factorized: (out, in), or (m1 n1, m2 n2) for Kronecker products.
    ``extra_rank`` is stored on top of the kept rank (a bypass that is kept, not absorbed)."""

    out_features: int
    in_features: int
    extra_rank: int = 0

    @property
    def full_rank(self) -> int:
        return min(self.out_features, self.in_features)

    @property
    def parameters(self) -> int:
        return self.out_features * self.in_features


def stored_parameters(shape: LayerShape, rank: int, factor_format: str) -> int:
    """Numbers stored for a kept rank k, bias excluded: ``k (m + n)``, pivoted ``k (m + n) - k^2``, dense ``m n``."""
    total = rank + shape.extra_rank
    if rank >= shape.full_rank or total >= shape.full_rank:
        return shape.parameters
    thin = total * (shape.out_features + shape.in_features)
    return thin - total**2 if factor_format == "pivoted" else thin


def candidate_ranks(shape: LayerShape, factor_format: str, rank_multiple: int) -> list[int]:
    """Rank 1, the multiples of ``rank_multiple`` that are stored in fewer numbers than the weight, and dense."""
    thin = [1, *range(rank_multiple, shape.full_rank, rank_multiple)]
    saving = [k for k in thin if stored_parameters(shape, k, factor_format) < shape.parameters]
    return [*dict.fromkeys(saving), shape.full_rank]


def kept_parameters(ranks: Mapping[str, int], shapes: Mapping[str, LayerShape], factor_format: str) -> int:
    """Numbers stored over all targeted weights."""
    return sum(stored_parameters(shapes[name], rank, factor_format) for name, rank in ranks.items())


def budget_of(shapes: Mapping[str, LayerShape], param_ratio: float) -> int:
    """``param_ratio`` of the targeted weights, in numbers."""
    return int(param_ratio * sum(shape.parameters for shape in shapes.values()) + 1e-6)


def check_budget(shapes: Mapping[str, LayerShape], param_ratio: float, factor_format: str) -> None:
    """Raise if rank 1 in every layer exceeds the budget."""
    budget = budget_of(shapes, param_ratio)
    least = sum(min(stored_parameters(shape, 1, factor_format), shape.parameters) for shape in shapes.values())
    if least > budget:
        total = sum(shape.parameters for shape in shapes.values())
        raise LoraSVDError(
            f"param_ratio: {param_ratio} allows {budget} parameters, rank 1 in all {len(shapes)} targeted layers takes"
            f" {least}. Raise param_ratio to at least {math.ceil(1e4 * least / total) / 1e4}, or target fewer layers"
        )


def allocate_ranks(
    spectra: Mapping[str, Tensor],
    shapes: Mapping[str, LayerShape],
    *,
    param_ratio: float,
    allocation: str = "global",
    factor_format: str = "pivoted",
    rank_multiple: int = 8,
) -> dict[str, int]:
    """Ranks by layer whose stored numbers are at most ``param_ratio`` of the targeted weights.

    Args:
        spectra: by layer, the squared singular values in the metric of the loss, descending, (full_rank,).
        shapes: by layer.
        param_ratio: kept / original numbers of the targeted weights, in (0, 1].
        allocation: "global" minimizes the summed discarded squares under one budget, "uniform" gives every layer the
            same share of its own size.
        factor_format: "pivoted" or "factors": what a rank costs.
        rank_multiple: ranks are multiples of this (or 1, or dense).

    Raises:
        LoraSVDError: rank 1 everywhere exceeds the budget, or an unknown ``allocation``.
    """
    if allocation not in ALLOCATIONS:
        raise LoraSVDError(f"allocation: unknown value {allocation!r}, expected one of {sorted(ALLOCATIONS)}")
    options = {name: _options(spectra[name], shape, factor_format, rank_multiple) for name, shape in shapes.items()}
    check_budget(shapes, param_ratio, factor_format)
    chosen = ALLOCATIONS[allocation](options, shapes, param_ratio)
    return {name: options[name].ranks[index] for name, index in chosen.items()}


def given_ranks(
    given: Mapping[str, int], shapes: Mapping[str, LayerShape], param_ratio: float, factor_format: str
) -> dict[str, int]:
    """Ranks that the user chose, for the layers of ``shapes``.

    Raises:
        LoraSVDError: a layer has none, or they keep more than ``param_ratio``.
    """
    if missing := [name for name in shapes if name not in given]:
        raise LoraSVDError(
            f"compact_ranks: no rank for {missing[0]} ({len(missing)} of {len(shapes)} missing); name all"
        )
    ranks = {name: min(given[name], shape.full_rank) for name, shape in shapes.items()}
    kept, total = kept_parameters(ranks, shapes, factor_format), sum(shape.parameters for shape in shapes.values())
    if kept > budget_of(shapes, param_ratio):
        raise LoraSVDError(
            f"compact_ranks: these ranks keep {kept / total:.4f} of the targeted parameters, more than "
            f"param_ratio={param_ratio}; lower the ranks or raise param_ratio"
        )
    return ranks


@dataclass(frozen=True)
class Options:
    """Ranks that a layer can have, ascending, their cost in numbers and the error they leave."""

    ranks: list[int]
    costs: list[int]
    errors: list[float]

    def best(self, price: float) -> int:
        """Index of the least ``error + price * cost``, the cheaper on a tie. The curves are not convex: look at all."""
        return min(range(len(self.ranks)), key=lambda i: (self.errors[i] + price * self.costs[i], self.costs[i]))


def _options(spectrum: Tensor, shape: LayerShape, factor_format: str, rank_multiple: int) -> Options:
    ranks = candidate_ranks(shape, factor_format, rank_multiple)
    tail = torch.cat([spectrum.double().flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    errors = [0.0 if rank >= shape.full_rank else float(tail[min(rank, len(spectrum))]) for rank in ranks]
    return Options(ranks, [stored_parameters(shape, rank, factor_format) for rank in ranks], errors)


def _global(options: dict[str, Options], shapes: Mapping[str, LayerShape], param_ratio: float) -> dict[str, int]:
    """Bisect the price of a parameter in error, then spend what the jumps of the curves left over."""
    budget = budget_of(shapes, param_ratio)

    def choose(price: float) -> dict[str, int]:
        return {name: option.best(price) for name, option in options.items()}

    def cost(chosen: dict[str, int]) -> int:
        return sum(options[name].costs[index] for name, index in chosen.items())

    chosen = choose(0.0)
    if cost(chosen) <= budget:
        return chosen
    # Twice the largest error: one parameter is then worth more than any, whatever the sums are rounded to.
    low, high = 0.0, 2 * max(option.errors[0] for option in options.values()) + 1e-300
    for _ in range(200):
        middle = (low * high) ** 0.5 if low > 0 else high * 1e-18
        if cost(choose(middle)) <= budget:
            high = middle
        else:
            low = middle
        if low > 0 and high / low < 1 + 1e-9:
            break
    return _spend(options, choose(high), budget)


def _spend(options: dict[str, Options], chosen: dict[str, int], budget: int) -> dict[str, int]:
    """Raise one layer at a time, the largest gain per parameter first, while it fits.

    Every larger rank is a candidate, not only the next: a flat spectrum gains little until the layer is dense. One that
    gains nothing is none.
    """
    chosen = dict(chosen)
    left = budget - sum(options[name].costs[index] for name, index in chosen.items())
    while True:
        steps = []
        for name, index in chosen.items():
            option = options[name]
            for larger in range(index + 1, len(option.ranks)):
                price = option.costs[larger] - option.costs[index]
                if price > left:
                    break
                if (gain := option.errors[index] - option.errors[larger]) > 0:
                    steps.append((gain / price, name, larger))
        if not steps:
            return chosen
        _, name, larger = max(steps)
        left -= options[name].costs[larger] - options[name].costs[chosen[name]]
        chosen[name] = larger


def _uniform(options: dict[str, Options], shapes: Mapping[str, LayerShape], param_ratio: float) -> dict[str, int]:
    """Every layer the same share of its own size: the largest rank that its share pays for, rank 1 where none does.

    Layers too small for their share at rank 1 are paid for by the largest ranks of the others.
    """
    chosen = {}
    for name, option in options.items():
        share = budget_of({name: shapes[name]}, param_ratio)
        chosen[name] = max((i for i, cost in enumerate(option.costs) if cost <= share), default=0)
    budget = budget_of(shapes, param_ratio)
    while sum(options[name].costs[index] for name, index in chosen.items()) > budget:
        name = max((n for n in chosen if chosen[n] > 0), key=lambda n: options[n].costs[chosen[n]])
        chosen[name] -= 1
    return chosen


# How indices into the options of each layer are chosen: by name, ``(options, shapes, param_ratio) -> indices``.
ALLOCATIONS: dict[str, Callable[[dict[str, Options], Mapping[str, LayerShape], float], dict[str, int]]] = {
    "global": _global,
    "uniform": _uniform,
}
