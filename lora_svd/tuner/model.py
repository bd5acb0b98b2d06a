"""``LoraSVDModel``: the tuner, as PEFT and users call it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from ..compact import parameter_report
from ..compact.bnb import keep_unpacked
from ..compact.loader import describe_compact
from ..compact.quantized import quantize_modules
from ..config import PREFIX, LoraSVDConfig, check_param_ratio
from ..errors import LoraSVDError
from ..schedule import Schedule
from ..statistics import STATISTICS
from ..statistics.shared import SharedGram
from .adapter import ADAPTERS, OF_FACTORS
from .distillation import check_output, mixed_loss
from .embedding import AdaptedHead, LoraSVDEmbedding
from .export import check_export, check_unmerged, export, warn_if_larger
from .groups import kept_features
from .injection import adapted_layer, check_model, expand_all_linear, tied_to, value_for
from .layer import LoraSVDLinear
from .loading import after_loading, check_saved, key_in_model, key_on_disk
from .observer import keep_to_limit
from .run import AdapterRun
from .targets import aliases
from .tying import adapted_heads, copy_tied_weights, tie_again, untie_all


class LoraSVDModel(BaseTuner):
    """A model whose targeted linear layers carry a LoRA bypass and will be factorized.

    ``get_peft_model(model, LoraSVDConfig(...))`` makes one; ``Trainer`` with ``LoraSVDCallback``, or a loop that calls
    :meth:`update_and_allocate`, trains it; :meth:`merge_and_unload` returns the compact model.
    """

    prefix = PREFIX
    tuner_layer_cls = LoraSVDLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self._runs: dict[str, AdapterRun] = {}
        self._shared = SharedGram()
        self._use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        self._unpacked = keep_unpacked(model)
        self._aliases = aliases(model)
        super().__init__(model, *args, **kwargs)
        self._watch_hook = model.register_forward_pre_hook(self._watch, with_kwargs=True)
        self.register_load_state_dict_post_hook(after_loading)

    # -- what a user calls ---------------------------------------------------------------------------------------------

    def run(self, adapter_name: str | None = None) -> AdapterRun:
        """The run of an adapter; of the active one if not named.

        Raises:
            LoraSVDError: several are active.
        """
        name = adapter_name or self._single_adapter(None)
        return self._runs.setdefault(name, AdapterRun(self.model, self.peft_config, name))

    def active_runs(self) -> list[AdapterRun]:
        """The runs of the active adapters."""
        return [self.run(name) for name in self.active_adapters]

    def schedule(self, adapter_name: str, total_steps: int | None = None) -> Schedule:
        """The phases of this adapter's run; raises if they do not fit into ``total_steps``."""
        return self.run(adapter_name).schedule(total_steps)

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
        for run in self.active_runs():
            if run.config.param_ratio < 1:
                run.step(global_step, total_steps, optimizer, scaled=scaled)
        self._shared.clear()

    def set_loss_scale(self, scale: float) -> None:
        """Say what the loss is multiplied by from now on, so that gradients of all steps count alike. A hand-written
        loop with a ``GradScaler`` calls it before a backward pass; ``LoraSVDCallback`` does in a Trainer."""
        self._shared.loss_scale = scale

    def join_statistics(self) -> None:
        """Give every process the sums over all of them. A hand-written loop with several processes calls it, in all of
        them, before it saves the adapter during the warm-up; ``LoraSVDCallback`` does in a Trainer."""
        for run in self.active_runs():
            run.join_statistics()

    def current_param_ratio(self, adapter_name: str | None = None) -> float:
        """Parameters kept / original parameters of the targeted weights as they stand: 1 until they are factorized."""
        run = self.run(adapter_name or self.active_adapters[0])
        return run.current_param_ratio() if run.layers else parameter_report(self.model).param_ratio

    def set_param_ratio(self, param_ratio: float, adapter_name: str | None = None) -> None:
        """Choose another size: factorize again for ``param_ratio`` from what was observed. Before ``merge_and_unload``.

        The trained bypass stays, and what ``train_factors`` has changed goes over to the new size, however many are
        tried. ``LoraSVDConfig.param_ratio`` follows, so that saving the adapter keeps the choice.

        Raises:
            LoraSVDError: nothing was observed, the size is out of reach, or the adapter was merged or unloaded.
        """
        check_param_ratio(param_ratio)
        run = self.run(adapter_name)
        if not run.layers:
            raise LoraSVDError(
                f"set_param_ratio: the adapter {run.name} has no layers in this model any more; it was merged or "
                "unloaded. Choose the size before merge_and_unload, or load the adapter again"
            )
        with torch.inference_mode(False):  # or training could not go on
            run.apply(run.compressed_to(param_ratio), param_ratio=param_ratio)

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
        merges the LoRA into the *dense* weights instead: train small, infer large. Use the returned model. Without
        layers of the adapter, after a merge, nothing changes.

        Args:
            progressbar, safe_merge, adapter_names: as for every method of PEFT.
            compact: whether the model is to be smaller.
            quantization_config: with ``load_in_4bit``: linear layers, factors included, are rounded to 4 bits so that
                the error of their outputs on the observed inputs is small (:mod:`..compact.rounding`). None: factors in
                the type of the base's weights, or the one they are dequantized to.

        Raises:
            LoraSVDError: nothing was observed, several adapters are to be made one compact model, or the
                quantization is not one that can be applied.
            NumericalError: a weight is not finite or cannot be factorized. The model is left as it was.
        """
        runs = [self.run(name) for name in adapter_names or self.active_adapters]
        if not any(run.layers for run in runs):
            return self.model
        configs = [run.config for run in runs]
        smaller = compact and any(config.param_ratio < 1 for config in configs)
        if quantization_config is not None:
            check_export(quantization_config, configs, smaller=smaller)
        arguments = {"progressbar": progressbar, "safe_merge": safe_merge, "adapter_names": adapter_names}
        if smaller:
            return self._merge_compact(self.run(self._single_adapter(adapter_names)), quantization_config, arguments)
        if not compact:
            for run in runs:
                if run.config.compressed:
                    check_unmerged(run.layers)
                for adapter in run.adapters().values():
                    adapter.set_factors(None)
        with torch.inference_mode(False):  # or the model could not be trained
            copy_tied_weights(self.model, [name for run in runs for name in run.layers])
            return super().merge_and_unload(**arguments)

    def _merge_compact(
        self, run: AdapterRun, quantization_config: BitsAndBytesConfig | None, arguments: dict[str, Any]
    ) -> nn.Module:
        """Put compact modules into the places of the layers, once all of them could be computed."""
        is_quantized = any(layer.quantization_backend is not None for layer in run.layers.values())
        quantization = quantization_config or getattr(getattr(self.model, "config", None), "quantization_config", None)
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference could not be trained
            result = export(run)
            heads = adapted_heads(self.model)
            tied = untie_all(self.model, result.modules)
            for name, module in result.modules.items():
                self.model.set_submodule(name, module)
            result.description.tied_parameters = sum(result.inputs[name].shape.parameters for name in tied)
            result.description.tied = tie_again(self.model, heads)
            model: Any = super().merge_and_unload(**arguments)
            if quantization_config is not None:
                quantize_modules(model, quantization_config, result.metrics)
        describe_compact(model, result.description, quantization)
        if is_quantized:
            warn_if_larger([model.get_submodule(name) for name in result.modules], result.bytes_before)
        if self._use_cache is not None:  # Trainer turns it off, and the compact model would generate slowly
            self.model.config.use_cache = self._use_cache
        return model

    def _single_adapter(self, adapter_names: list[str] | None) -> str:
        names = adapter_names or self.active_adapters
        if len(names) != 1:
            raise LoraSVDError(
                f"adapter_names: {list(names)} are {len(names)} adapters; a compact model is made from one"
            )
        return names[0]

    def _watch(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notice that the adapters are trained and nobody calls :meth:`update_and_allocate`; keep the first batch."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for run in self.active_runs():
                if model.training:
                    run.watch()
                if run.search is not None and run.batch is None:
                    run.batch = args, kwargs

    # -- distillation --------------------------------------------------------------------------------------------------

    def _distill(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        """Once it is compressed, ``distillation`` of the model's loss comes from the model that it was."""
        configs = [run.config for run in self.active_runs() if run.config.distillation]
        if not configs or not torch.is_grad_enabled() or not self._is_on():
            return
        if model.training:  # what would fail after the warm-up fails in the first step
            check_output(model, outputs)
        share = max((config.distillation for config in configs if config.compressed), default=0.0)
        if share and getattr(outputs, "loss", None) is not None:
            outputs.loss = mixed_loss(model, args, kwargs, outputs, share)

    def _is_on(self) -> bool:
        """Whether the adapters are this tuner's and not switched off; PEFT switches all layers together."""
        layers = (module for module in self.model.modules() if isinstance(module, LoraSVDLinear))
        first = next((layer for layer in layers if any(map(layer.has_adapter, self.active_adapters))), None)
        return first is not None and first.shared is self._shared and not first.disable_adapters

    # -- what PEFT calls -----------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT does, with a run of its own; what another one of that name has left in the layers is removed."""
        run = self._runs[adapter_name] = AdapterRun(model, self.peft_config, adapter_name)
        check_model(model, run.config)
        for layer in run.layers.values():
            del layer.lora_svd_adapters[adapter_name]
        if run.config.distillation and not hasattr(self, "_distillation_hook"):
            # A hook, because a PeftModel without task_type calls the wrapped model and passes this one by.
            self._distillation_hook = model.register_forward_hook(self._distill, with_kwargs=True)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        if isinstance(output, LoraSVDLinear):
            output.is_output = True
        keep_to_limit({name: adapter.observer for name, adapter in run.adapters().items()}, run.config)
        run.seek_groups()

    def _prepare_model(self, peft_config: LoraSVDConfig, model: nn.Module) -> None:
        expand_all_linear(peft_config, model)

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
        r = value_for("rank_pattern", peft_config.rank_pattern or {}, current_key)
        alpha = value_for("alpha_pattern", peft_config.alpha_pattern or {}, current_key)
        quantization = get_quantization_kwargs(self)
        layer = adapted_layer(
            self.model, current_key, target, peft_config, shared=self._shared, aliases=self._aliases, **quantization
        )
        kept = kept_features(self.model, peft_config, current_key) if peft_config.compressed else None
        layer.update_layer(adapter_name, peft_config, key=current_key, r=r, lora_alpha=alpha, kept=kept)
        if layer is target:
            return
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        tied = tied_to(self.model, current_key, target, peft_config) if isinstance(layer, LoraSVDEmbedding) else {}
        self._replace_module(parent, target_name, layer, target)
        if isinstance(layer, LoraSVDEmbedding):
            for name, head in tied.items():
                self.model.set_submodule(name, AdaptedHead(layer, head))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's takes a weight over, which a head of several layers, in ``modules_to_save``, has not."""
        if isinstance(new_module, BaseTunerLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._watch_hook.remove()
        if hasattr(self, "_distillation_hook"):
            self._distillation_hook.remove()
        for layer in self._unpacked:
            setattr(layer, "support_avx512bf16_for_cpu", True)  # noqa: B010 - for the type checker
        heads = adapted_heads(self.model)
        super()._unload_and_optionally_merge(*args, **kwargs)
        tie_again(self.model, heads)
        return self.model

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, adapter_names: list[str] | None = None, **__: Any) -> Iterator[None]:
        if adapter_names is not None:
            raise LoraSVDError(
                f"adapter_names: got {adapter_names} for the rows of a batch, expected None; set_adapter chooses one "
                "adapter for all rows"
            )
        yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key_on_disk(key, adapter_name) or super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LoraSVDConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Names of the model for the tensors of a checkpoint, once it is known that they fit."""
        check_saved(model, adapter_name, state_dict)
        named = {key_in_model(key, adapter_name) or key: tensor for key, tensor in state_dict.items()}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, named)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DDP, given the PEFT model, is to leave alone: it would send the statistics with every forward pass, and
        factors may be replaced. The PEFT model hands its attributes on."""
        parts = ["group", *(f"observer.{name}" for name in (*STATISTICS, "counts"))]
        parts += [f"factors.{name}" for name in OF_FACTORS]
        return [
            f"base_model.model.{name}.{ADAPTERS}.{adapter}.{part}"
            for name, module in self.model.named_modules()
            if isinstance(module, LoraSVDLinear)
            for part in parts
            for adapter in module.lora_svd_adapters
        ]
