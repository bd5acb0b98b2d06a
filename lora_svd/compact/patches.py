"""Two methods of transformers' models that ask no quantizer: models from a compact config, and resized vocabularies."""

from __future__ import annotations

import copy
from functools import cache, wraps
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import LoraSVDError
from .architecture import put_random_layers
from .description import description_of
from .layers import LowRankLinear, TiedHead


@cache
def patch_models() -> None:
    """Let ``AutoModel.from_config`` make compact models, and ``resize_token_embeddings`` refuse them unchanged.

    A model that is not compact is left to transformers' own method. Safe to call again.
    """
    kind: Any = PreTrainedModel
    kind._from_config = classmethod(_from_config(kind._from_config.__func__))
    kind.resize_token_embeddings = _resize(kind.resize_token_embeddings)


def _from_config(original: Any) -> Any:
    @wraps(original)
    def from_config(cls: type[PreTrainedModel], config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
        described = description_of(config)
        if described is None:
            return original(cls, config, **kwargs)
        own: Any = copy.deepcopy(config)  # the other model's may say that its weights are quantized
        model = original(cls, own, **kwargs)
        own.quantization_config = described.in_full_precision()
        put_random_layers(model, described)
        return model

    return from_config


def _resize(original: Any) -> Any:
    @wraps(original)
    def resize_token_embeddings(
        self: PreTrainedModel,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        embedding: Any = self.get_input_embeddings()
        head = self.get_output_embeddings()
        if not any(isinstance(module, LowRankLinear | TiedHead) for module in (embedding, head)):
            return original(self, new_num_tokens, pad_to_multiple_of, mean_resizing)
        now = embedding.num_embeddings
        wanted, multiple = new_num_tokens or now, pad_to_multiple_of or 1
        wanted += -wanted % multiple
        if wanted != now:
            raise LoraSVDError(
                f"resize_token_embeddings: got {wanted} tokens for a model with {now} whose embedding or output layer "
                "is low-rank, expected as many. Add tokens to the dense model before it is compressed, or make it "
                "dense: lora_svd.compact.densify(model)"
            )
        return embedding

    return resize_token_embeddings
