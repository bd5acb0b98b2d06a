"""``LoraSVDModel``: the tuner; this file hands out the compact model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from .allocation import budget_of
from .compact import (
    LoraSVDCompactConfig,
    check_quantization,
    compact_module,
    describe_compact,
    num_bytes,
    quantize_modules,
    untie,
)
from .compact.quantized import BLOCK
from .compression import (
    CompressionSettings,
    LayerInput,
    absorb,
    layer_metrics,
)
from .config import LoraSVDConfig
from .decompositions import DECOMPOSITIONS, Factors
from .errors import LoraSVDError, NumericalError
from .layer import LoraSVDLinear
from .linalg import Metrics
from .phases import PhasedModel, kept_parameters_of


class LoraSVDModel(PhasedModel):
    """A model whose targeted linear layers carry a LoRA bypass and will be factorized.

    ``get_peft_model(model, LoraSVDConfig(...))`` makes one; ``Trainer`` with ``LoraSVDCallback``, or a loop that calls
    :meth:`update_and_allocate`, trains it; :meth:`merge_and_unload` returns the compact model.
    """

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        compact: bool = True,
        quantization_config: BitsAndBytesConfig | None = None,
    ) -> nn.Module:
        """The compact model, a plain model without PEFT modules, its bypass absorbed into the factors or kept as ranks.

        If training ended before the schedule did, the compression is finished first, with a warning. ``compact=False``
        merges the LoRA into the *dense* weights instead: train small, infer large. Use the returned model.

        Args:
            progressbar, safe_merge, adapter_names: as for every method of PEFT.
            compact: whether the model is to be smaller.
            quantization_config: with ``load_in_4bit``: linear layers, factors included, are rounded to 4 bits so that
                the error of their outputs on the observed inputs is small (:mod:`lora_svd.rounding`). None: factors in
                the type of the base's weights, or the one they are dequantized to.

        Raises:
            LoraSVDError: nothing was observed, several adapters are to be made one compact model, or the
                quantization is not one that can be applied.
            NumericalError: a weight is not finite or cannot be factorized. The model is left as it was.
        """
        names = adapter_names or self.active_adapters
        smaller = compact and any(self._config(name).param_ratio < 1 for name in names)
        if quantization_config is not None:
            self._check_quantization(quantization_config, names, smaller)
        if not compact:
            for name in names:
                layers = dict(self._tuner_layers(name))
                if self._config(name).compressed:
                    _check_unmerged(layers)
                for layer in layers.values():
                    layer.set_factors(name, None)
        if not smaller:
            layers = {key: layer for name in names for key, layer in self._tuner_layers(name)}
            for name in self._untie(layers):  # or the embedding would change with the head
                base: Any = layers[name].get_base_layer()
                base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)
            return super().merge_and_unload(progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)
        name = self._single_adapter(adapter_names)
        layers, inputs, settings = self._pipeline(name)
        bytes_before = sum(layer.weight_bytes() for layer in layers.values())
        quantization = quantization_config or getattr(getattr(self.model, "config", None), "quantization_config", None)
        with torch.no_grad():
            description = self._compact(name)
            model: Any = super().merge_and_unload(
                progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )
            if quantization_config is not None:
                quantize_modules(model, quantization_config, partial(_metrics, inputs, settings))
        describe_compact(model, description, quantization)
        if any(layer.quantization_backend is not None for layer in layers.values()):
            _warn_if_larger(model, layers, bytes_before)
        if self._use_cache is not None:  # Trainer turns it off, and the compact model would generate slowly
            self.model.config.use_cache = self._use_cache
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, adapter_names: list[str] | None = None, **__: Any) -> Iterator[None]:
        if adapter_names is not None:
            raise LoraSVDError(
                f"adapter_names: got {adapter_names} for the rows of a batch, expected None; set_adapter chooses one "
                "adapter for all rows"
            )
        yield

    def _check_quantization(self, config: BitsAndBytesConfig, names: Iterable[str], smaller: bool) -> None:
        if not smaller:
            raise LoraSVDError(
                "quantization_config: got one for a dense model, expected compact=True and param_ratio < 1. Save the "
                "merged model and give it to from_pretrained"
            )
        if any(not DECOMPOSITIONS[self._config(name).decomposition].is_low_rank for name in names):
            raise LoraSVDError(
                "decomposition: got 'kronecker' with a quantization_config, expected a low-rank one: its factors are "
                "reshaped when they are applied, and rows as short as theirs do not fill the blocks of 64 that share a "
                "scale. Leave the quantization out"
            )
        if any(self._config(name).factor_format != "factors" for name in names):
            raise LoraSVDError(
                "factor_format: got 'pivoted' with a quantization_config, expected 'factors', since pivoted ones "
                "amplify rounding. Train with it, best with rank_multiple=64 as well; after training, set it in the "
                "adapter's config and call set_param_ratio"
            )
        check_quantization(config)
        for name in names:
            if (multiple := self._config(name).rank_multiple) % BLOCK:
                warnings.warn(
                    f"rank_multiple: got {multiple} with a quantization_config, expected {BLOCK}: 4-bit factors are "
                    f"filled up to ranks that are multiples of {BLOCK}, beyond param_ratio. Train with it; after "
                    "training, set it in the adapter's config and call set_param_ratio",
                    stacklevel=3,
                )

    def _compact(self, adapter_name: str) -> LoraSVDCompactConfig:
        """Replace every layer of the adapter by a plain compact module, once all of them could be computed."""
        config = self._config(adapter_name)
        layers, inputs, settings = self._pipeline(adapter_name)
        _check_unmerged(layers)
        for name, layer in layers.items():
            if not torch.isfinite(layer.bypass_factors(adapter_name).product()).all():
                raise NumericalError(f"{name}: the LoRA bypass has non-finite values; go back to an earlier checkpoint")
        if not self._reached_target(config, inputs):
            if config.compressed or any(layer.statistics(adapter_name).counts["step"] for layer in layers.values()):
                warnings.warn(
                    f"training ended before the schedule did: compressing to param_ratio={config.param_ratio} now, "
                    "without recovery. Train longer, or lower warmup and compression",
                    stacklevel=3,
                )
            self._compress(adapter_name, config.param_ratio)
        modules = {
            name: compact_layer(
                name, layer, inputs[name], layer.factors(adapter_name), layer.bypass_factors(adapter_name), settings
            )
            for name, layer in layers.items()
        }
        tied = self._untie(modules)
        for name, module in modules.items():
            self.model.set_submodule(name, module)
        return LoraSVDCompactConfig(
            ranks={name: min(layer.out_features, layer.in_features) for name, layer in layers.items()},
            factor_format=config.factor_format,
            dense_parameters=sum(given.shape.parameters for given in inputs.values()),
            tied_parameters=sum(inputs[name].shape.parameters for name in tied),
            tied=self._tie_heads(),
            method={
                name: getattr(config, name)
                for name in ("importance", "allocation", "decomposition", "compensation", "param_ratio")
            },
        )

    def _untie(self, names: Iterable[str]) -> list[str]:
        """Those of the modules whose weight was tied to another one's; from here on it is their own."""
        tied = [name for name in names if untie(self.model, name)]
        if tied:
            self.model.config.tie_word_embeddings = False  # or PEFT takes the merge for one of tied weights
        return tied

    def _reached_target(self, config: LoraSVDConfig, inputs: dict[str, LayerInput]) -> bool:
        shapes = {name: given.shape for name, given in inputs.items()}
        return config.compressed and kept_parameters_of(config, shapes) <= budget_of(shapes, config.param_ratio)


def compact_layer(
    name: str,
    layer: LoraSVDLinear,
    given: LayerInput,
    factors: Factors | None,
    bypass: Factors,
    settings: CompressionSettings,
) -> nn.Module:
    """The plain module for a layer whose weight is ``factors`` (None: whole) and whose bypass is ``bypass``."""
    if factors is None:
        result: Factors | Tensor = given.weight() + bypass.product().cpu().double()
    elif given.shape.extra_rank or factors.rank >= given.shape.full_rank:
        result = factors.stacked(bypass)
        if result.rank >= given.shape.full_rank:
            result = result.product()
    else:
        result = absorb(name, given, factors, bypass, settings)
    return compact_module(result, layer.get_base_layer(), layer.dense_weight(), settings.factor_format)


def _check_unmerged(layers: Mapping[str, LoraSVDLinear]) -> None:
    if any(layer.merged for layer in layers.values()):
        raise LoraSVDError(
            "merge_and_unload: the adapter is merged into the dense weights; call unmerge_adapter() first"
        )


def _metrics(inputs: Mapping[str, LayerInput], settings: CompressionSettings, name: str) -> Metrics:
    """Of a layer that was observed; none of another one."""
    return layer_metrics(name, inputs[name], settings) if name in inputs else Metrics()


def _warn_if_larger(model: nn.Module, names: Iterable[str], bytes_before: int) -> None:
    """A pair of factors in full precision is usually larger than the 4-bit weight that it replaces."""
    modules = [model.get_submodule(name) for name in names]
    size = sum(num_bytes(tensor) for module in modules for tensor in module.state_dict(keep_vars=True).values())
    if size > bytes_before:
        warnings.warn(
            f"merge_and_unload: the compact layers take {size:,} bytes, the weights they replace {bytes_before:,}. Use "
            "merge_and_unload(quantization_config=BitsAndBytesConfig(load_in_4bit=True)), or a lower param_ratio",
            stacklevel=3,
        )
