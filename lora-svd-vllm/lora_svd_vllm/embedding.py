"""How vLLM computes an embedding of low rank, and an output layer that is tied to it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from .description import CheckpointError, Layer
from .linear import vocabulary_rows
from .loading import Received
from .weights import take


class LowRankEmbeddingMethod(QuantizeMethodBase):
    """``y = left right[id]``; each process has the rows of right, (ids, k), of its ids."""

    def __init__(self, part: Layer, embeddings: dict[str, Any]) -> None:
        self.part, self.embeddings = part, embeddings

    def create_weights(self, layer: Any, *sizes: Any, params_dtype: torch.dtype, **attributes: Any) -> None:
        layer.received = Received([self.part])
        layer.received.register(layer, params_dtype)
        self.embeddings[self.part.name] = layer

    def process_weights_after_loading(self, layer: Any) -> None:
        ((weight, _),) = layer.received.finish(layer)
        del layer.received
        factors = weight.expanded()
        device, dtype = layer.weight.device, layer.params_dtype
        rows = take(factors.right.T, vocabulary_rows(layer)).to(device, dtype)
        layer.rows = Parameter(rows, requires_grad=False)
        layer.left = Parameter(factors.left.to(device, dtype), requires_grad=False)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        return F.linear(F.embedding(ids, layer.rows), layer.left)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The logits of this process's ids."""
        return F.linear(x @ layer.left, layer.rows, bias)


class TiedHeadMethod(QuantizeMethodBase):
    """An output layer whose weight is that of a low-rank embedding; it has no tensors of its own."""

    def __init__(self, name: str, embedding: str, embeddings: dict[str, Any]) -> None:
        self.name, self.embedding_name, self.embeddings = name, embedding, embeddings

    def create_weights(self, layer: Any, *sizes: Any, params_dtype: torch.dtype, **attributes: Any) -> None:
        layer.register_parameter("weight", Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False))

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.embedding_name not in self.embeddings:
            raise CheckpointError(
                f"{self.name}: is tied to the low-rank embedding {self.embedding_name}, which is in another process; "
                "expected both in one. Set pipeline_parallel_size=1, or compress without the embedding"
            )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        embedding = self.embeddings[self.embedding_name]
        return embedding.quant_method.apply(embedding, x, bias)
