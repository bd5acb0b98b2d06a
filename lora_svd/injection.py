"""How the bypasses get into a model, and how a saved adapter gets back into them: PEFT's side of the tuner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .compact import keep_unpacked
from .config import LoraSVDConfig
from .decompositions import Factors
from .errors import LoraSVDError
from .layer import SAVED, LoraSVDLinear
from .peft_type import PREFIX
from .statistics import SharedGram


class InjectedModel(BaseTuner):
    """A model whose targeted linear layers are :class:`LoraSVDLinear`."""

    prefix = PREFIX
    tuner_layer_cls = LoraSVDLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _pre_injection_hook(self, model: nn.Module, config: LoraSVDConfig, adapter_name: str) -> None:
        if not hasattr(self, "_shared_gram"):
            self._shared_gram = SharedGram()
            self._use_cache = getattr(getattr(model, "config", None), "use_cache", None)
            self._given_ranks: dict[str, dict[str, int] | None] = {}  # compact_ranks that the user chose, by adapter
            self._trained: dict[str, dict[str, Factors]] = {}  # factors as training left them, by adapter and layer
            self._unpacked = keep_unpacked(model)
        self._trained.pop(adapter_name, None)

    def _prepare_model(self, peft_config: LoraSVDConfig, model: nn.Module) -> None:
        """Let ``layers_to_transform`` choose among all linear layers, too; PEFT would pass it over without a word."""
        if str(peft_config.target_modules).lower() != "all-linear" or peft_config.layers_to_transform is None:
            return
        _maybe_include_all_linear_layers(peft_config, model)
        names = peft_config.target_modules or ()
        by_suffix = ((name, replace(peft_config, target_modules=[name.rpartition(".")[2]])) for name in names)
        chosen = {name for name, config in by_suffix if check_target_module_exists(config, name)}
        peft_config.target_modules = chosen  # pyright: ignore[reportAttributeAccessIssue] - as in PEFT

    def _create_and_replace(
        self,
        peft_config: LoraSVDConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        r, alpha = (
            pattern.get(get_pattern_key(list(pattern), current_key))
            for pattern in (peft_config.rank_pattern or {}, peft_config.alpha_pattern or {})
        )
        if isinstance(target, LoraSVDLinear):
            target.update_layer(adapter_name, peft_config, key=current_key, r=r, lora_alpha=alpha)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not (isinstance(base, (nn.Linear, Conv1D)) or _is_quantized_linear(base)):
            raise TypeError(
                f"target_modules: {current_key} is {type(base).__name__}, which is not supported; expected "
                "torch.nn.Linear, transformers Conv1D or a quantized linear layer. Name other modules, or leave this "
                "one out with exclude_modules"
            )
        new = LoraSVDLinear(target, self._shared_gram, **get_quantization_kwargs(self))
        new.update_layer(adapter_name, peft_config, key=current_key, r=r, lora_alpha=alpha)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DDP, given the PEFT model, is to leave alone: it would send the statistics with every forward pass, and
        factors may be replaced. The PEFT model hands its attributes on."""
        return [
            f"base_model.model.{name}.{PREFIX}{kind}.{adapter}"
            for name, module in self.model.named_modules()
            if isinstance(module, LoraSVDLinear)
            for kind in SAVED
            for adapter in module.lora_svd_A
        ]

    def _tuner_layers(self, adapter_name: str) -> Iterator[tuple[str, LoraSVDLinear]]:
        for name, module in self.model.named_modules():
            if isinstance(module, LoraSVDLinear) and adapter_name in module.lora_svd_A:
                yield name, module

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As in PEFT, but frozen factors keep the type of the base: only what is trained needs float32."""
        frozen = [
            found for _, layer in self._tuner_layers(adapter_name) for found in layer.frozen_factors(adapter_name)
        ]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for stored, factor in frozen:
            stored[adapter_name] = factor

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LoraSVDConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Give the layers the buffers that the checkpoint has, of its shapes, and take away those it does not have.

        A run is thus resumed from, or the best model loaded from, a checkpoint of any phase.
        """
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraSVDLinear)}
        known = {
            name.removeprefix("base_model.model."): layer
            for name, layer in layers.items()
            if adapter_name in layer.lora_svd_A
        }
        for layer in known.values():
            layer.reset_state(adapter_name)
        for key, tensor in state_dict.items():
            module_name, _, attribute = key.rpartition(".")
            layer = known.get(module_name.removeprefix("base_model.model."))
            if layer is not None:
                layer.allocate_state(adapter_name, attribute, tensor, trainable=config.trains_factors)
        tuner = next((module for module in model.modules() if isinstance(module, cls)), None)
        given = {} if tuner is None else tuner._given_ranks
        if tuner is not None:
            tuner._trained.pop(adapter_name, None)
        if not config.compressed:
            given[adapter_name] = config.compact_ranks
        config.compressed = any(layer.factors(adapter_name) is not None for layer in known.values())
        if config.compressed:
            config.compact_ranks = {name: layer.kept_rank(adapter_name) for name, layer in known.items()}
        else:
            config.compact_ranks = given.get(adapter_name)
        for layer in known.values():
            layer.observe(adapter_name, config)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _config(self, adapter_name: str) -> LoraSVDConfig:
        config = self.peft_config[adapter_name]
        assert isinstance(config, LoraSVDConfig)
        return config

    def _single_adapter(self, adapter_names: list[str] | None) -> str:
        names = adapter_names or self.active_adapters
        if len(names) != 1:
            raise LoraSVDError(
                f"adapter_names: {list(names)} are {len(names)} adapters; a compact model is made from one"
            )
        return names[0]


def _is_quantized_linear(module: nn.Module) -> bool:
    backend = resolve_quantization_backend(module)
    return backend is not None and backend.layer_type == "linear" and backend.supports_merge
