"""``LoraSVDEmbedding``: an embedding as a linear layer of unit vectors, none of which is formed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compact import TiedHead
from ..decompositions import DECOMPOSITIONS
from ..errors import LoraSVDError
from ..importance import IMPORTANCES
from ..statistics import STATISTICS, token_summand
from ..statistics.backward import Observe
from ..statistics.tokens import TokenObservation
from .adapter import LayerAdapter, LayerFactors
from .layer import LoraSVDLinear

if TYPE_CHECKING:
    from ..config import LoraSVDConfig


def _is_of_outputs(name: str) -> bool:
    return STATISTICS[name].side == "rows" and STATISTICS[name].per == "token"


class LoraSVDEmbedding(LoraSVDLinear):
    """``y = W e_id + s B A e_id``, later ``y = left (right e_id) + s B A e_id``, by lookup of columns.

    W (out, in) is the transposed weight of the embedding: in is the number of ids, out the width. The bypass is that of
    PEFT's LoRA for embeddings: A = 0 and B random at first, so that ids that are never seen, and the padding, whose
    column gets no gradient, keep what they have; without dropout. An output layer that is tied to it computes with the
    transpose of all this: :meth:`transposed`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_ids = self.in_features

    def _init_bypass(self, adapter: LayerAdapter, *, zero: bool) -> None:
        nn.init.normal_(adapter.B)
        if zero:
            nn.init.zeros_(adapter.A)
        else:
            nn.init.normal_(adapter.A)

    def _autocast_input(self, x: Tensor) -> Tensor:
        return x

    def _columns(self, ids: Tensor, matrix: Tensor) -> Tensor:
        """``matrix e_id``, (..., m), of a matrix (m, in)."""
        base: Any = self.get_base_layer()
        return F.embedding(ids, matrix.T, padding_idx=base.padding_idx)

    def _bypass_hidden(self, x: Tensor, adapter: LayerAdapter, A: Tensor) -> Tensor:
        return self._columns(x, A)

    def _dense_output(self, x: Tensor) -> Tensor:
        return self._columns(x, self.dense_weight())

    def transposed(self, h: Tensor) -> Tensor:
        """``W^T h + s A^T B^T h``, (..., in), of h (..., out): what an output layer that is tied to it computes."""
        weight = self.get_base_weight()
        if self.disable_adapters or self.merged:
            return F.linear(h, weight)
        adapters = self._active()
        compressed = [adapter.factors for adapter in adapters if adapter.factors is not None]
        parts = [] if len(compressed) == 1 else [(1 - len(compressed)) * F.linear(h, weight)]
        parts += [factors.transposed(h) for factors in compressed]
        for adapter in adapters:
            hidden = F.linear(self._cast_input_dtype(h, adapter.B.dtype), adapter.B.T)
            parts.append((F.linear(hidden, adapter.A.T) * adapter.scaling).to(parts[0].dtype))
        result = reduce(torch.add, parts)
        watched = {name for adapter in adapters for name in adapter.observer.wanted}
        if result.requires_grad and any(map(_is_of_outputs, watched)):
            return Observe.apply(h, result, self._observe_head)
        return result

    def rows(self) -> Tensor:
        """``W^T + s A^T B^T``, (in, out), with gradients, for losses that read the weight of a tied output layer."""
        if self.disable_adapters or self.merged:
            return self.get_base_weight()
        return self._read_by_loss(self._weight_in_force().T)

    def _is_hidden(self, statistic: str) -> bool:
        return _is_of_outputs(statistic) or STATISTICS[statistic].per == "sample"

    def _observe_head(self, h: Tensor, g: Tensor) -> None:
        """Add to the sums of outputs what the output layer that is tied to this one says of W.

        Its gradient of W is ``h g^T``, as that of the embedding is ``g e_id^T``. What an error of W costs, traced over
        the ids, is ``|g|^2 h h^T`` here and ``g g^T`` there: as if ``|g| h`` had been one more gradient of the
        embedding's outputs. The ids keep their frequencies as metric; those that g^2 has are much alike.
        """
        h = h.detach()
        size = torch.linalg.vector_norm(g, dim=-1, keepdim=True, dtype=torch.float32) / self._divisor
        rows = (h.float() * size).reshape(1, -1, h.shape[-1])
        finite = rows.sum(-1).isfinite()
        rows = rows.masked_fill(~finite[..., None], 0)
        tokens = TokenObservation(rows, rows, finite, self.shared)
        for observer in (adapter.observer for adapter in self._active()):
            for name in filter(_is_of_outputs, observer.wanted):
                observer.add(name, token_summand(name, tokens, observer.sketches.get(name)), self.shared)

    def _factored_output(self, x: Tensor, factors: LayerFactors, bias: Tensor | None = None) -> Tensor:
        """In the type of the base weight, under autocast as well, as an embedding has it."""
        base: Any = self.get_base_layer()
        return factors.looked_up(x, self._float_dtype(), base.padding_idx)


class AdaptedHead(TiedHead):
    """An output layer tied to an embedding with a bypass. ``dense`` is the layer that it stands for meanwhile."""

    def __init__(self, embedding: LoraSVDEmbedding, dense: nn.Module) -> None:
        super().__init__(embedding)
        self._dense = (dense,)  # not as a part, as the embedding

    @property
    def dense(self) -> nn.Module:
        return self._dense[0]


def is_plain_embedding(module: nn.Module) -> bool:
    """Not a subclass that computes something else, such as one that scales."""
    return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward


def check_embedding(name: str, base: nn.Module, config: LoraSVDConfig, tied: Mapping[str, nn.Module]) -> None:
    """Raise if factors could not take the place of an embedding. tied: others that have its weight, by name."""
    given: Any = base
    if given.max_norm is not None:
        raise LoraSVDError(
            f"target_modules: {name} is an embedding with max_norm={given.max_norm}, expected None, since it changes "
            f"its frozen weight whenever it is called. Leave it out: exclude_modules={[name]}"
        )
    if not DECOMPOSITIONS[config.decomposition].is_low_rank:
        raise LoraSVDError(
            f"decomposition: got {config.decomposition!r} for the embedding {name}, expected one of low rank, since "
            "an id is looked up in a factor with a column for each id. Set decomposition='svd', or leave it out: "
            f"exclude_modules={[name]}"
        )
    if not tied:
        return
    if len(tied) > 1 or not all(type(head) is nn.Linear and head.bias is None for head in tied.values()):
        raise LoraSVDError(
            f"target_modules: the weight of the embedding {name} is that of {', '.join(tied)} as well, expected one "
            "linear layer without bias at most, which can use its factors. A linear layer that is targeted too gets "
            f"factors of its own, counted beside these; or leave the embedding out: exclude_modules={[name]}"
        )
    if any(STATISTICS[statistic].per == "sample" for statistic in IMPORTANCES[config.importance].statistics):
        raise LoraSVDError(
            f"importance: got {config.importance!r} for the embedding {name}, whose weight is that of {', '.join(tied)}"
            " as well, expected another one, since gradients of single samples are not observed in both. Leave the "
            f"embedding out: exclude_modules={[name]}"
        )
