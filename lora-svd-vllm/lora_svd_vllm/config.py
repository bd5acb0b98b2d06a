"""The quantization method "lora_svd" of vLLM: which of a model's layers are low-rank, and how each is served."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedConfig
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from .description import DENSIFY, CheckpointError, Layer, check_served
from .embedding import LowRankEmbeddingMethod, TiedHeadMethod
from .files import check_files, folder_of
from .linear import LowRankLinearMethod
from .skeleton import expected_tensors, layers_of, skeleton

# Others whose projections of queries, keys and values are one layer on disk store them in another order than vLLM's.
_STORED_AS_SERVED = ("phi3",)


class CompactConfig(QuantizationConfig):
    """What a compact checkpoint says about itself, checked against its files."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        super().__init__()
        check_served(description)
        self.description = dict(description)
        self.layers: dict[str, Layer] = {}
        self.tied: dict[str, str] = dict(description.get("tied", {}))
        self.model_type = ""
        self.embeddings: dict[str, VocabParallelEmbedding] = {}  # of low rank, for the output layers tied to them

    @classmethod
    def get_name(cls) -> Any:
        return "lora_svd"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CompactConfig:
        return cls(config)

    def maybe_update_config(
        self, model_name: str, hf_config: PreTrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """Read what the rest of the config and the files say: vLLM calls this once, before a process is started."""
        assert hf_config is not None
        with set_current_vllm_config(_uncompiled(hf_config)):
            model = skeleton(hf_config)
        self.layers = layers_of(self.description, model)
        self.model_type = hf_config.model_type
        expected = expected_tensors(self.description, self.layers, model)
        check_files(folder_of(model_name, revision), expected, self.description.get("checksums", {}))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)
        self.tied = hf_to_vllm_mapper.apply_dict(self.tied)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            return self._linear(layer, prefix)
        if isinstance(layer, ParallelLMHead):
            return self._head(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return self._embedding(layer, prefix)
        return None

    def _linear(self, layer: LinearBase, prefix: str) -> QuantizeMethodBase:
        parent, _, last = prefix.rpartition(".")
        names = [f"{parent}.{name}".lstrip(".") for name in self.packed_modules_mapping.get(last, [last])]
        parts = [self.layers[name] for name in names if name in self.layers]
        if all(part.is_plain for part in parts):
            return UnquantizedLinearMethod()
        if len(parts) < len(names):
            raise CheckpointError(
                f"{prefix}: vLLM puts it together from {names}, of which the model has {[of.name for of in parts]} "
                f"alone; {DENSIFY}"
            )
        if isinstance(layer, QKVParallelLinear) and len(parts) == 1 and self.model_type not in _STORED_AS_SERVED:
            raise CheckpointError(
                f"{prefix}: queries, keys and values in one layer of a {self.model_type!r}, whose order on disk this "
                f"plugin does not know, expected one of {_STORED_AS_SERVED}; {DENSIFY}"
            )
        return LowRankLinearMethod(parts)

    def _head(self, prefix: str) -> QuantizeMethodBase | None:
        if prefix in self.tied:
            return TiedHeadMethod(prefix, self.tied[prefix], self.embeddings)
        part = self.layers.get(prefix)
        return None if part is None or part.is_plain else LowRankLinearMethod([part])

    def _embedding(self, layer: VocabParallelEmbedding, prefix: str) -> QuantizeMethodBase | None:
        """Many models give their embedding no name: it is the one of its size then."""
        size = (layer.embedding_dim, layer.num_embeddings)
        found = [of for of in self.layers.values() if of.is_embedding and (prefix or size) in (of.name, of.dense)]
        return None if not found or found[0].is_plain else LowRankEmbeddingMethod(found[0], self.embeddings)


def _uncompiled(hf_config: PreTrainedConfig) -> VllmConfig:
    """What a class of transformers asks for when it is made, once vLLM has served a model of its with
    ``model_impl="transformers"`` in this process."""
    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    asked: Any = SimpleNamespace(hf_config=hf_config)
    config.model_config = asked
    return config
