"""A compact model in mlx-lm, which reads this file from the model's folder. Imports nothing of lora_svd.

The model of mlx-lm for the architecture, with low-rank layers, fewer neurons and fewer heads where config.json says so.
Run it with ``trust_remote_code``: mlx_lm.generate --model FOLDER --trust-remote-code
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import MODEL_REMAPPING


class ModelArgs:
    """The config of the model, with the names that mlx-lm reads."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.description = config["quantization_config"]
        # A low-rank embedding that is the output layer too is tied in memory, though its config may not say so.
        tied = {"tie_word_embeddings": True} if self.description.get("tied") else {}
        self.config = {**config, **rotary(config), **tied}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelArgs:
        return cls(config)


def Model(args: ModelArgs) -> nn.Module:
    """The model of mlx-lm with compact layers, without their weights."""
    kind = args.config["model_type"]
    architecture = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}")
    model = architecture.Model(architecture.ModelArgs.from_dict(args.config))
    put_layers(model, args.description)
    return model


def rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 5 calls ``rope_parameters``, in the names that mlx-lm knows; it would take its defaults."""
    given = config.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in given.values()):
        raise ValueError(
            f"rope_parameters: got {sorted(given)} with parameters of each kind of layer, expected one set; this model "
            "file does not know such models. Make the model dense (lora_svd.compact.densify) and convert that"
        )
    found = {name: given[name] for name in ("rope_theta", "partial_rotary_factor") if name in given}
    if (kind := given.get("rope_type", "default")) != "default":
        found["rope_scaling"] = {**given, "type": kind}
    return found


def put_layers(model: nn.Module, description: Mapping[str, Any]) -> None:
    """Give a dense model the layers of a description, a ``LoraSVDCompactConfig`` as a dict."""
    pivoted = description["factor_format"] == "pivoted"
    heads: dict[str, tuple[int, int]] = {}  # kept and dense ones, or multiples of them, by attention
    for name, rank in description["ranks"].items():
        path, _, last = name.rpartition(".")
        parent = find(model, path)
        dense = find(parent, last)
        if not isinstance(dense, nn.Linear | nn.Embedding):
            raise TypeError(f"{name}: mlx-lm has {type(dense).__name__} there, expected a linear layer or embedding")
        shape = description["shapes"].get(name)
        setattr(parent, last, compact_layer(dense, rank, pivoted, shape and shape["kept"]))
        if shape and shape["kept"][0] < shape["dense"][0] and "Attention" in type(parent).__name__:
            heads[path] = shape["kept"][0], shape["dense"][0]
    for path, (kept, whole) in heads.items():
        attention = find(model, path)
        if not (hasattr(attention, "n_heads") and hasattr(attention, "n_kv_heads")):
            raise ValueError(
                f"{path}: has {kept} of {whole} features, but {type(attention).__name__} of mlx-lm does not say how "
                "many heads it has. Compress with heads=False, or make the model dense (lora_svd.compact.densify)"
            )
        attention.n_heads = attention.n_heads * kept // whole
        attention.n_kv_heads = attention.n_kv_heads * kept // whole


def find(module: Any, path: str) -> Any:
    """The module at a path with dots below another one."""
    for name in path.split(".") if path else ():
        try:
            module = module[int(name)] if name.isdigit() else getattr(module, name)
        except (AttributeError, IndexError):
            raise ValueError(f"{path}: named in this compact checkpoint, but mlx-lm's model has no {name!r}") from None
    return module


def compact_layer(dense: Any, rank: int, pivoted: bool, kept: list[int] | None) -> nn.Module:
    """What takes the place of a dense layer: of the rank and, if it has lost features, with ``kept`` (out, in)."""
    rows, columns = dense.weight.shape
    is_embedding, has_bias = isinstance(dense, nn.Embedding), "bias" in dense
    out_features, in_features = kept or ((columns, rows) if is_embedding else (rows, columns))
    if rank < min(out_features, in_features):
        kind = LowRankEmbedding if is_embedding else LowRankLinear
        return kind(in_features, out_features, rank, pivoted=pivoted, bias=has_bias)
    return dense if is_embedding else nn.Linear(in_features, out_features, bias=has_bias)


class LowRankLinear(nn.Module):
    """``y = left(right(x)) + bias``. Pivoted: right gives some outputs, left the others, order says where each is."""

    def __init__(self, in_features: int, out_features: int, rank: int, *, pivoted: bool, bias: bool) -> None:
        super().__init__()
        self.weight = mx.zeros((1,))  # a marker, for readers that know no low-rank layers
        self.right = nn.Linear(in_features, rank, bias=False)
        self.left = nn.Linear(rank, out_features - rank if pivoted else out_features, bias=bias and not pivoted)
        if pivoted:
            self.order = mx.arange(out_features)
            if bias:
                self.bias = mx.zeros((out_features,))

    def __call__(self, x: mx.array) -> mx.array:
        hidden = self.right(x)
        result = self.left(hidden)
        if "order" in self:
            result = mx.take(mx.concatenate([hidden, result], axis=-1), self.order, axis=-1)
        return result + self.bias if "bias" in self else result


class LowRankEmbedding(LowRankLinear):
    """``y = left(right(id))``; the output layer may be tied to it."""

    def __init__(self, in_features: int, out_features: int, rank: int, *, pivoted: bool, bias: bool) -> None:
        super().__init__(in_features, out_features, rank, pivoted=pivoted, bias=bias)
        self.right = nn.Embedding(in_features, rank)

    def as_linear(self, x: mx.array) -> mx.array:
        """The logits of an output layer with the transposed weight."""
        if "order" in self:
            x = mx.take(x, mx.argsort(self.order), axis=-1)
            hidden = x[..., : self.right.weight.shape[1]] + x[..., self.right.weight.shape[1] :] @ self.left.weight
        else:
            hidden = x @ self.left.weight
        return self.right.as_linear(hidden)
