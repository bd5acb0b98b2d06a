"""How vLLM computes linear layers of low rank, several fused into one, divided among processes or whole."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from .description import Layer
from .division import Span, features_here
from .expansion import Expansion
from .loading import Received
from .weights import FusedProduct, Weight, take


class LowRankLinearMethod(LinearMethodBase):
    """Loads and computes linear layers of low rank that vLLM has in one module.

    Where it divides the outputs among processes, right is everywhere, and each has the rows of left, or of the pivoted
    coefficients, for its outputs. Where it divides the inputs, each has columns of right, and the k hidden features are
    summed before left, instead of all outputs; not with adapters on top, which add to each process's part of the sum.
    """

    def __init__(self, parts: Sequence[Layer]) -> None:
        self.parts = parts
        self.plain = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        layer.received = Received(self.parts)
        layer.received.register(layer, params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        config = get_current_vllm_config()
        weights, biases = [], []
        for part, rows, (weight, bias) in zip(
            self.parts, _rows(layer, self.parts, config), layer.received.finish(layer), strict=True
        ):
            columns = _columns(layer, part, config)
            here = weight if _is_all(rows, part.kept[0]) else weight.rows(rows)
            here = here if _is_all(columns, part.kept[1]) else here.columns(columns)
            weights.append(here.to(layer.weight.device, layer.params_dtype))
            if bias is not None:
                biases.append(take(bias, rows).to(layer.weight.device, layer.params_dtype))
        del layer.received
        if biases:
            layer.bias = Parameter(torch.cat(biases), requires_grad=False)
        make = partial(FusedProduct, linear=partial(_Product, method=self.plain))
        layer.product = Expansion.of(config).choose(weights, make)
        layer.reduces_early = _reduces_early(layer, weights, config)
        if layer.reduces_early:
            layer.product.reduce = tensor_model_parallel_all_reduce
            layer.reduce_results = False

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        result = layer.product(x)
        if layer.reduces_early and not layer.skip_bias_add:
            bias = layer.bias  # which vLLM gives to one process, for a sum that here has been taken
        return result if bias is None else result + bias


class _Product(nn.Module):
    """Multiplication with a matrix, by the kernel that vLLM has for it."""

    def __init__(self, weight: Tensor, method: UnquantizedLinearMethod) -> None:
        super().__init__()
        self.weight = Parameter(weight.contiguous(), requires_grad=False)
        self.bias = None
        self.method = method
        method.process_weights_after_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x)


def vocabulary_rows(layer: VocabParallelEmbedding) -> Tensor:
    """The ids that a process has of an embedding or output layer; -1: zeros, which vLLM pads them with."""
    indices = layer.shard_indices
    rows = torch.full((layer.num_embeddings_per_partition,), -1)
    ids = torch.arange(indices.org_vocab_start_index, indices.org_vocab_end_index)
    rows[: len(ids)] = ids
    return rows


def _rows(layer: Any, parts: Sequence[Layer], config: VllmConfig) -> list[Tensor]:
    """The stored outputs of each part that this process has."""
    if isinstance(layer, ParallelLMHead):
        return [vocabulary_rows(layer)]
    if not isinstance(layer, ColumnParallelLinear):
        return [_features(part, 0, [Span(0, part.dense[0])], config) for part in parts]
    rank, count = layer.tp_rank, layer.tp_size
    sizes = getattr(layer, "output_sizes", [layer.output_size])
    # heads of keys and values that are fewer than the processes are held by several of these
    copies = [1, *[layer.num_kv_head_replicas] * 2] if isinstance(layer, QKVParallelLinear) else [1] * len(sizes)
    sizes = [size // copy for size, copy in zip(sizes, copies, strict=True)]
    starts = accumulate(sizes[:-1], initial=0) if len(parts) == 1 else [0] * len(sizes)
    spans = [Span(start, n, rank // c, count // c) for start, n, c in zip(starts, sizes, copies, strict=True)]
    groups = [spans] if len(parts) == 1 else [[span] for span in spans]
    return [_features(part, 0, group, config) for part, group in zip(parts, groups, strict=True)]


def _columns(layer: Any, part: Layer, config: VllmConfig) -> Tensor:
    """The stored inputs of a part that this process has."""
    divided = (layer.tp_rank, layer.tp_size) if isinstance(layer, RowParallelLinear) else (0, 1)
    return _features(part, 1, [Span(0, part.dense[1], *divided)], config)


def _features(part: Layer, side: int, spans: Sequence[Span], config: VllmConfig) -> Tensor:
    """The stored outputs (side 0) or inputs (side 1) of a part in some spans of the dense ones."""
    dense, kept = part.dense[side], part.kept[side]
    chunks = part.chunks if side == 0 else 1
    # Attention has all of its heads; adapters are as wide as the layers were.
    evenly = kept // chunks % config.parallel_config.tensor_parallel_size == 0
    narrow = kept < dense and evenly and not part.of_heads and config.lora_config is None
    return features_here(dense, kept, chunks, spans, narrow=narrow)


def _is_all(features: Tensor, number: int) -> bool:
    return torch.equal(features, torch.arange(number))


def _reduces_early(layer: Any, weights: Sequence[Weight], config: VllmConfig) -> bool:
    """Whether the sum over processes is taken of the hidden features, which are fewer than the outputs."""
    if not isinstance(layer, RowParallelLinear) or layer.tp_size == 1 or not layer.reduce_results:
        return False
    return weights[0].left is not None and config.lora_config is None
