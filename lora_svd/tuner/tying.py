"""Weights that modules have in common: heads tied to an embedding, before a merge and after it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..compact import LowRankEmbedding
from ..compact.host import untie
from ..compact.layers import tie_head
from .embedding import AdaptedHead


def untie_all(model: Any, names: Iterable[str]) -> list[str]:
    """Untie these modules and return those that were tied."""
    tied = [name for name in names if untie(model, name)]
    if tied:
        model.config.tie_word_embeddings = False  # or PEFT takes the merge for one of tied weights
    return tied


def copy_tied_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Give layers whose weight is tied to another one's a copy of their own, which a merge may change."""
    for name in untie_all(model, names):  # or the embedding would change with the head
        layer: Any = model.get_submodule(name)
        base = layer.get_base_layer()
        base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)


def adapted_heads(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Output layers that use an embedding's bypass, by name: the dense layer that each was, and the embedding."""
    names = {module: name for name, module in model.named_modules()}
    return {name: (head.dense, names[head.embedding]) for head, name in names.items() if isinstance(head, AdaptedHead)}


def tie_again(model: Any, heads: dict[str, tuple[nn.Module, str]]) -> dict[str, str]:
    """Give output layers what their embedding has become: its weight, or its factors.

    Returns:
        The embedding's name by the name of each output layer that uses factors.
    """
    low_rank = {}
    for name, (head, embedding_name) in heads.items():
        embedding = model.get_submodule(embedding_name)
        if isinstance(embedding, LowRankEmbedding):
            tie_head(model, name, embedding_name)
            low_rank[name] = embedding_name
        elif isinstance(embedding, nn.Embedding):
            head.weight = embedding.weight
            model.set_submodule(name, head)
    if low_rank:
        model.config.tie_word_embeddings = False  # or PEFT takes the merge for one of tied weights
    return low_rank
