"""Pivoted factors as plain ones, where that is faster: measured while a model is loaded, once for every shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger

from .speed import fastest
from .weights import Weight

OPTIONS = ("measured", "always", "never")
logger = init_logger(f"vllm.{__name__}")


class Expansion:
    """Which layers of a model are expanded.

    The user's choice is ``additional_config["lora_svd"]["expand"]``, one of ``OPTIONS``. What was measured is noted
    beside it, since vLLM makes the key of its compiled graphs from this config, and the graphs differ.
    """

    def __init__(self, noted: dict[str, Any]) -> None:
        self._noted = noted
        self._choice = noted.setdefault("expand", OPTIONS[0])
        if self._choice not in OPTIONS:
            raise ValueError(
                f"expand: got {self._choice!r} in additional_config['lora_svd'], expected one of {OPTIONS}"
            )

    @classmethod
    def of(cls, config: VllmConfig) -> Expansion:
        """As a model's config says."""
        given: Any = config.additional_config
        # a platform's own object has no room for the note
        return cls(given.setdefault("lora_svd", {}) if isinstance(given, dict) else {"expand": "always"})

    def choose(self, weights: Sequence[Weight], make: Callable[[Sequence[Weight]], nn.Module]) -> nn.Module:
        """The module that ``make`` makes of the weights as they are stored or expanded."""
        pivoted = [weight for weight in weights if weight.order is not None]
        if not pivoted or self._choice == "never":
            return make(weights)
        expanded = [weight.expanded() for weight in weights]
        if self._choice == "always":
            return make(expanded)
        forms = [make(weights), make(expanded)]
        measured = self._noted.setdefault("measured", {})
        key = " ".join(f"{tuple(of.right.shape)}{'' if of.left is None else tuple(of.left.shape)}" for of in weights)
        if key not in measured:
            measured[key] = bool(fastest(forms, weights[0].right.shape[1], weights[0].right))
            logger.debug("Pivoted factors %s are %s", key, "expanded" if measured[key] else "kept as they are")
        return forms[measured[key]]
