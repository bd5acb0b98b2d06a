"""Which rank each layer keeps, and how many neurons: spectra, shapes and a budget in, ranks and neurons out. Pure.

The full rank means "stored dense": it costs ``out * in`` numbers and has no error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
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

    def narrowed(self, rows: Tensor | None, columns: Tensor | None) -> LayerShape:
        """With these rows and columns only; None: all."""
        out_features = self.out_features if rows is None else len(rows)
        in_features = self.in_features if columns is None else len(columns)
        return replace(self, out_features=out_features, in_features=in_features)


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


@dataclass(frozen=True)
class Choice:
    """A number of neurons that a group of layers can keep; of a layer on its own the only choice.

    Attributes:
        neurons: those kept, ascending; None: all there are, or a layer on its own.
        error: what leaving out the others costs.
        spectra: by layer, of what is left of it, the squared singular values in the metric of the loss, descending,
            (full_rank,).
        shapes: of the same.
        heads: whether the neurons are heads.
    """

    neurons: Tensor | None
    error: float
    spectra: Mapping[str, Tensor]
    shapes: Mapping[str, LayerShape]
    heads: bool = False


@dataclass(frozen=True)
class Allocation:
    """What every layer keeps.

    Attributes:
        ranks: kept rank by layer.
        neurons: kept neurons by the name of the group, of the groups that lose some.
        error: predicted rise of the loss.
    """

    ranks: dict[str, int]
    neurons: dict[str, Tensor]
    error: float


def allocate(
    units: Mapping[str, Sequence[Choice]],
    *,
    param_ratio: float,
    allocation: str = "global",
    factor_format: str = "pivoted",
    rank_multiple: int = 8,
) -> Allocation:
    """Ranks and neurons whose stored numbers are at most ``param_ratio`` of the targeted weights.

    One price for a parameter decides both: each group takes the choice with the least sum of what leaving out neurons
    costs, what truncation costs, and the price of what is stored. The predicted error is at most that of ranks alone.

    Args:
        units: what each group, or layer on its own, can keep; the last choice is all of it.
        param_ratio: kept / original numbers of the targeted weights, in (0, 1].
        allocation: "global" minimizes the summed errors under one budget, "uniform" chooses ranks alone and gives every
            layer the same share of its own size.
        factor_format: "pivoted" or "factors": what a rank costs.
        rank_multiple: ranks are multiples of this (or 1, or dense).

    Raises:
        LoraSVDError: rank 1 everywhere exceeds the budget, or an unknown ``allocation``.
    """
    if allocation not in ALLOCATIONS:
        raise LoraSVDError(f"allocation: unknown value {allocation!r}, expected one of {sorted(ALLOCATIONS)}")
    whole = {name: choices[-1] for name, choices in units.items()}
    shapes = {layer: shape for choice in whole.values() for layer, shape in choice.shapes.items()}
    check_budget(shapes, param_ratio, factor_format)

    def options(choice: Choice) -> dict[str, Options]:
        return {
            name: _options(choice.spectra[name], shape, factor_format, rank_multiple)
            for name, shape in choice.shapes.items()
        }

    found = []
    of_layers = {name: of for choice in whole.values() for name, of in options(choice).items()}
    chosen = ALLOCATIONS[allocation](of_layers, shapes, param_ratio)
    found.append(_allocation(whole, of_layers, chosen))
    if allocation == "global" and any(len(choices) > 1 for choices in units.values()):
        priced = {name: [(choice, options(choice)) for choice in choices] for name, choices in units.items()}
        found.append(_with_neurons(priced, budget_of(shapes, param_ratio)))
    return min(found, key=lambda allocated: allocated.error)


def _allocation(kept: Mapping[str, Choice], options: Mapping[str, Options], chosen: Mapping[str, int]) -> Allocation:
    errors = [choice.error for choice in kept.values()] + [options[name].errors[i] for name, i in chosen.items()]
    return Allocation(
        ranks={name: options[name].ranks[i] for name, i in chosen.items()},
        neurons={name: choice.neurons for name, choice in kept.items() if choice.neurons is not None},
        error=sum(errors),
    )


def given_ranks(
    given: Mapping[str, int],
    shapes: Mapping[str, LayerShape],
    param_ratio: float,
    factor_format: str,
    of: Mapping[str, LayerShape] | None = None,
) -> dict[str, int]:
    """Ranks that the user chose, for the layers of ``shapes``. of: the whole layers, if those are without neurons.

    Raises:
        LoraSVDError: a layer has none, or they keep more than ``param_ratio``.
    """
    if missing := [name for name in shapes if name not in given]:
        raise LoraSVDError(
            f"compact_ranks: no rank for {missing[0]} ({len(missing)} of {len(shapes)} missing); name all"
        )
    ranks = {name: min(given[name], shape.full_rank) for name, shape in shapes.items()}
    of = of or shapes
    kept, total = kept_parameters(ranks, shapes, factor_format), sum(shape.parameters for shape in of.values())
    if kept > budget_of(of, param_ratio):
        raise LoraSVDError(
            f"compact_ranks: these ranks keep {kept / total:.4f} of the targeted parameters, more than "
            f"param_ratio={param_ratio}; lower the ranks or raise param_ratio"
        )
    return ranks


def check_size(
    shapes: Mapping[str, LayerShape],
    param_ratio: float,
    factor_format: str,
    ranks: Mapping[str, int] | None,
    widths: Mapping[str, int] | None,
) -> None:
    """Raise if the budget cannot be reached, or if given ranks exceed it; of ranks beside widths that shows later."""
    if not ranks:
        check_budget(shapes, param_ratio, factor_format)
    elif not widths:
        given_ranks(ranks, shapes, param_ratio, factor_format)


@dataclass(frozen=True)
class Options:
    """Ranks that a layer can have, ascending, their cost in numbers and the error they leave."""

    ranks: list[int]
    costs: list[int]
    errors: list[float]

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.errors), np.array(self.costs, dtype=np.float64)

    def best(self, price: float) -> int:
        """Index of the least ``error + price * cost``, the cheaper on a tie. The curves are not convex: look at all."""
        errors, costs = self._arrays
        return int((errors + price * costs).argmin())


def _options(spectrum: Tensor, shape: LayerShape, factor_format: str, rank_multiple: int) -> Options:
    ranks = candidate_ranks(shape, factor_format, rank_multiple)
    tail = torch.cat([spectrum.double().flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    errors = [0.0 if rank >= shape.full_rank else float(tail[min(rank, len(spectrum))]) for rank in ranks]
    return Options(ranks, [stored_parameters(shape, rank, factor_format) for rank in ranks], errors)


def _global(options: dict[str, Options], shapes: Mapping[str, LayerShape], param_ratio: float) -> dict[str, int]:
    """Bisect the price of a parameter in error, then spend what the jumps of the curves left over."""
    budget = budget_of(shapes, param_ratio)
    price = _least_price({name: _UnitOptions([0.0], [[of]]) for name, of in options.items()}, budget)
    return _spend(options, {name: of.best(price) for name, of in options.items()}, budget)


def _with_neurons(priced: Mapping[str, list[tuple[Choice, dict[str, Options]]]], budget: int) -> Allocation:
    """The same over neurons and ranks together."""
    units = {
        name: _UnitOptions([choice.error for choice, _ in choices], [list(by.values()) for _, by in choices])
        for name, choices in priced.items()
    }
    price = _least_price(units, budget)
    kept = {name: priced[name][unit.best(price)[0]] for name, unit in units.items()}
    options = {layer: of for _, by in kept.values() for layer, of in by.items()}
    chosen = _spend(options, {layer: of.best(price) for layer, of in options.items()}, budget)
    return _allocation({name: choice for name, (choice, _) in kept.items()}, options, chosen)


class _UnitOptions:
    """All that a group, or a layer on its own, can keep, in arrays (choices, layers, ranks).

    Args:
        errors: of each choice, before any truncation.
        options: the ranks of each of its layers.
    """

    def __init__(self, errors: Sequence[float], options: Sequence[Sequence[Options]]) -> None:
        most = max(len(of.ranks) for choice in options for of in choice)
        self._chosen = np.array(errors)
        self._errors = np.full((len(options), len(options[0]), most), np.inf)
        self._costs = np.zeros(self._errors.shape)
        for i, choice in enumerate(options):
            for j, of in enumerate(choice):
                self._errors[i, j, : len(of.ranks)], self._costs[i, j, : len(of.ranks)] = of.errors, of.costs
        self.largest_error = float((self._chosen[:, None] + self._errors[:, :, 0]).max())

    def best(self, price: float) -> tuple[int, int]:
        """Index and cost of the choice of least ``error + price * cost``."""
        at = (self._errors + price * self._costs).argmin(-1, keepdims=True)
        costs = np.take_along_axis(self._costs, at, -1).sum((1, 2))
        values = self._chosen + np.take_along_axis(self._errors, at, -1).sum((1, 2)) + price * costs
        index = int(values.argmin())
        return index, int(costs[index])


def _least_price(units: Mapping[str, _UnitOptions], budget: int) -> float:
    """The least price of a parameter at which the budget is met."""

    def fits(price: float) -> bool:
        return sum(unit.best(price)[1] for unit in units.values()) <= budget

    if fits(0.0):
        return 0.0
    # Twice the largest error: one parameter is then worth more than any, whatever the sums are rounded to.
    low, high = 0.0, 2 * max(unit.largest_error for unit in units.values()) + 1e-300
    for _ in range(200):
        middle = (low * high) ** 0.5 if low > 0 else high * 1e-18
        if fits(middle):
            high = middle
        else:
            low = middle
        if low > 0 and high / low < 1 + 1e-9:
            break
    return high


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
