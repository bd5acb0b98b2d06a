"""TensorGPT (Xu et al., 2023): the embedding of every token as a tensor train of its own.

A vector of width H is read as a tensor (n_1, ..., n_N), H = n_1 ... n_N, and stored as cores (r_(k-1), n_k, r_k) with
r_0 = r_N = 1, found by successive truncated SVDs (TT-SVD, Oseledets 2011). Ranks are the same for all tokens: r_k is
the smallest of ``bond``, n_1 ... n_k and n_(k+1) ... n_N. The paper leaves the shape open; of all ordered
factorizations of H, each with the highest ``bond`` that ``param_ratio`` allows, the one with the least squared error on
a sample of the tokens is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

SAMPLE = 256


class TensorTrainEmbedding(nn.Module):
    """Looks up the cores of a token and contracts them. cores: (ids, r_(k-1), n_k, r_k) for each k."""

    def __init__(self, cores: list[Tensor]) -> None:
        super().__init__()
        self.cores = nn.ParameterList(cores)

    def forward(self, ids: Tensor) -> Tensor:
        return contracted([core[ids] for core in self.cores])


def contracted(cores: list[Tensor]) -> Tensor:
    """The vectors (..., H) of cores (..., r_(k-1), n_k, r_k)."""
    rows = cores[0].flatten(-3, -2)
    for core in cores[1:]:
        rows = torch.einsum("...ar,...rnk->...ank", rows, core).flatten(-3, -2)
    return rows.squeeze(-1)


def ordered_factorizations(width: int) -> Iterator[tuple[int, ...]]:
    """All (n_1, ..., n_N) of factors above 1 whose product is ``width``, with N at least 1."""
    yield (width,)
    for first in range(2, width // 2 + 1):
        if width % first == 0:
            yield from ((first, *rest) for rest in ordered_factorizations(width // first))


def bonds(shape: tuple[int, ...], bond: int) -> list[int]:
    """r_0 to r_N."""
    return [min(bond, prod(shape[:k]), prod(shape[k:])) for k in range(len(shape) + 1)]


def numbers(shape: tuple[int, ...], bond: int) -> int:
    """How many a token takes."""
    ranks = bonds(shape, bond)
    return sum(left * n * right for left, n, right in zip(ranks[:-1], shape, ranks[1:], strict=True))


def tensor_train(vectors: Tensor, shape: tuple[int, ...], bond: int) -> list[Tensor]:
    """Cores of vectors (ids, H) by TT-SVD."""
    ids, ranks, rest, cores = len(vectors), bonds(shape, bond), vectors, []
    for left, n, right in zip(ranks[:-2], shape[:-1], ranks[1:-1], strict=True):
        U, S, Vh = torch.linalg.svd(rest.reshape(ids, left * n, -1), full_matrices=False)
        cores.append(U[..., :right].reshape(ids, left, n, right))
        rest = S[:, :right, None] * Vh[:, :right]
    return [*cores, rest.reshape(ids, ranks[-2], shape[-1], 1)]


def best_shape(vectors: Tensor, param_ratio: float) -> tuple[tuple[int, ...], int]:
    """The shape and bond with the least error on a sample of the vectors (ids, H).

    Raises:
        ValueError: even the smallest train is larger.
    """
    ids, width = vectors.shape
    budget, sample = param_ratio * width, vectors[:: max(1, ids // SAMPLE)]
    found: dict[tuple[tuple[int, ...], int], float] = {}
    for shape in ordered_factorizations(width):
        bond = max((bond for bond in range(1, width) if numbers(shape, bond) <= budget), default=0)
        if bond:
            error = sample - contracted(tensor_train(sample, shape, bond))
            found[shape, bond] = float(error.square().sum())
    if not found:
        least = min(numbers(shape, 1) for shape in ordered_factorizations(width)) / width
        raise ValueError(f"param_ratio: {param_ratio} is too small for a width of {width}, expected at least {least}")
    return min(found, key=lambda chosen: found[chosen])


@torch.no_grad()
def tensor_trains(model: Any, param_ratio: float) -> Any:
    """Replace the token embedding in place by at most ``param_ratio`` of its numbers."""
    vectors = model.get_input_embeddings().weight
    shape, bond = best_shape(vectors, param_ratio)
    model.set_input_embeddings(TensorTrainEmbedding(tensor_train(vectors, shape, bond)))
    return model
