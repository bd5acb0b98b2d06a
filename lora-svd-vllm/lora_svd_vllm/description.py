"""What a compact checkpoint says about its layers in config.json, and the tensors that it then has. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMAT_VERSION = 1
DENSIFY = "make the model dense (lora_svd.compact.densify(model).save_pretrained(folder)) and serve that"


class CheckpointError(ValueError):
    """A compact checkpoint that is damaged, or that this plugin does not serve."""


@dataclass(frozen=True)
class Layer:
    """A linear layer or embedding that was compressed.

    Attributes:
        rank: stored rank; with the full one the layer is stored dense.
        dense: (out, in) before compression; of an embedding (features, ids).
        kept: (out, in) of the stored layer, which may be without the features of some neurons or heads.
        chunks: parts of the outputs that each have lost the same neurons.
        of_heads: whether the features that are gone were those of heads, not of neurons.
    """

    name: str
    rank: int
    dense: tuple[int, int]
    kept: tuple[int, int]
    chunks: int = 1
    pivoted: bool = False
    has_bias: bool = False
    is_embedding: bool = False
    of_heads: bool = False

    @property
    def is_low_rank(self) -> bool:
        return self.rank < min(self.kept)

    @property
    def is_plain(self) -> bool:
        """Whether it is stored as it was before compression, so that nothing need be known to load it."""
        return not self.is_low_rank and self.kept == self.dense

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of each of its tensors, by the name behind its own."""
        out_features, in_features = self.kept
        bias = {"bias": (out_features,)} if self.has_bias else {}
        if not self.is_low_rank:
            return {"weight": self._stored(out_features, in_features), **bias}
        right = self._stored(self.rank, in_features)
        if self.pivoted:
            left = {"left.weight": (out_features - self.rank, self.rank), "order": (out_features,), **bias}
        else:
            left = {"left.weight": (out_features, self.rank)} | {f"left.{name}": shape for name, shape in bias.items()}
        return {"weight": (1,), "right.weight": right, **left}  # weight: a marker, for readers that know no factors

    def _stored(self, out_features: int, in_features: int) -> tuple[int, int]:
        return (in_features, out_features) if self.is_embedding else (out_features, in_features)


def check_served(description: Mapping[str, Any]) -> None:
    """Raise if a description is of a kind that this plugin does not serve."""
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"format_version: the compact checkpoint has {version!r}, this plugin reads {FORMAT_VERSION}; "
            "upgrade lora-svd-vllm"
        )
    if (form := description.get("factor_format")) not in ("pivoted", "factors"):
        raise CheckpointError(
            f"factor_format: the compact checkpoint has {form!r}, expected 'pivoted' or 'factors'; restore the "
            "config.json that was saved with it"
        )
    if quantized := description.get("quantized"):
        raise CheckpointError(
            f"{quantized[0]}: in 4 or 8 bits, with {len(quantized)} layers of this compact checkpoint, expected full "
            "precision. Merge the model without quantization_config (merge_and_unload()) and save it again, or "
            f"{DENSIFY}"
        )
    if splits := description.get("splits"):
        name = next(iter(splits))
        raise CheckpointError(
            f"{name}: a sum of Kronecker products, with {len(splits)} layers of this compact checkpoint, expected "
            f"matrices of low rank. Compress with decomposition='svd', or {DENSIFY}"
        )
