"""Which features of a layer a process holds, in which order. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Neighbouring features of a dense layer that are divided evenly: this process has part ``index`` of ``count``."""

    start: int
    size: int
    index: int = 0
    count: int = 1


def features_here(dense: int, kept: int, chunks: int, spans: Sequence[Span], *, narrow: bool) -> Tensor:
    """The stored features that this process holds, int64; -1: zeros in the place of one that is gone.

    Args:
        dense, kept: features before compression, and those that are stored: the first of every chunk.
        chunks: parts of the features that each have lost as many.
        spans: of the dense layer.
        narrow: leave the gone features out, instead of zeros.
    """
    if narrow:
        return torch.cat([_part(span, kept, dense) for span in spans])
    features = torch.cat([_part(span, dense, dense) for span in spans])
    chunk, place = features // (dense // chunks), features % (dense // chunks)
    of_chunk = kept // chunks
    return torch.where(place < of_chunk, chunk * of_chunk + place, -1)


def _part(span: Span, kept: int, dense: int) -> Tensor:
    """The part of a span that is here, in a layer of which ``kept`` of ``dense`` features are left."""
    start, size = span.start * kept // dense, span.size * kept // dense
    width = size // span.count
    return torch.arange(start + span.index * width, start + (span.index + 1) * width)
