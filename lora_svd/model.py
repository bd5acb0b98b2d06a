"""``LoraSVDModel``: walks through the phases of a run and hands out the compact model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from .allocation import LayerShape, budget_of, check_budget, given_ranks, kept_parameters
from .compact import (
    LoraSVDCompactConfig,
    LowRankLinear,
    check_quantization,
    compact_module,
    describe_compact,
    num_bytes,
    quantize_modules,
    untie,
)
from .compression import (
    CompressionSettings,
    LayerInput,
    absorb,
    choose_ranks,
    compute_spectra,
    factorize,
    layer_metrics,
)
from .config import LoraSVDConfig
from .decompositions import Factors
from .distillation import distillation_loss, label_positions
from .errors import LoraSVDError, NumericalError
from .injection import InjectedModel
from .layer import LoraSVDLinear
from .schedule import Schedule, build_schedule


class LoraSVDModel(InjectedModel):
    """A model whose targeted linear layers carry a LoRA bypass and will be factorized.

    ``get_peft_model(model, LoraSVDConfig(...))`` makes one; ``Trainer`` with ``LoraSVDCallback``, or a loop that calls
    :meth:`update_and_allocate`, trains it; :meth:`merge_and_unload` returns the compact model.
    """

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

    def _pre_injection_hook(self, model: nn.Module, config: LoraSVDConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        if config.distillation and not hasattr(self, "_distillation_hook"):
            # A hook, because a PeftModel without task_type calls the wrapped model and passes this one by.
            self._distillation_hook = model.register_forward_hook(self._distill, with_kwargs=True)

    def _distill(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        """Once it is compressed, ``distillation`` of the model's loss comes from the model that it was."""
        configs = [self._config(name) for name in self.active_adapters]
        share = max((config.distillation for config in configs if config.compressed), default=0.0)
        if not share or not torch.is_grad_enabled() or getattr(outputs, "loss", None) is None:
            return
        given = {name: value for name, value in kwargs.items() if name != "labels"}
        layers = [module for module in model.modules() if isinstance(module, LoraSVDLinear)]
        with torch.no_grad(), _switched_off(layers):
            teacher = model.forward(*args, **given).logits
        mask = label_positions(outputs.logits, kwargs.get("labels"))
        distance = distillation_loss(outputs.logits, teacher, mask, kwargs.get("num_items_in_batch"))
        outputs.loss = (1 - share) * outputs.loss + share * distance

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        if hasattr(self, "_distillation_hook"):
            self._distillation_hook.remove()
        for layer in self._unpacked:
            setattr(layer, "support_avx512bf16_for_cpu", True)  # noqa: B010 - for the type checker
        return super()._unload_and_optionally_merge(*args, **kwargs)  # pyright: ignore[reportReturnType]

    def update_and_allocate(
        self, global_step: int, total_steps: int | None = None, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """One step of the method. Call it after the backward pass and before ``optimizer.step()``.

        Adds this step's LoRA gradients to the statistics while the model is full size, and factorizes the weights where
        the schedule says so. ``LoraSVDCallback`` calls it in a Trainer.

        Args:
            global_step: optimizer steps done so far, 0 in the first call.
            total_steps: length of the run; ``LoraSVDConfig.total_steps`` if not given.
            optimizer: with ``train_factors``, the optimizer that trains the bypass; it is given the factors as well.

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
            self._trained.pop(adapter_name, None)  # the optimizer is about to change the factors
            _check_gradients(layers, adapter_name, global_step)
            for layer in layers.values():
                layer.observe_step(adapter_name)
            budget = schedule.budget(global_step)
            if budget is not None:
                self._compress(adapter_name, budget)
                if config.trains_factors:
                    self._train_factors(optimizer)
        self._shared_gram.clear()

    def _check_budget(self, adapter_name: str) -> None:
        config = self._config(adapter_name)
        keep = config.compensation == "keep"
        shapes = {name: layer.layer_shape(adapter_name, keep=keep) for name, layer in self._tuner_layers(adapter_name)}
        if config.compact_ranks and not config.compressed:
            given_ranks(config.compact_ranks, shapes, config.param_ratio, config.factor_format)
        else:
            check_budget(shapes, config.param_ratio, config.factor_format)

    def _train_factors(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Hand the factors that now exist to the optimizer, in the order a new one would have them, so that its saved
        state fits when a run is resumed."""
        if optimizer is None:
            raise LoraSVDError("train_factors: got no optimizer; call update_and_allocate(step, optimizer=optimizer)")
        group = optimizer.param_groups[0]
        before = {id(parameter) for parameter in group["params"]}
        factors = {id(p) for m in self.model.modules() if isinstance(m, LoraSVDLinear) for p in m.trainable_factors()}
        present = [parameter for parameter in self.parameters() if id(parameter) in before | factors]
        for replaced in set(group["params"]) - set(present):  # by an earlier factorization of a cubic schedule
            optimizer.state.pop(replaced, None)
        group["params"] = present

    def current_param_ratio(self, adapter_name: str | None = None) -> float:
        """Parameters kept / original parameters of the targeted weights as they stand: 1 until they are factorized."""
        name = adapter_name or self.active_adapters[0]
        shapes = {key: given.shape for key, given in self._pipeline(name)[1].items()}
        total = sum(shape.parameters for shape in shapes.values())
        return _kept_parameters(self._config(name), shapes) / total

    def set_param_ratio(self, param_ratio: float, adapter_name: str | None = None) -> None:
        """Choose another size: factorize again for ``param_ratio`` from what was observed. Before ``merge_and_unload``.

        The trained bypass stays, and what ``train_factors`` has changed goes over to the new size, however many are
        tried. ``LoraSVDConfig.param_ratio`` follows, so that saving the adapter keeps the choice.
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

    @torch.no_grad()
    def _compress(self, adapter_name: str, param_ratio: float) -> None:
        """Choose ranks for the budget and let factors stand for the weights. Nothing changes if a layer fails."""
        config = self._config(adapter_name)
        if config.trains_factors and adapter_name not in self._trained:
            self._trained[adapter_name] = {
                name: factors
                for name, layer in self._tuner_layers(adapter_name)
                if (factors := layer.factors(adapter_name)) is not None
            }
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
            layer.set_factors(adapter_name, factors[name], trainable=config.trains_factors)
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
                trained=self._trained.get(adapter_name, {}).get(name),
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
            correlation_shrinkage=config.correlation_shrinkage,
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
                for _, layer in self._tuner_layers(name):
                    layer.set_factors(name, None)
        if not smaller:
            return super().merge_and_unload(progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)
        name = self._single_adapter(adapter_names)
        layers, inputs, settings = self._pipeline(name)
        bytes_before = sum(layer.weight_bytes() for layer in layers.values())
        quantization = quantization_config or getattr(getattr(self.model, "config", None), "quantization_config", None)
        with torch.no_grad():
            description = self._compact(name)
            model: Any = super().merge_and_unload(progressbar=progressbar, adapter_names=adapter_names)
            if quantization_config is not None:
                quantize_modules(model, quantization_config, partial(_input_gram, inputs, settings))
        describe_compact(model, description, quantization)
        if any(layer.quantization_backend is not None for layer in layers.values()):
            _warn_if_larger(model, layers, bytes_before)
        if self._use_cache is not None:  # Trainer turns it off, and the compact model would generate slowly
            self.model.config.use_cache = self._use_cache
        return model

    def _check_quantization(self, config: BitsAndBytesConfig, names: Iterable[str], smaller: bool) -> None:
        if not smaller:
            raise LoraSVDError(
                "quantization_config: got one for a dense model, expected compact=True and param_ratio < 1. Save the "
                "merged model and give it to from_pretrained"
            )
        if any(self._config(name).factor_format != "factors" for name in names):
            raise LoraSVDError(
                "factor_format: got 'pivoted' with a quantization_config, expected 'factors', since pivoted ones "
                "amplify rounding. Train with it, best with rank_multiple=64 as well; after training, set it in the "
                "adapter's config and call set_param_ratio"
            )
        check_quantization(config)

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
            name: compact_layer(
                name, layer, inputs[name], layer.factors(adapter_name), layer.bypass_factors(adapter_name), settings
            )
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

    def _reached_target(self, config: LoraSVDConfig, inputs: dict[str, LayerInput]) -> bool:
        shapes = {name: given.shape for name, given in inputs.items()}
        return config.compressed and _kept_parameters(config, shapes) <= budget_of(shapes, config.param_ratio)


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


def _kept_parameters(config: LoraSVDConfig, shapes: Mapping[str, LayerShape]) -> int:
    ranks = config.compact_ranks if config.compressed and config.compact_ranks else {}
    in_force = {name: ranks.get(name, shape.full_rank) for name, shape in shapes.items()}
    return kept_parameters(in_force, shapes, config.factor_format)


def _input_gram(inputs: Mapping[str, LayerInput], settings: CompressionSettings, name: str) -> Tensor | None:
    """E[x x^T] of a layer that was observed, shrunk; None where the importance has no full column metric."""
    column = layer_metrics(name, inputs[name], settings).column if name in inputs else None
    return column if column is not None and column.dim() == 2 else None


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


@contextmanager
def _switched_off(layers: list[LoraSVDLinear]) -> Iterator[None]:
    """The base model's own output, without touching which parameters are trained."""
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _stored_rank(module: nn.Module, shape: LayerShape) -> int:
    return module.rank if isinstance(module, LowRankLinear) else shape.full_rank


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
