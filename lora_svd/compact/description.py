"""What a compact model says about itself, in its config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..allocation import FACTOR_FORMATS
from ..errors import LoraSVDError
from ..inputs import LayerInput
from ..neurons import NeuronGroup
from .checks import check_types

FORMAT_VERSION = 1


class LoraSVDCompactConfig(QuantizationConfigMixin):
    """What a compact checkpoint says about itself.

    Attributes:
        ranks: stored rank of each targeted module; one that is stored dense has ``min(out, in)``.
        splits: [m1, n1] of the modules that are sums of Kronecker products, as in ``LowRankLinear``.
        shapes: of the modules that are without the features of some neurons: {"kept": [out, in], "dense": [out, in],
            "chunks": parts of the outputs that each have the same neurons}.
        tied: the low-rank embedding by the name of the output layer that uses it.
        factor_format: "pivoted" or "factors".
        dense_parameters: numbers in the targeted weights before compression, the denominator of ``param_ratio``.
        tied_parameters: those of them that were the weight of another module as well (a head tied to the embedding).
        method: how it was made: importance, allocation, decomposition, compensation (of a bypass, if there was one).
        bitsandbytes: a ``BitsAndBytesConfig`` as a dict, if some weights are quantized.
        quantized: names of the linear layers, factors included, whose weights are.
        checksums: SHA-256 of the weights' files by name, if ``save_compact`` wrote them; checked while loading.
        format_version: of the layout of the tensors.
    """

    def __init__(
        self,
        ranks: Mapping[str, int] | None = None,
        factor_format: str = "pivoted",
        dense_parameters: int = 0,
        tied_parameters: int = 0,
        method: Mapping[str, Any] | None = None,
        bitsandbytes: Mapping[str, Any] | None = None,
        quantized: Iterable[str] = (),
        checksums: Mapping[str, str] | None = None,
        splits: Mapping[str, list[int]] | None = None,
        tied: Mapping[str, str] | None = None,
        shapes: Mapping[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        **_: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise LoraSVDError(
                f"format_version: this compact checkpoint has {format_version!r}, this package reads {FORMAT_VERSION}; "
                "upgrade lora_svd"
            )
        if factor_format not in FACTOR_FORMATS:
            raise LoraSVDError(
                f"factor_format: unknown value {factor_format!r}, expected one of {sorted(FACTOR_FORMATS)}"
            )
        check_types(
            ranks,
            quantized,
            splits,
            shapes,
            counts={"dense_parameters": dense_parameters, "tied_parameters": tied_parameters},
            mappings={"method": method, "bitsandbytes": bitsandbytes, "checksums": checksums, "tied": tied},
        )
        self.quant_method: Any = "lora_svd"
        self.ranks = dict(ranks or {})
        self.splits = dict(splits or {})
        self.tied = dict(tied or {})
        self.shapes = {name: dict(shape) for name, shape in (shapes or {}).items()}
        self.factor_format = factor_format
        self.dense_parameters = dense_parameters
        self.tied_parameters = tied_parameters
        self.method = dict(method or {})
        self.bitsandbytes = dict(bitsandbytes) if bitsandbytes else None
        self.quantized = list(quantized)
        self.checksums = dict(checksums or {})
        self.format_version = format_version

    def in_full_precision(self) -> LoraSVDCompactConfig:
        """The same, of other weights, which no file has and of which none is quantized."""
        return LoraSVDCompactConfig(**{**self.to_dict(), "bitsandbytes": None, "quantized": (), "checksums": None})


def description_of(config: Any) -> LoraSVDCompactConfig | None:
    """What a model's config says of a compact model, as a file has it or a model; None of another model's."""
    given = getattr(config, "quantization_config", None)
    if isinstance(given, Mapping) and given.get("quant_method") == "lora_svd":
        return LoraSVDCompactConfig(**given)
    return given if isinstance(given, LoraSVDCompactConfig) else None


def kept_shapes(
    groups: Mapping[str, NeuronGroup], whole: Mapping[str, LayerInput], kept: Mapping[str, LayerInput]
) -> dict[str, Any]:
    """What a compact model says of layers that are without the features of some neurons or heads."""
    neurons = {
        name: whole[of.consumer].shape.in_features for of in groups.values() if not of.heads for name in of.producers
    }
    return {
        name: {
            "kept": [of.shape.out_features, of.shape.in_features],
            "dense": [whole[name].shape.out_features, whole[name].shape.in_features],
            "chunks": whole[name].shape.out_features // neurons[name] if name in neurons else 1,
        }
        for name, of in kept.items()
        if of.is_narrowed
    }
