"""``LoraSVDModel``: puts the bypasses in, walks through the phases of a run, and hands out the compact model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
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

from .allocation import LayerShape, budget_of, check_budget, given_ranks, kept_parameters
from .compact import LoraSVDCompactConfig, LowRankLinear, compact_module, describe_compact, untie
from .compression import CompressionSettings, LayerInput, absorb, choose_ranks, compute_spectra, factorize
from .config import LoraSVDConfig
from .decompositions import Factors
from .errors import LoraSVDError, NumericalError
from .layer import LoraSVDLinear
from .peft_type import PREFIX
from .schedule import Schedule, build_schedule
from .statistics import SharedGram


class LoraSVDModel(BaseTuner):
    """A model whose targeted linear layers carry a LoRA bypass and will be factorized.

    ``get_peft_model(model, LoraSVDConfig(...))`` makes one; ``Trainer`` with ``LoraSVDCallback``, or a loop that calls
    :meth:`update_and_allocate`, trains it; :meth:`merge_and_unload` returns the compact model.
    """

    prefix = PREFIX
    tuner_layer_cls = LoraSVDLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # -- injection -----------------------------------------------------------------------------------------------------

    def _pre_injection_hook(self, model: nn.Module, config: LoraSVDConfig, adapter_name: str) -> None:
        if not hasattr(self, "_shared_gram"):
            self._shared_gram = SharedGram()
            self._given_ranks: dict[str, dict[str, int] | None] = {}  # compact_ranks that the user chose, by adapter

    def _prepare_model(self, peft_config: LoraSVDConfig, model: nn.Module) -> None:
        """Let ``layers_to_transform`` choose among all linear layers, too; PEFT would pass it over without a word."""
        if peft_config.target_modules != "all-linear" or peft_config.layers_to_transform is None:
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
        if hasattr(base, "support_avx512bf16_for_cpu"):
            # bitsandbytes on a CPU repacks 4-bit weights in an evaluation pass; dequantization is wrong from then on.
            setattr(base, "support_avx512bf16_for_cpu", False)  # noqa: B010 - for the type checker
        new = LoraSVDLinear(target, self._shared_gram, **get_quantization_kwargs(self))
        new.update_layer(adapter_name, peft_config, key=current_key, r=r, lora_alpha=alpha)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    def _tuner_layers(self, adapter_name: str) -> Iterator[tuple[str, LoraSVDLinear]]:
        for name, module in self.model.named_modules():
            if isinstance(module, LoraSVDLinear) and adapter_name in module.lora_svd_A:
                yield name, module

    # -- training ------------------------------------------------------------------------------------------------------

    def schedule(self, adapter_name: str, total_steps: int | None = None) -> Schedule:
        """The phases of this adapter's run; raises if they do not fit into ``total_steps``."""
        config = self._config(adapter_name)
        return build_schedule(
            warmup=config.warmup,
            compression=config.compression,
            interval=config.compression_interval,
            total_steps=total_steps or config.total_steps,
            param_ratio=config.param_ratio,
        )

    def update_and_allocate(self, global_step: int, total_steps: int | None = None) -> None:
        """One step of the method. Call it after the backward pass and before ``optimizer.step()``.

        Adds this step's LoRA gradients to the statistics while the model is full size, and factorizes the weights where
        the schedule says so. ``LoraSVDCallback`` calls it in a Trainer.

        Args:
            global_step: optimizer steps done so far, 0 in the first call.
            total_steps: length of the run; ``LoraSVDConfig.total_steps`` if not given.

        Raises:
            NumericalError: a gradient or a statistic is not finite.
        """
        for adapter_name in self.active_adapters:
            config = self._config(adapter_name)
            if config.param_ratio == 1:
                continue
            schedule = self.schedule(adapter_name, total_steps)
            if global_step == 0:  # what would fail after the warm-up fails now
                self._check_budget(adapter_name)
            layers = dict(self._tuner_layers(adapter_name))
            _check_gradients(layers, adapter_name, global_step)
            for layer in layers.values():
                layer.observe_step(adapter_name)
            budget = schedule.budget(global_step)
            if budget is not None:
                self._compress(adapter_name, budget)
        self._shared_gram.clear()

    def _check_budget(self, adapter_name: str) -> None:
        config = self._config(adapter_name)
        keep = config.compensation == "keep"
        shapes = {name: layer.layer_shape(adapter_name, keep=keep) for name, layer in self._tuner_layers(adapter_name)}
        if config.compact_ranks and not config.compressed:
            given_ranks(config.compact_ranks, shapes, config.param_ratio, config.factor_format)
        else:
            check_budget(shapes, config.param_ratio, config.factor_format)

    def set_param_ratio(self, param_ratio: float, adapter_name: str | None = None) -> None:
        """Choose another size: factorize again for ``param_ratio`` from what was observed. Before ``merge_and_unload``.

        The trained bypass stays. ``LoraSVDConfig.param_ratio`` follows, so that saving the adapter keeps the choice.
        """
        name = adapter_name or self._single_adapter(None)
        if not 0 < param_ratio <= 1:
            raise LoraSVDError(f"param_ratio: got {param_ratio}, expected a number in (0, 1]")
        config, given = self._config(name), self._given_ranks.pop(name, None)
        before, ranks = config.param_ratio, config.compact_ranks
        config.param_ratio, config.compact_ranks = param_ratio, None
        try:
            self._compress(name, param_ratio)
        except LoraSVDError:
            config.param_ratio, config.compact_ranks, self._given_ranks[name] = before, ranks, given
            raise

    def _compress(self, adapter_name: str, param_ratio: float) -> None:
        """Choose ranks for the budget and let factors stand for the weights. Nothing changes if a layer fails."""
        config = self._config(adapter_name)
        layers, inputs, settings = self._pipeline(adapter_name)
        if not config.compressed:  # afterwards compact_ranks is what is in force, chosen or given
            self._given_ranks[adapter_name] = config.compact_ranks
        given = self._given_ranks.get(adapter_name)
        if param_ratio == 1:
            ranks = {name: layer.shape.full_rank for name, layer in inputs.items()}
        elif given:
            shapes = {name: layer.shape for name, layer in inputs.items()}
            ranks = given_ranks(given, shapes, config.param_ratio, config.factor_format)
        else:
            ranks = choose_ranks(inputs, compute_spectra(inputs, settings), param_ratio, settings)
        factors = dict(factorize(inputs, ranks, settings))
        config.compact_ranks, config.compressed = ranks, True
        for name, layer in layers.items():
            layer.set_factors(adapter_name, factors[name])
            layer.observe(adapter_name, config)

    def _pipeline(
        self, adapter_name: str
    ) -> tuple[dict[str, LoraSVDLinear], dict[str, LayerInput], CompressionSettings]:
        config = self._config(adapter_name)
        layers = dict(self._tuner_layers(adapter_name))
        keep = config.compensation == "keep"
        inputs = {
            name: LayerInput(
                shape=layer.layer_shape(adapter_name, keep=keep),
                weight=lambda layer=layer: layer.dense_weight().detach().cpu().double(),
                statistics=lambda layer=layer: layer.statistics(adapter_name),
            )
            for name, layer in layers.items()
        }
        settings = CompressionSettings(
            importance=config.importance,
            allocation=config.allocation,
            decomposition=config.decomposition,
            factor_format=config.factor_format,
            rank_multiple=config.rank_multiple,
            row_shrinkage=config.row_shrinkage,
            column_shrinkage=config.column_shrinkage,
        )
        return layers, inputs, settings

    # -- export --------------------------------------------------------------------------------------------------------

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        compact: bool = True,
    ) -> nn.Module:
        """The compact model, a plain model without PEFT modules, its bypass absorbed into the factors or kept as ranks.

        If training ended before the schedule did, the compression is finished first, with a warning. ``compact=False``
        merges the LoRA into the *dense* weights instead: train small, infer large. Use the returned model.

        Raises:
            LoraSVDError: nothing was observed, or several adapters are to be made one compact model.
            NumericalError: a weight is not finite or cannot be factorized. The model is left as it was.
        """
        description = None
        if not compact:
            for adapter_name in adapter_names or self.active_adapters:
                for _, layer in self._tuner_layers(adapter_name):
                    layer.set_factors(adapter_name, None)
        elif any(self._config(name).param_ratio < 1 for name in adapter_names or self.active_adapters):
            description = self._compact(self._single_adapter(adapter_names))
        model = super().merge_and_unload(progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)
        if description is not None:
            describe_compact(model, description)
        return model

    def _compact(self, adapter_name: str) -> LoraSVDCompactConfig:
        """Replace every layer of the adapter by a plain compact module, once all of them could be computed."""
        config = self._config(adapter_name)
        layers, inputs, settings = self._pipeline(adapter_name)
        if any(layer.merged for layer in layers.values()):
            raise LoraSVDError(
                "merge_and_unload: the adapter is merged into the dense weights; call unmerge_adapter() first"
            )
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
            name: self._compact_layer(name, layer, inputs[name], adapter_name, settings)
            for name, layer in layers.items()
        }
        tied = [name for name in modules if untie(self.model, name)]
        if tied:
            self.model.config.tie_word_embeddings = False  # or PEFT takes the merge for one of tied weights
        for name, module in modules.items():
            self.model.set_submodule(name, module)
        return LoraSVDCompactConfig(
            ranks={name: _stored_rank(module, inputs[name].shape) for name, module in modules.items()},
            factor_format=config.factor_format,
            dense_parameters=sum(given.shape.parameters for given in inputs.values()),
            tied_parameters=sum(inputs[name].shape.parameters for name in tied),
            method={
                name: getattr(config, name) for name in ("importance", "allocation", "compensation", "param_ratio")
            },
        )

    def _compact_layer(
        self, name: str, layer: LoraSVDLinear, given: LayerInput, adapter_name: str, settings: CompressionSettings
    ) -> nn.Module:
        factors, bypass = layer.factors(adapter_name), layer.bypass_factors(adapter_name)
        if factors is None:
            result: Factors | Tensor = given.weight() + bypass.product().cpu().double()
        elif given.shape.extra_rank:
            result = factors.stacked(bypass)
            if result.rank >= given.shape.full_rank:
                result = result.product()
        else:
            result = absorb(name, given, factors, bypass, settings)
        return compact_module(result, layer.get_base_layer(), layer.dense_weight(), settings.factor_format)

    def _reached_target(self, config: LoraSVDConfig, inputs: dict[str, LayerInput]) -> bool:
        if not config.compressed or not config.compact_ranks:
            return False
        shapes: dict[str, LayerShape] = {name: given.shape for name, given in inputs.items()}
        kept = kept_parameters({name: config.compact_ranks[name] for name in shapes}, shapes, config.factor_format)
        return kept <= budget_of(shapes, config.param_ratio)

    # -- state ---------------------------------------------------------------------------------------------------------

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
                layer.allocate_state(adapter_name, attribute, tensor)
        given = next((module._given_ranks for module in model.modules() if isinstance(module, cls)), {})
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


def _stored_rank(module: nn.Module, shape: LayerShape) -> int:
    return module.rank if isinstance(module, LowRankLinear) else shape.full_rank


def _is_quantized_linear(module: nn.Module) -> bool:
    backend = resolve_quantization_backend(module)
    return backend is not None and backend.layer_type == "linear" and backend.supports_merge


def _check_gradients(layers: Mapping[str, LoraSVDLinear], adapter_name: str, global_step: int) -> None:
    """Raise if a gradient of the bypass is not finite, before it is used; one transfer for all layers."""
    sums = {
        name: gradient.float().sum()
        for name, layer in layers.items()
        for parameter in (layer.lora_svd_A[adapter_name], layer.lora_svd_B[adapter_name])
        if (gradient := parameter.grad) is not None
    }
    if not sums:
        raise LoraSVDError(
            f"update_and_allocate({global_step}): no bypass has a gradient. Call it after loss.backward() and before "
            "optimizer.step() and zero_grad(), with the adapter active and trainable"
        )
    finite = torch.stack([value.to("cpu", non_blocking=True) for value in sums.values()]).isfinite()
    if not bool(finite.all()):
        name = next(name for name, ok in zip(sums, finite.tolist(), strict=True) if not ok)
        raise NumericalError(
            f"{name}: the gradient of the LoRA bypass is not finite at step {global_step}; a batch gave a non-finite "
            "loss. Lower the learning rate, look at the data, or train in float32 or bfloat16"
        )
