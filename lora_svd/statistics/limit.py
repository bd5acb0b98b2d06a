"""Which Gram matrices are kept as sketches so that the statistics of all layers fit into a number of bytes. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from ..errors import LoraSVDError
from .registry import COUNTS, STATISTICS, stored_shape

# r of the sketches is the width of the matrix divided by the first of these with which all fit; by the last it is 0.
_SHARES = (16, 64, 256, 2**62)


def statistics_bytes(
    shapes: Mapping[str, tuple[int, int]],
    statistics: Collection[str],
    sketches: Mapping[str, Mapping[str, int]] | None = None,
) -> int:
    """Bytes of the sums (float32) and counts (int64) of layers (out, in), some of them as sketches."""
    ranks = sketches or {}
    numbers = sum(
        math.prod(stored_shape(name, *shape, ranks.get(layer, {}).get(name)))
        for layer, shape in shapes.items()
        for name in statistics
    )
    return 4 * numbers + 8 * len(COUNTS) * len(shapes)


def choose_sketches(
    shapes: Mapping[str, tuple[int, int]],
    statistics: Collection[str],
    limit: int | None,
    diagonals: Mapping[str, Mapping[str, int]] | None = None,
) -> dict[str, dict[str, int]]:
    """r of the sketch by layer and statistic, of those that are not kept whole.

    Gram matrices of outputs go before those of inputs, whose correlations matter more; then those of the layers with
    the fewest weights for their bytes, so the widest inputs (outputs); of equal ones the deepest. None is given up that
    would fit beside the others.

    Args:
        shapes: (out, in) by layer, in the order of the model.
        statistics: that every layer keeps.
        limit: see :func:`statistics_bytes`; None: keep all.
        diagonals: sketches of Gram matrices that are diagonal, by layer, which are kept in any case.

    Raises:
        LoraSVDError: even the diagonals take more than ``limit``.
    """
    kept = diagonals or {}
    if limit is None or (excess := statistics_bytes(shapes, statistics, kept) - limit) <= 0:
        return {}
    grams = [
        (layer, name)
        for layer in reversed(list(shapes))
        for name in statistics
        if STATISTICS[name].gram and name not in kept.get(layer, {})
    ]

    def weights_per_byte(gram: tuple[str, str]) -> tuple[bool, float]:
        layer, name = gram
        whole = math.prod(stored_shape(name, *shapes[layer]))
        return STATISTICS[name].side == "columns", math.prod(shapes[layer]) / whole

    for share in _SHARES:
        ranks = {(layer, name): stored_shape(name, *shapes[layer])[0] // share for layer, name in grams}
        saved = {gram: _saved(gram[1], shapes[gram[0]], rank) for gram, rank in ranks.items()}
        if sum(saved.values()) >= excess:
            break
    else:
        raise LoraSVDError(
            f"statistics_limit: got {limit}, expected at least {limit + excess - sum(saved.values())} bytes, which the "
            f"{' and '.join(statistics)} of {len(shapes)} layers take with the diagonals of Gram matrices alone"
        )
    chosen: dict[tuple[str, str], int] = {}
    for gram in sorted((gram for gram in grams if saved[gram] > 0), key=weights_per_byte):
        if excess > 0:
            chosen[gram] = ranks[gram]
            excess -= saved[gram]
    for gram in reversed(list(chosen)):
        if excess + saved[gram] <= 0:
            del chosen[gram]
            excess += saved[gram]
    by_layer = {layer: {name: r for (of, name), r in chosen.items() if of == layer} for layer in shapes}
    return {layer: found for layer, found in by_layer.items() if found}


def _saved(name: str, shape: tuple[int, int], rank: int) -> int:
    """Bytes that the sketch of a Gram matrix saves."""
    return 4 * (math.prod(stored_shape(name, *shape)) - math.prod(stored_shape(name, *shape, rank)))


def describe_sketches(
    shapes: Mapping[str, tuple[int, int]], sketches: Mapping[str, Mapping[str, int]], limit: int | None
) -> str:
    """Which layers (out, in) keep a sketch of what, and their share of the parameters."""
    statistics = sorted({name for ranks in sketches.values() for name in ranks})
    kept = [f"{name} of {', '.join(layer for layer in sketches if name in sketches[layer])}" for name in statistics]
    share = sum(math.prod(shapes[layer]) for layer in sketches) / sum(map(math.prod, shapes.values()))
    return (
        f"statistics_limit: in {limit} bytes {len(sketches)} of {len(shapes)} layers, with {share:.1%} of the targeted "
        f"parameters, keep sketches only: {'; '.join(kept)}"
    )
