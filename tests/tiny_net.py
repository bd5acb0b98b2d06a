"""The smallest transformers model that has what the tuner meets: layers that share an input, Conv1D, tied heads, blocks
that run twice. Milliseconds to train, save and load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D

VOCABULARY = 5


class TinyNetConfig(PreTrainedConfig):
    """``blocks``: for each block its width, and whether it is a Conv1D, has a bias, a gate and runs twice."""

    model_type = "tiny_net"

    def __init__(
        self, width: int = 4, blocks: Sequence[dict[str, Any]] = (), tie_word_embeddings: bool = False, **kwargs: Any
    ) -> None:
        self.width, self.blocks = width, list(blocks)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class Block(nn.Module):
    """``tanh(proj x) * gate x``: two layers of one input."""

    def __init__(self, width: int, *, out: int, conv1d: bool, bias: bool, gate: bool, twice: bool) -> None:
        super().__init__()
        self.proj = Conv1D(out, width) if conv1d else nn.Linear(width, out, bias=bias)
        self.gate = nn.Linear(width, out, bias=bias) if gate else None
        self.runs = 2 if twice and out == width else 1

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.runs):
            y = torch.tanh(self.proj(x))
            x = y if self.gate is None else y * self.gate(x)
        return x


class TinyNet(PreTrainedModel):
    """Embedding, blocks, head; its loss is to name each token itself."""

    config_class = TinyNetConfig
    config: TinyNetConfig
    base_model_prefix = "net"
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012 - as transformers has it

    def __init__(self, config: TinyNetConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(VOCABULARY, config.width)
        widths = [config.width, *(block["out"] for block in config.blocks)]
        self.blocks = nn.ModuleList(Block(width, **block) for width, block in zip(widths, config.blocks, strict=False))
        self.lm_head = nn.Linear(widths[-1], VOCABULARY, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            nn.init.normal_(parameter, std=0.1 if name == "bias" else 1.0)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> CausalLMOutput:
        x = self.embed_tokens(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)
