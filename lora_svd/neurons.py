"""Neurons and heads that go, priced by the loss that ranks are priced by. Pure, float64.

A *group* is a consumer ``y = W a`` and the producers of ``a``, which consists of units: a unit of ``a`` depends on the
rows of one unit of theirs alone. A unit is a neuron of an MLP, one feature as in ``W_down (act(gate x) * up x)``, or a
key-value head of an attention with its queries, a block of features. With a metric A of a, C of y, leaving out the
features R and refitting the rest costs ``tr(C W_R S W_R^T)``, ``S = A_RR - A_RK A_KK^-1 A_KR``: whatever C is,
``W_K' = W A_:K A_KK^-1`` is best.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import LoraSVDError
from .linalg import Metrics, eigenvalues, metric_root, metric_times, root_transpose_times

_BLOCK = 64  # neurons that are left out between two updates of whole matrices
_MOST_WIDTHS = 12  # finer ones fit the observed text more closely, and lose more elsewhere
_ALIGNED, _WIDE = 64, 256  # widths that kernels and blocks of 4-bit weights want, of as many neurons or more


@dataclass(frozen=True)
class NeuronGroup:
    """Layers that share neurons or heads, by name.

    Attributes:
        consumer: takes neuron j as input feature j.
        producers: whose output features j, j + n, j + 2 n, ... make neuron j of n, and no other.
        heads: m, if the units are not neurons: the i-th of m equal parts of the producers' output features makes the
            i-th of m equal parts of the consumer's input features, and no other.
    """

    consumer: str
    producers: tuple[str, ...]
    heads: int | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        return (*self.producers, self.consumer)

    def units(self, in_features: int) -> int:
        """Number of neurons or heads, of the consumer's input features."""
        return self.heads or in_features

    def check_width(self, width: int, in_features: int) -> None:
        """Raise if a width that the user gave is more than there are units."""
        if width > (units := self.units(in_features)):
            unit = "heads" if self.heads else "neurons"
            raise LoraSVDError(f"compact_widths: got {width} for {self.consumer}, expected at most its {units} {unit}")

    def features(self, kept: Tensor, size: int, units: int) -> Tensor:
        """Those of the ``size`` features of one side of a layer that belong to some of ``units``, ascending."""
        block = size // units if self.heads else 1
        starts = torch.arange(0, size, units * block)
        return (starts[:, None, None] + block * kept[:, None] + torch.arange(block)).flatten()


@dataclass(frozen=True)
class Elimination:
    """Units in the order in which they are left out, the least useful first.

    Attributes:
        order: (m,) int64.
        costs: (m,), by how much the loss rises with each; their sum is the cost of the set.
        removed: (out, m b), columns d, b of each unit, whose ``d d^T`` add up to what ``W A W^T`` loses.
    """

    order: Tensor
    costs: Tensor
    removed: Tensor

    def kept(self, width: int, total: int) -> Tensor:
        """The units that are left at a width, ascending."""
        stays = torch.ones(total, dtype=torch.bool)
        stays[self.order[: total - width]] = False
        return stays.nonzero().flatten()


def eliminate(weight: Tensor, metrics: Metrics, least: int) -> Elimination:
    """Leave out input features of a weight one by one until ``least`` are left, each time the cheapest.

    With ``P = A^-1`` and the W that is refitted so far, neuron j costs ``w_j^T C w_j / P_jj``; then
    ``W <- W - w_j a^T`` and ``P <- P - P_jj a a^T`` with ``a = P_:j / P_jj``, and ``N = W^T C W`` follows,
    ``N <- N - a c^T - c a^T`` with ``c = N_:j - N_jj a / 2``. Exact in every step; whole matrices
    are updated once in 64.

    Args:
        weight: W, (out, n).
        metrics: C and A, definite; A a matrix, or a diagonal, where nothing is refitted.
        least: features that stay, in [1, n].
    """
    W, A = weight.double(), metrics.column
    num_out, number = W.shape[0], W.shape[1] - least
    if A is None or A.dim() == 1:
        power = torch.ones(W.shape[1], dtype=torch.float64) if A is None else A
        cost = (W * metric_times(metrics.row, W)).sum(0) * power
        order = cost.argsort(stable=True)[:number]
        return Elimination(order, cost[order], W[:, order] * power[order].sqrt())
    P = torch.cholesky_inverse(torch.linalg.cholesky(A))
    N = W.T @ metric_times(metrics.row, W)
    names = torch.arange(W.shape[1])
    order, costs = torch.empty(number, dtype=torch.int64), torch.empty(number, dtype=torch.float64)
    removed = torch.empty(num_out, number, dtype=torch.float64)
    for start in range(0, number, _BLOCK):
        count = min(_BLOCK, number - start)
        a, c, scaled = (torch.zeros(len(names), count, dtype=torch.float64) for _ in range(3))
        w = torch.zeros(num_out, count, dtype=torch.float64)
        p_diagonal, n_diagonal = P.diagonal().clone(), N.diagonal().clone()
        stays = torch.ones(len(names), dtype=torch.bool)
        for i in range(count):
            cost = (n_diagonal.clamp_min(0) / p_diagonal).masked_fill(~stays, torch.inf)
            j = int(cost.argmin())
            done = slice(0, i)
            p = P[:, j] - scaled[:, done] @ a[j, done]
            n = N[:, j] - a[:, done] @ c[j, done] - c[:, done] @ a[j, done]
            w[:, i] = W[:, j] - w[:, done] @ a[j, done]
            pivot = p[j].clone()
            a[:, i] = p / pivot
            scaled[:, i] = p
            c[:, i] = n - n[j] / 2 * a[:, i]
            p_diagonal -= p * a[:, i]
            n_diagonal -= 2 * a[:, i] * c[:, i]
            stays[j] = False
            order[start + i], costs[start + i] = names[j], n[j].clamp_min(0) / pivot
            removed[:, start + i] = w[:, i] / pivot.sqrt()
        names, a, c, scaled = names[stays], a[stays], c[stays], scaled[stays]
        P = P[stays][:, stays] - scaled @ a.T
        cross = a @ c.T
        N = N[stays][:, stays] - cross - cross.T
        W = W[:, stays] - w @ a.T
    return Elimination(order, costs, removed)


def eliminate_heads(weight: Tensor, metrics: Metrics, heads: int, least: int) -> Elimination:
    """Leave out equal parts of the input features of a weight one by one until ``least`` are left, as
    :func:`eliminate` does features: the part R costs ``tr(W_R^T C W_R (P_RR)^-1)`` of the W that is refitted so far.

    Args:
        weight: W, (out, n).
        metrics: C and A, definite.
        heads: number of parts.
        least: parts that stay, in [1, heads].
    """
    W, A = weight.double(), metrics.column
    if A is None or A.dim() == 1:
        A = torch.eye(W.shape[1], dtype=torch.float64) if A is None else A.diag()
    P = torch.cholesky_inverse(torch.linalg.cholesky(A))
    parts = torch.arange(W.shape[1]).view(heads, -1)
    left, order, costs, removed = list(range(heads)), [], [], [W[:, :0]]
    while len(left) > least:
        lost = {}
        for head in left:
            R = parts[head]
            root = torch.linalg.cholesky(P[R][:, R])
            lost[head] = torch.linalg.solve_triangular(root, W[:, R].T, upper=False).T  # W_R S W_R^T = d d^T
        cost = {head: float((d * metric_times(metrics.row, d)).sum()) for head, d in lost.items()}
        head = min(cost, key=cost.__getitem__)
        R = parts[head]
        back = torch.linalg.solve(P[R][:, R], P[R])
        W, P = W - W[:, R] @ back, P - P[:, R] @ back
        left.remove(head)
        order.append(head)
        costs.append(cost[head])
        removed.append(lost[head])
    return Elimination(torch.tensor(order), torch.tensor(costs, dtype=torch.float64), torch.cat(removed, 1))


def refit(weight: Tensor, metric: Tensor | None, kept: Tensor) -> Tensor:
    """``W A_:K A_KK^-1``, (out, k): the columns K of a weight (out, n), which do what they can of the others' work."""
    W = weight.double()
    if metric is None or metric.dim() == 1:
        return W[:, kept]
    return torch.linalg.solve(metric[kept][:, kept], W @ metric[:, kept], left=False)


def widths(total: int, multiple: int) -> list[int]:
    """Up to 12 widths to choose from, ascending, multiples of ``multiple``, and of 64 where there are many; and all."""
    multiple = math.lcm(multiple, _ALIGNED) if total >= _WIDE else multiple
    step = multiple * -(-total // (_MOST_WIDTHS * multiple))
    return [*range(step, total, step), total]


@dataclass(frozen=True)
class GroupWeights:
    """A group's weights and metrics, by the names of its layers, with all units."""

    group: NeuronGroup
    weights: Mapping[str, Tensor]
    metrics: Mapping[str, Metrics]

    @property
    def units(self) -> int:
        """Number of neurons or heads."""
        return self.group.units(self.weights[self.group.consumer].shape[1])

    def eliminated(self, least: int) -> Elimination:
        """The units but for ``least``, in the order in which they are left out."""
        weight, metrics = self.weights[self.group.consumer], self.metrics[self.group.consumer]
        if self.group.heads:
            return eliminate_heads(weight, metrics, self.group.heads, least)
        return eliminate(weight, metrics, least)


def width_spectra(
    given: GroupWeights, elimination: Elimination, choices: Sequence[int]
) -> Iterator[tuple[int, float, dict[str, Tensor]]]:
    """For each width, ascending: itself, the loss that leaving out the others costs, and the spectra of what is left.

    Squared singular values, descending, as :func:`..decompositions.svd.weighted_spectrum` of the producers' rows and of
    the refitted consumer. That one's follow from ``W_K' A_KK W_K'^T = W A W^T - sum d d^T`` without a refit.
    """
    group, units, consumer = given.group, given.units, given.group.consumer
    W, metrics = given.weights[consumer].double(), given.metrics[consumer]
    root = metric_root(metrics.row)
    whole = root_transpose_times(root, root_transpose_times(root, W @ metric_times(metrics.column, W.T)).T)
    removed = root_transpose_times(root, elimination.removed)
    cost = torch.cat([torch.zeros(1, dtype=torch.float64), elimination.costs.cumsum(0)])
    grams, kept = {}, [elimination.kept(width, units) for width in choices]
    for name in group.producers:
        rows = root_transpose_times(metric_root(given.metrics[name].column), given.weights[name].double().T).T
        parts = [group.features(those, len(rows), units) for those in kept]
        grams[name] = _nested_grams(rows, given.metrics[name].row, parts)
    per_unit = W.shape[1] // units
    before, left = removed.shape[1], whole - removed @ removed.T
    for width in choices:
        num_gone = (units - width) * per_unit
        back = removed[:, num_gone:before]
        before, left = num_gone, left + back @ back.T
        spectra = {}
        for name, of in grams.items():
            matrix, rows = next(of)
            spectra[name] = _descending(matrix, min(rows, len(matrix)))
        spectra[consumer] = _descending(left, min(len(left), W.shape[1] - num_gone))
        yield width, float(cost[units - width]), spectra


def _nested_grams(rows: Tensor, metric: Tensor | None, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, int]]:
    """For indices K that grow, ``rows_K^T metric_KK rows_K`` and their number: each adds what is new in it alone."""
    total, kept = torch.zeros(rows.shape[1], rows.shape[1], dtype=rows.dtype), torch.empty(0, dtype=torch.int64)
    for index in parts:
        new = index[~torch.isin(index, kept)]
        if metric is None or metric.dim() == 1:
            total = total + rows[new].T @ metric_times(None if metric is None else metric[new], rows[new])
        else:
            half = rows[new].T @ (metric[new][:, kept] @ rows[kept] + metric[new][:, new] @ rows[new] / 2)
            total = total + half + half.T
        kept = torch.cat([kept, new])
        yield total, len(kept)


def _descending(matrix: Tensor, number: int) -> Tensor:
    return eigenvalues((matrix + matrix.T) / 2).flip(0)[:number].clamp_min(0)
