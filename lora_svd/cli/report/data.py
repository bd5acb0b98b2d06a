"""Content of a run's report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ...compact import LowRankEmbedding, ParameterReport
from ...compact.bnb import num_bytes
from ...evaluation import Perplexity
from ..results import RunResults
from .messages import Messages
from .trained import TrainingSummary

PARTS: tuple[str, ...] = ("embeddings", "attention", "MLP", "head", "other")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|expert|moe|intermediate|relu|\d\.output|(^|\.)fc\d", re.IGNORECASE)
_NORM = re.compile(r"norm|(^|[._])ln([._]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Measured:
    """Size, perplexity and a continued prompt of a model, dense or compact.

    Attributes:
        size: parameters and bytes.
        bytes_by_part: see :func:`bytes_by_part`.
        perplexity: on the text for evaluation.
        says: the prompt and its continuation; empty without a prompt.
    """

    size: ParameterReport
    bytes_by_part: Mapping[str, int]
    perplexity: Perplexity
    says: str


@dataclass(frozen=True)
class ReportData:
    """Content of the page.

    Attributes:
        run: the measured numbers, the recipe and the versions.
        dense: the model as loaded.
        compact: the compact model.
        training: ranks, spectra and the Trainer's log.
        perplexities: by param_ratio, those of the dense model (None) and of the merged size included.
        prompt: what both models continued; empty: nothing.
        messages: warnings, counted by source and text.
    """

    run: RunResults
    dense: Measured
    compact: Measured
    training: TrainingSummary
    perplexities: Mapping[float | None, Perplexity]
    prompt: str
    messages: Messages


def bytes_by_part(model: nn.Module) -> dict[str, int]:
    """Bytes of all parameters and buffers by part of the model, tied ones once; their sum is ``ParameterReport.bytes``.

    Embeddings and the head are told by type and by ``get_output_embeddings``, attention and MLP by the names that
    transformers gives them; a head tied to the embeddings counts as embeddings.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore[reportCallIssue]
    parts = dict.fromkeys(PARTS, 0)
    in_head = {id(module) for module in head.modules()} if isinstance(head, nn.Module) else set()
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding | LowRankEmbedding)]
    in_embeddings = {id(part) for module in embeddings for part in module.modules()}
    counted: set[int] = set()
    for name, module in model.named_modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) not in counted:
                counted.add(id(tensor))
                parts[_part(name, module, in_embeddings, in_head)] += num_bytes(tensor)
    return parts


def _part(name: str, module: nn.Module, in_embeddings: set[int], in_head: set[int]) -> str:
    if id(module) in in_embeddings:
        return "embeddings"
    if id(module) in in_head:
        return "head"
    if _NORM.search(name.rpartition(".")[2]):
        return "other"
    if _ATTENTION.search(name):
        return "attention"
    return "MLP" if _MLP.search(name) else "other"
