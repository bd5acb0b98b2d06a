"""All that loads a compact checkpoint where lora_svd is not installed: shipped as it stands, see ``self_contained.py``.

The low-rank layers, and how a dense model gets them. Imports nothing of lora_svd.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """``y = left(right(x)) + bias`` with a weight of rank k.

    ``factor_format="factors"``: right is Linear(in, k), left is Linear(k, out) and has the bias.
    ``factor_format="pivoted"``: right holds k rows of the weight, left the coefficients of the other rows,
    Linear(k, out - k), and ``order`` (out,) says where each output is found; ``k (in + out) - k^2`` parameters.
    ``split=(m1, n1)``: the weight is a sum of k Kronecker products of A (m1, n1) and B (out / m1, in / n1); right,
    Linear(in / n1, out / m1 k), holds every B, left, Linear(n1 k, m1), every A. See :func:`kronecker_output`.

    All are exact ``nn.Linear``, so that quantizers and LoRA find them. ``weight`` is a marker, one number: its shape
    contradicts the dense layer's, so that a loader that does not know this class fails instead of keeping the random
    weights it made. That of an output layer is the matrix itself: :meth:`become_output`.
    """

    order: Tensor
    is_output = False
    _by_columns: tuple[Tensor, ...] = ()  # the weight of left, if it lies so in memory
    _is_hf_initialized = True  # transformers initializes left and right; some of its models take this for a dense layer

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool,
        factor_format: str,
        dtype: torch.dtype | None,
        split: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.factor_format, self.split = factor_format, split
        m1, n1 = split or (out_features, 1)
        self.right = nn.Linear(in_features // n1, rank * (out_features // m1), bias=False, dtype=dtype)
        if split is not None:
            self.left = nn.Linear(n1 * rank, m1, bias=False, dtype=dtype)
            self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None)
        elif factor_format == "pivoted":
            self.left = nn.Linear(rank, out_features - rank, bias=False, dtype=dtype)
            self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None)
            self.register_buffer("order", torch.arange(out_features, dtype=torch.int32))
        else:
            self.left = nn.Linear(rank, out_features, bias=bias, dtype=dtype)
            self.register_parameter("bias", None)
        self.register_buffer("weight", torch.zeros(1, dtype=dtype))
        self.register_state_dict_post_hook(_as_saved)

    @property
    def weight(self) -> Tensor:
        """The marker; of an output layer the matrix (out, in), computed anew."""
        marker: Any = None if self.is_output else self.__getattr__("weight")
        return self.matrix() if marker is None else marker

    @property
    def bias(self) -> nn.Parameter | None:
        own: Any = self.__getattr__("bias")
        return self.left.bias if own is None else own

    def forward(self, x: Tensor) -> Tensor:
        if not (self._by_columns or self.training or torch.is_grad_enabled()):
            self._store_by_columns()
        result, bias = self._product(x, self.left), self._parameters["bias"]
        return result if bias is None else result + bias

    def _product(self, x: Tensor, left: Callable[[Tensor], Tensor]) -> Tensor:
        if self.split is not None:
            m1, n1 = self.split
            return kronecker_output(x, self.right, left, n1, self.out_features // m1)
        hidden = self.right(x)
        if self.factor_format == "factors":
            return left(hidden)
        result = torch.cat([hidden, left(hidden)], dim=-1)
        # of a matrix: several times faster than along the last of three dimensions
        return result.view(-1, self.out_features).index_select(1, self.order).view(result.shape)

    def matrix(self) -> Tensor:
        """The weight (out, in) that the layer stands for, with gradients of its factors and of a LoRA on them."""
        like = self.right.weight
        unit = torch.eye(self.in_features, dtype=like.dtype, device=like.device)
        with torch.autocast(like.device.type, enabled=False):
            return self._product(unit, _without_bias(self.left)).T.contiguous()

    def become_output(self) -> None:
        """Let ``weight`` be the matrix from now on, for losses that multiply with an output layer's weight themselves.

        The marker is in the state dict alone then: what moves buffers one by one would put the matrix in its place.
        """
        if not self.is_output:
            self.is_output = True
            del self._buffers["weight"]

    def _store_by_columns(self) -> None:
        """Lay out the weight of left in memory column by column; nothing else changes.

        Its rows are short, k numbers, and in products with few tokens, as in decoding, the start of a row costs as much
        as the row. Not where several processes may shard it, which they do row by row.
        """
        weight = self.left.weight
        is_plain = type(self.left) is nn.Linear and type(weight.data) is Tensor and weight.is_floating_point()
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        if self.split is None and is_plain and alone and not torch.compiler.is_compiling():
            with torch.inference_mode(weight.is_inference()):  # data of the kind that the parameter is
                weight.data = weight.data.T.contiguous().T
            self._by_columns = (weight,)

    def train(self, mode: bool = True) -> LowRankLinear:
        """As for every module; training takes the weights row by row."""
        super().train(mode)
        for weight in self._by_columns if mode else ():
            with torch.inference_mode(weight.is_inference()):
                weight.data = weight.data.contiguous()
            self._by_columns = ()
        return self

    def _load_from_state_dict(self, state: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state, prefix, *args)
        unexpected, key = args[3], f"{prefix}weight"
        if self.is_output and key in unexpected and state[key].shape == (1,):
            unexpected.remove(key)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"factor_format={self.factor_format!r}{'' if self.split is None else f', split={self.split}'}"
        )


class LowRankEmbedding(LowRankLinear):
    """``y = left(right(id))``: a :class:`LowRankLinear` of unit vectors, ``in_features`` is the number of ids.

    right is Embedding(in, k), whose weight is the other way round than a linear layer's, (in, k).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        padding_idx: int | None,
        factor_format: str,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(in_features, out_features, rank, bias=False, factor_format=factor_format, dtype=dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = in_features, out_features, padding_idx
        self.right = nn.Embedding(in_features, rank, padding_idx=padding_idx, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Autocast does not change the type of an embedding, which the whole model goes on with."""
        return super().forward(x).to(self.weight.dtype)

    def transposed(self, h: Tensor) -> Tensor:
        """``W^T h``, (..., in), of h (..., out)."""
        left, right = self.left.weight.T, self.right.weight
        if type(self.left) is not nn.Linear:  # a bypass is in its outputs, not in its weight
            left = self.left(torch.eye(self.rank, dtype=right.dtype, device=right.device))
        if type(self.right) is not nn.Embedding:
            right = self.right(torch.arange(self.in_features, device=right.device))
        if self.factor_format == "factors":
            hidden = nn.functional.linear(h, left)
        else:
            h = h.index_select(-1, self.order.argsort())
            hidden = h[..., : self.rank] + nn.functional.linear(h[..., self.rank :], left)
        return nn.functional.linear(hidden, right)

    def rows(self) -> Tensor:
        """``W^T``, (in, out), with gradients: what an output layer that is tied to it multiplies with."""
        like = self.right.weight
        unit = torch.eye(self.out_features, dtype=like.dtype, device=like.device)
        with torch.autocast(like.device.type, enabled=False):
            return self.transposed(unit).T.contiguous()


class TiedHead(nn.Module):
    """An output layer whose weight is that of an embedding, whatever stands for it: it has no tensors of its own."""

    bias = None
    _is_hf_initialized = True

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self._held = (embedding,)  # not as a part, or its tensors would be counted and saved twice
        self.in_features, self.out_features = embedding.out_features, embedding.in_features

    @property
    def embedding(self) -> Any:
        return self._held[0]

    @property
    def weight(self) -> Tensor:
        """The matrix (out, in), computed anew, for losses that multiply with it themselves."""
        return self.embedding.rows()

    def forward(self, h: Tensor) -> Tensor:
        return self.embedding.transposed(h)


def _without_bias(layer: Any) -> Callable[[Tensor], Tensor]:
    """A linear layer, maybe with a LoRA, without its bias."""
    if layer.bias is None:
        return layer
    if type(layer) is nn.Linear:
        return lambda x: nn.functional.linear(x, layer.weight)
    return lambda x: layer(x) - layer.bias


def _as_saved(layer: LowRankLinear, state: MutableMapping[str, Tensor], prefix: str, _metadata: Any) -> None:
    """Hand out contiguous tensors, which safetensors asks for, and the marker of an output layer."""
    for name, _ in layer.named_parameters():
        tensor = state.get(f"{prefix}{name}")
        if type(tensor) is Tensor:  # a copy; not of a parameter itself, which ``keep_vars`` asks for
            state[f"{prefix}{name}"] = tensor.contiguous()
    if layer.is_output:
        state[f"{prefix}weight"] = torch.zeros(1, dtype=layer.right.weight.dtype, device=layer.right.weight.device)


def expose_output(model: Any) -> None:
    """Let losses read the weight of a model's output layer if that is low-rank; once its tensors are there."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(head, LowRankLinear) and not isinstance(head, LowRankEmbedding):
        head.become_output()


def layer_features(dense: Any) -> tuple[int, int]:
    """(in, out) of a linear layer, transformers' Conv1D or an embedding."""
    for names in (("nx", "nf"), ("num_embeddings", "embedding_dim")):
        if hasattr(dense, names[0]):
            return getattr(dense, names[0]), getattr(dense, names[1])
    return dense.in_features, dense.out_features


def empty_low_rank(
    dense: Any,
    rank: int,
    factor_format: str,
    dtype: torch.dtype,
    split: tuple[int, int] | None,
    kept: Sequence[int] | None = None,
) -> LowRankLinear:
    """The low-rank layer that takes the place of ``dense``, without its weights.

    kept: (out, in), of one without the features of some neurons.
    """
    in_features, out_features = layer_features(dense) if kept is None else kept[::-1]
    if isinstance(dense, nn.Embedding):
        padding = dense.padding_idx
        return LowRankEmbedding(
            in_features, out_features, rank, padding_idx=padding, factor_format=factor_format, dtype=dtype
        )
    has_bias = dense.bias is not None
    return LowRankLinear(
        in_features, out_features, rank, bias=has_bias, factor_format=factor_format, dtype=dtype, split=split
    )


def narrowed_dense(dense: Any, kept: Sequence[int]) -> nn.Module:
    """A linear layer or Conv1D with the first (out, in) features of ``dense``."""
    out_features, in_features = kept
    is_conv = hasattr(dense, "nf")  # transformers' Conv1D, whose weight is (in, out)
    with torch.device("meta"):
        if is_conv:
            new: Any = type(dense)(out_features, in_features)
        else:
            new = nn.Linear(in_features, out_features, bias=dense.bias is not None)
    rows, columns = (in_features, out_features) if is_conv else (out_features, in_features)
    new.weight = nn.Parameter(dense.weight.detach()[:rows, :columns].clone())
    if dense.bias is not None:
        new.bias = nn.Parameter(dense.bias.detach()[:out_features].clone())
    return new.train(dense.training)


def remember_shape(module: Any, dense: Sequence[int] | None) -> None:
    """Note (out, in) of the layer that ``module``, which is without the features of some neurons, stands for."""
    if dense is not None:
        module.dense_shape = tuple(dense)


def kronecker_output(
    x: Tensor, right: Callable[[Tensor], Tensor], left: Callable[[Tensor], Tensor], n1: int, m2: int
) -> Tensor:
    """``y = sum_k A_k X B_k^T``, row after row, where X (n1, n2) are the rows that x (..., in) is cut into.

    Args:
        right: all B (m2, n2) at once, (..., n2) -> (..., m2 k).
        left: all A (m1, n1) at once, summed, (..., n1 k) -> (..., m1).
    """
    hidden = right(x.unflatten(-1, (n1, -1))).unflatten(-1, (m2, -1))  # (..., n1, m2, k)
    return left(hidden.transpose(-3, -2).flatten(-2)).mT.flatten(-2)


def put_low_rank_layers(model: Any, description: Mapping[str, Any]) -> None:
    """Give an empty dense model the low-rank layers of ``description``, a ``LoraSVDCompactConfig`` as a dict."""
    for name, rank in description["ranks"].items():
        dense = model.get_submodule(name)
        model.all_tied_weights_keys.pop(f"{name}.weight", None)
        split = description.get("splits", {}).get(name)
        shape = description.get("shapes", {}).get(name, {})
        kept = shape.get("kept")
        if split is not None or rank < min(kept or layer_features(dense)):
            split = None if split is None else tuple(split)
            new = empty_low_rank(dense, rank, description["factor_format"], dense.weight.dtype, split, kept)
            model.set_submodule(name, new)
        elif kept is not None:
            model.set_submodule(name, narrowed_dense(dense, kept))
        remember_shape(model.get_submodule(name), shape.get("dense"))
    for name, embedding in description.get("tied", {}).items():
        tie_head(model, name, embedding)
    mark_loaded(model)


def mark_loaded(model: Any, missing: Collection[str] = ()) -> None:
    """Keep transformers from initializing the modules around low-rank layers, whose tensors are about to be loaded.

    Some models do that by the shape of a child's weight. A module with a tensor that no file has, one of ``missing`` or
    a buffer that is not saved, is initialized as ever.
    """
    saved = set(model.state_dict())
    names = [name.split(".") for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    for path in {".".join(parts[:end]) for parts in names for end in range(len(parts))}:
        module, prefix = model.get_submodule(path), f"{path}." if path else ""
        unsaved = any(f"{prefix}{name}" not in saved for name, _ in module.named_buffers())
        if not unsaved and not any(name.startswith(prefix) for name in missing):
            module._is_hf_initialized = True


def tie_head(model: Any, name: str, embedding: str) -> None:
    """Let an output layer use the low-rank embedding that it is tied to."""
    model.all_tied_weights_keys.pop(f"{name}.weight", None)
    model.set_submodule(name, TiedHead(model.get_submodule(embedding)))
