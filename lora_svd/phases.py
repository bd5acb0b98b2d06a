"""``PhasedModel``: walks through the phases of a run: observed, compressed, recovering."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .allocation import LayerShape, check_budget, given_ranks, kept_parameters
from .compression import (
    CompressionSettings,
    LayerInput,
    choose_ranks,
    compute_spectra,
    factorize,
)
from .config import LoraSVDConfig, check_param_ratio
from .distillation import check_output, mixed_loss
from .errors import LoraSVDError, NumericalError, in_module
from .importance import IMPORTANCES
from .injection import InjectedModel
from .layer import LoraSVDLinear
from .observation import pack_statistics
from .schedule import Schedule, build_schedule
from .targets import check_called, check_factors


class PhasedModel(InjectedModel):
    """A model whose targeted linear layers carry a LoRA bypass, are observed, and are factorized while it trains."""

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
        configs = [config for name in self.active_adapters if (config := self._config(name)).distillation]
        off = (layer.disable_adapters for name in self.active_adapters for _, layer in self._tuner_layers(name))
        if not configs or not torch.is_grad_enabled() or next(off, True):  # PEFT switches all layers off together
            return
        if model.training:  # what would fail after the warm-up fails in the first step
            check_output(model, outputs)
        share = max((config.distillation for config in configs if config.compressed), default=0.0)
        if share and getattr(outputs, "loss", None) is not None:
            outputs.loss = mixed_loss(model, args, kwargs, outputs, share)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        if hasattr(self, "_distillation_hook"):
            self._distillation_hook.remove()
        for layer in self._unpacked:
            setattr(layer, "support_avx512bf16_for_cpu", True)  # noqa: B010 - for the type checker
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def update_and_allocate(
        self,
        global_step: int,
        total_steps: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        scaled: bool = False,
    ) -> None:
        """One step of the method. Call it after the backward pass and before ``optimizer.step()``.

        Adds this step's LoRA gradients to the statistics while the model is full size, and factorizes the weights where
        the schedule says so. ``LoraSVDCallback`` calls it in a Trainer.

        Args:
            global_step: optimizer steps done so far, 0 in the first call.
            total_steps: length of the run; ``LoraSVDConfig.total_steps`` if not given.
            optimizer: with ``train_factors``, the optimizer that trains the bypass; it is given the factors as well.
            scaled: a ``GradScaler`` is in use (float16) and skips steps with gradients that are not finite; such a step
                is then not observed, with a warning, instead of being an error.

        Raises:
            NumericalError: a gradient or a statistic is not finite. What was observed before is whole: a caller may
                drop the step and go on.
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
            if global_step == 0:
                check_called(layers, adapter_name)
                check_factors(layers, adapter_name)
            if _gradients_are_finite(layers, adapter_name, global_step, scaled=scaled):
                self._observe_step(layers, adapter_name)
            budget = schedule.budget(global_step, compressed=config.compressed)
            if budget is not None:
                self.join_statistics(adapter_name)
                replaced = self._trainable_factors()
                self._compress(adapter_name, budget, together=True)
                if config.trains_factors:
                    self._train_factors(optimizer, replaced)
        self._shared_gram.clear()

    def _observe_step(self, layers: Mapping[str, LoraSVDLinear], adapter_name: str) -> None:
        """Let the layers see the gradients of the step, with what A lets through of the inputs of all processes."""
        observed = {name: layer for name, layer in layers.items() if layer.observes_step(adapter_name)}
        sketches: list[Tensor | None] = [None] * len(observed)
        if {"gradient_rows", "input_gram"} <= set(IMPORTANCES[self._config(adapter_name).importance].statistics):
            num_tokens = [layer.num_tokens(adapter_name) for layer in observed.values()]
            distributed.add_up(num_tokens)
            found = [
                layer.input_sketch(adapter_name, n) for layer, n in zip(observed.values(), num_tokens, strict=True)
            ]
            distributed.add_up(found)
            sketches[:] = found
        for index, ((name, layer), sketch) in enumerate(zip(observed.items(), sketches, strict=True)):
            with in_module(name):
                layer.observe_step(adapter_name, sketch, mine=distributed.owns(index))

    def set_loss_scale(self, scale: float) -> None:
        """Say what the loss is multiplied by from now on, so that gradients of all steps count alike. A hand-written
        loop with a ``GradScaler`` calls it before a backward pass; ``LoraSVDCallback`` does in a Trainer."""
        self._shared_gram.loss_scale = scale

    def join_statistics(self, adapter_name: str | None = None) -> None:
        """Give every process the sums over all of them. A hand-written loop with several processes calls it, in all of
        them, before it saves the adapter during the warm-up; ``LoraSVDCallback`` does in a Trainer."""
        for name in [adapter_name] if adapter_name else self.active_adapters:
            for _, layer in self._tuner_layers(name):
                layer.join_statistics(name)

    def _check_budget(self, adapter_name: str) -> None:
        config, shapes = self._config(adapter_name), self._shapes(adapter_name)
        if config.compact_ranks and not config.compressed:
            given_ranks(config.compact_ranks, shapes, config.param_ratio, config.factor_format)
        else:
            check_budget(shapes, config.param_ratio, config.factor_format)

    def has_joined_statistics(self) -> bool:
        """Whether what would be saved are the sums over all processes."""
        return all(layer.is_joined(name) for name in self.active_adapters for _, layer in self._tuner_layers(name))

    def _shapes(self, adapter_name: str) -> dict[str, LayerShape]:
        keep = self._config(adapter_name).compensation == "keep"
        return {name: layer.layer_shape(adapter_name, keep=keep) for name, layer in self._tuner_layers(adapter_name)}

    def _trainable_factors(self) -> set[nn.Parameter]:
        return {p for m in self.model.modules() if isinstance(m, LoraSVDLinear) for p in m.trainable_factors()}

    def _train_factors(self, optimizer: torch.optim.Optimizer | None, replaced: set[nn.Parameter]) -> None:
        """Hand the factors that now exist to the optimizer, in the order a new one would have them, so that its saved
        state fits when a run is resumed. replaced: the factors before, which a cubic schedule leaves behind."""
        if optimizer is None:
            raise LoraSVDError("train_factors: got no optimizer; call update_and_allocate(step, optimizer=optimizer)")
        group, factors = optimizer.param_groups[0], self._trainable_factors()
        for parameter in replaced - factors:
            optimizer.state.pop(parameter, None)
        before = set(group["params"])
        ours = [parameter for parameter in self.parameters() if parameter in before | factors]
        others = before - set(ours) - replaced  # of modules around this one
        first = next((i for i, parameter in enumerate(group["params"]) if parameter not in others), len(before))
        behind = [parameter for parameter in group["params"][first:] if parameter in others]
        group["params"] = [*group["params"][:first], *ours, *behind]

    def current_param_ratio(self, adapter_name: str | None = None) -> float:
        """Parameters kept / original parameters of the targeted weights as they stand: 1 until they are factorized."""
        name = adapter_name or self.active_adapters[0]
        shapes = self._shapes(name)
        total = sum(shape.parameters for shape in shapes.values())
        return kept_parameters_of(self._config(name), shapes) / total

    def set_param_ratio(self, param_ratio: float, adapter_name: str | None = None) -> None:
        """Choose another size: factorize again for ``param_ratio`` from what was observed. Before ``merge_and_unload``.

        The trained bypass stays, and what ``train_factors`` has changed goes over to the new size, however many are
        tried. ``LoraSVDConfig.param_ratio`` follows, so that saving the adapter keeps the choice.
        """
        name = adapter_name or self._single_adapter(None)
        check_param_ratio(param_ratio)
        config, given = self._own_config(name), self._given_ranks.pop(name, None)
        before, ranks = config.param_ratio, config.compact_ranks
        config.param_ratio, config.compact_ranks = param_ratio, None
        try:
            self._compress(name, param_ratio)
        except LoraSVDError:
            config.param_ratio, config.compact_ranks, self._given_ranks[name] = before, ranks, given
            raise

    @torch.no_grad()
    def _compress(self, adapter_name: str, param_ratio: float, *, together: bool = False) -> None:
        """Choose ranks for the budget and let factors stand for the weights. Nothing changes if a layer fails.

        ``together``: all processes call it, and each computes its share of the layers.
        """
        divide = distributed.divide if together else distributed.alone
        config = self._own_config(adapter_name)
        if config.train_factors and adapter_name not in self._trained:
            self._trained[adapter_name] = {
                name: factors
                for name, layer in self._tuner_layers(adapter_name)
                if (factors := layer.factors(adapter_name)) is not None
            }
        layers, inputs, settings = self._pipeline(adapter_name, gather=together)
        if not config.compressed:  # afterwards compact_ranks is what is in force, chosen or given
            self._given_ranks[adapter_name] = config.compact_ranks
        given = self._given_ranks.get(adapter_name)
        if param_ratio == 1:
            ranks = {name: layer.shape.full_rank for name, layer in inputs.items()}
        elif given:
            shapes = {name: layer.shape for name, layer in inputs.items()}
            ranks = given_ranks(given, shapes, config.param_ratio, config.factor_format)
        else:
            spectra = divide(inputs, lambda share: compute_spectra(share, settings).items())
            ranks = choose_ranks(inputs, spectra, param_ratio, settings)
        trains = config.trains_factors
        factors = divide(
            inputs,
            lambda share: (
                (name, found and layers[name].rounded_factors(found, trainable=trains))
                for name, found in factorize(share, ranks, settings)
            ),
        )
        config.compact_ranks, config.compressed = ranks, True
        for name, layer in layers.items():
            layer.set_factors(adapter_name, factors[name], trainable=trains)
            layer.observe(adapter_name, config)
        pack_statistics(layers.values(), adapter_name)

    def _pipeline(
        self, adapter_name: str, *, gather: bool = False
    ) -> tuple[dict[str, LoraSVDLinear], dict[str, LayerInput], CompressionSettings]:
        config = self._config(adapter_name)
        layers, shapes = dict(self._tuner_layers(adapter_name)), self._shapes(adapter_name)
        inputs = {
            name: LayerInput(
                shape=shapes[name],
                weight=_weight_reader(name, layer, gather=gather, mine=distributed.owns(index)),
                statistics=lambda layer=layer: layer.statistics(adapter_name),
                trained=self._trained.get(adapter_name, {}).get(name),
            )
            for index, (name, layer) in enumerate(layers.items())
        }
        return layers, inputs, CompressionSettings.of(config)


def _weight_reader(name: str, layer: LoraSVDLinear, *, gather: bool, mine: bool) -> Callable[[], Tensor]:
    """Returns the weight, (out, in), on the CPU in float64. A sharded one is gathered at once, by all processes
    together, and kept where it is factorized."""
    if not distributed.is_sharded(layer.get_base_layer().weight):
        return lambda: layer.dense_weight().detach().cpu().double()
    if not gather:
        raise LoraSVDError(
            f"{name}: its weight is sharded over several processes. Save the adapter (trainer.save_model), and choose "
            "another size or merge in one process, after PeftModel.from_pretrained(model, folder)"
        )
    weight = distributed.whole(layer.dense_weight().detach())
    return (weight.cpu() if mine else weight.new_empty(0)).double


def kept_parameters_of(config: LoraSVDConfig, shapes: Mapping[str, LayerShape]) -> int:
    ranks = config.compact_ranks if config.compressed and config.compact_ranks else {}
    in_force = {name: ranks.get(name, shape.full_rank) for name, shape in shapes.items()}
    return kept_parameters(in_force, shapes, config.factor_format)


def _gradients_are_finite(
    layers: Mapping[str, LoraSVDLinear], adapter_name: str, global_step: int, *, scaled: bool
) -> bool:
    """Raise, or warn if ``scaled``, if a gradient of the bypass is not finite; one transfer for all layers."""
    sums = {
        name: distributed.whole(gradient.float().sum())
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
        found = f"{name}: the gradient of the LoRA bypass is not finite at step {global_step}"
        if not scaled:
            raise NumericalError(
                f"{found}; a batch gave a non-finite loss. Lower the learning rate, look at the data, or train in "
                "float32 or bfloat16"
            )
        warnings.warn(f"{found}, which the gradient scaler skips; the step is not observed", stacklevel=3)
        return False
    return True
