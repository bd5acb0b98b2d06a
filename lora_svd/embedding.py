"""``LoraSVDEmbedding``: an embedding as a linear layer of unit vectors, none of which is formed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decompositions import DECOMPOSITIONS
from .errors import LoraSVDError
from .importance import IMPORTANCES
from .layer import FACTOR_SCALE, LoraSVDLinear
from .statistics import STATISTICS, token_summand
from .tokens import Observe, TokenObservation

if TYPE_CHECKING:
    from .config import LoraSVDConfig


_OF_OUTPUTS = {"lora_gradient_gram", "output_gram", "output_square"}


class LoraSVDEmbedding(LoraSVDLinear):
    """``y = W e_id + s B A e_id``, later ``y = left (right e_id) + s B A e_id``, by lookup of columns.

    W (out, in) is the transposed weight of the embedding: in is the number of ids, out the width. The bypass is that of
    PEFT's LoRA for embeddings: A = 0 and B random at first, so that ids that are never seen, and the padding, whose
    column gets no gradient, keep what they have; without dropout. An output layer that is tied to it computes with the
    transpose of all this: :meth:`transposed`.
    """

    diagonals: ClassVar = {"input_gram": 0}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_ids = self.in_features

    def _init_bypass(self, adapter_name: str, zero: bool) -> None:
        nn.init.normal_(self.lora_svd_B[adapter_name])
        if zero:
            nn.init.zeros_(self.lora_svd_A[adapter_name])
        else:
            nn.init.normal_(self.lora_svd_A[adapter_name])

    def _autocast_input(self, x: Tensor) -> Tensor:
        return x

    def _columns(self, ids: Tensor, matrix: Tensor) -> Tensor:
        """``matrix e_id``, (..., m), of a matrix (m, in)."""
        base: Any = self.get_base_layer()
        return F.embedding(ids, matrix.T, padding_idx=base.padding_idx)

    def _bypass_hidden(self, x: Tensor, adapter_name: str) -> Tensor:
        return self._columns(x, self.lora_svd_A[adapter_name])

    def _dense_output(self, x: Tensor) -> Tensor:
        return self._columns(x, self.dense_weight())

    def transposed(self, h: Tensor) -> Tensor:
        """``W^T h + s A^T B^T h``, (..., in), of h (..., out): what an output layer that is tied to it computes."""
        weight = self.get_base_weight()
        if self.disable_adapters or self.merged:
            return F.linear(h, weight)
        adapters = [name for name in self.active_adapters if name in self.lora_svd_A]
        compressed = [name for name in adapters if name in self._state("left")]
        parts = [] if len(compressed) == 1 else [(1 - len(compressed)) * F.linear(h, weight)]
        for name in compressed:
            left, right = (self._state(side)[name].to(h.dtype) for side in ("left", "right"))
            parts.append(F.linear(F.linear(h, left.T) * FACTOR_SCALE**-2, right.T))
        for name in adapters:
            A, B = self.lora_svd_A[name], self.lora_svd_B[name]
            hidden = F.linear(self._cast_input_dtype(h, B.dtype), B.T)
            parts.append((F.linear(hidden, A.T) * self.scaling[name]).to(parts[0].dtype))
        result = reduce(torch.add, parts)
        watched = {name for adapter in adapters for name in self._observed.get(adapter, ())}
        if result.requires_grad and watched & _OF_OUTPUTS:
            return Observe.apply(h, result, self._observe_head)
        return result

    def _observe_head(self, h: Tensor, g: Tensor) -> None:
        """Add to the sums of outputs what the output layer that is tied to this one says of W.

        Its gradient of W is ``h g^T``, as that of the embedding is ``g e_id^T``. What an error of W costs, traced over
        the ids, is ``|g|^2 h h^T`` here and ``g g^T`` there: as if ``|g| h`` had been one more gradient of the
        embedding's outputs. The ids keep their frequencies as metric; those that g^2 has are much alike.
        """
        size = torch.linalg.vector_norm(g, dim=-1, keepdim=True, dtype=torch.float32) / self._shared.divisor
        rows = (h.float() * size).reshape(1, -1, h.shape[-1])
        finite = rows.sum(-1).isfinite()
        rows = rows.masked_fill(~finite[..., None], 0)
        seen = TokenObservation(rows, rows, finite, self._shared)
        for adapter_name, names in self._observed.items():
            if adapter_name in self.active_adapters:
                for name in _OF_OUTPUTS & set(names):
                    value = token_summand(name, seen, self._sketch_rank(adapter_name, name))
                    self._accumulate(adapter_name, name, value)

    def _factored_output(self, x: Tensor, adapter_name: str, *_: Any) -> Tensor:
        """In the type of the base weight, under autocast as well, as an embedding has it."""
        dtype = self._float_dtype()
        left, right = (self._state(name)[adapter_name] for name in ("left", "right"))
        hidden = self._columns(x, right).to(dtype) * FACTOR_SCALE**-2
        return F.linear(hidden, left.to(dtype)).to(dtype)


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
