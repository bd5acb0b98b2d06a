"""How the bypasses get into a model, and how a saved adapter gets back into them: PEFT's side of the tuner."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
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
)
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from .compact import LowRankEmbedding, LowRankLinear, TiedHead, keep_unpacked, tie_head
from .config import LoraSVDConfig
from .decompositions import Factors
from .embedding import LoraSVDEmbedding, check_embedding, is_plain_embedding
from .errors import LoraSVDError
from .layer import SAVED, LoraSVDLinear
from .observation import keep_to_limit
from .peft_type import PREFIX
from .statistics import COUNTS, STATISTICS
from .targets import (
    aliases,
    check_modules_to_save,
    is_plain_linear,
    is_quantized_linear,
    patterns,
    warn_of_fused_weights,
)
from .tokens import SharedGram

# Names of the heads that PEFT trains whole for a task, after the adapter is injected.
_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


class InjectedModel(BaseTuner):
    """A model whose targeted linear layers are :class:`LoraSVDLinear`, and embeddings :class:`LoraSVDEmbedding`."""

    prefix = PREFIX
    tuner_layer_cls = LoraSVDLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _pre_injection_hook(self, model: nn.Module, config: LoraSVDConfig, adapter_name: str) -> None:
        if not hasattr(self, "_shared_gram"):
            self._shared_gram = SharedGram()
            self._use_cache = getattr(getattr(model, "config", None), "use_cache", None)
            self._given_ranks: dict[str, dict[str, int] | None] = {}  # compact_ranks that the user chose, by adapter
            self._owned: set[str] = set()  # adapters whose config is a copy of the user's
            self._trained: dict[str, dict[str, Factors]] = {}  # factors as training left them, by adapter and layer
            self._unpacked = keep_unpacked(model)
            self._aliases = aliases(model)
            self._heads: dict[str, tuple[nn.Module, str]] = {}  # tied to an embedding with a bypass; its name
        if config.param_ratio < 1 and any(isinstance(module, LowRankLinear) for module in model.modules()):
            raise LoraSVDError(
                f"param_ratio: got {config.param_ratio} for a model that is compact already, expected 1, which trains "
                "a LoRA on it. To make it smaller still, give lora_svd.compact.densify(model) to get_peft_model"
            )
        check_modules_to_save(model, config.modules_to_save or ())
        if not (config.inference_mode or config.compressed):
            warn_of_fused_weights(model)
        self._trained.pop(adapter_name, None)
        self._owned.discard(adapter_name)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        keep_to_limit(dict(self._tuner_layers(adapter_name)), adapter_name, self._config(adapter_name))

    def _prepare_model(self, peft_config: LoraSVDConfig, model: nn.Module) -> None:
        """Leave the head, which PEFT trains whole, out of all linear layers, and let ``layers_to_transform`` choose
        among them; PEFT would fail with the one and pass over the other without a word."""
        if str(peft_config.target_modules).lower() != "all-linear":
            return
        _maybe_include_all_linear_layers(peft_config, model)
        names = set(peft_config.target_modules or ()).difference(_HEADS.get(peft_config.task_type or "", ()))
        peft_config.target_modules = names  # pyright: ignore[reportAttributeAccessIssue] - as in PEFT
        if peft_config.layers_to_transform is None:
            return
        by_suffix = ((name, replace(peft_config, target_modules=[name.rpartition(".")[2]])) for name in names)
        chosen = {name for name, config in by_suffix if check_target_module_exists(config, name)}
        if not chosen:
            raise LoraSVDError(
                f"layers_to_transform: got {peft_config.layers_to_transform!r} with layers_pattern="
                f"{peft_config.layers_pattern!r}, expected indices of layers that hold one of the {len(names)} linear "
                "modules; look at model.named_modules()"
            )
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
        r = _of_pattern("rank_pattern", peft_config.rank_pattern or {}, current_key)
        alpha = _of_pattern("alpha_pattern", peft_config.alpha_pattern or {}, current_key)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        is_embedding, tied = is_plain_embedding(base), {}
        if is_embedding:
            tied = self._tied_to(current_key, base, peft_config)
            check_embedding(current_key, base, peft_config, tied)
        if isinstance(target, LoraSVDLinear):
            target.update_layer(adapter_name, peft_config, key=current_key, r=r, lora_alpha=alpha)
            return
        if not (is_embedding or is_plain_linear(base) or is_quantized_linear(base)):
            names = {name: type(module) is type(base) for name, module in self.model.named_modules()}
            raise TypeError(
                f"target_modules: {current_key} is {type(base).__name__}, which is not supported; expected "
                "torch.nn.Linear, torch.nn.Embedding or transformers Conv1D, without a forward of its own, or a "
                "quantized linear layer. "
                f"Name others, or leave this kind out: exclude_modules={patterns(filter(names.get, names), names)}"
            )
        if target in self._aliases:
            names = self._aliases[target]
            raise LoraSVDError(
                f"target_modules: {names[0]} is the same module as {', '.join(names[1:])}, expected one name for each, "
                f"since a compact module would take the place of one only. Set exclude_modules={names}"
            )
        kind = LoraSVDEmbedding if is_embedding else LoraSVDLinear
        new = kind(target, self._shared_gram, **get_quantization_kwargs(self))
        new.update_layer(adapter_name, peft_config, key=current_key, r=r, lora_alpha=alpha)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)
        for name, head in tied.items():
            self._heads[name] = (head, current_key)
            self.model.set_submodule(name, TiedHead(new))

    def _tied_to(self, key: str, base: nn.Module, config: LoraSVDConfig) -> dict[str, nn.Module]:
        """The modules that are tied to an embedding, without linear layers that get factors of their own."""
        names = {
            name.removesuffix(".weight").removesuffix(".base_layer")
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if parameter is base.weight
        }
        others = {name: self.model.get_submodule(name) for name in sorted(names - {key})}
        return {
            name: module
            for name, module in others.items()
            if isinstance(module, nn.Embedding | LoraSVDEmbedding) or not check_target_module_exists(config, name)
        }

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        super()._unload_and_optionally_merge(*args, **kwargs)
        self._tie_heads()
        return self.model

    def _tie_heads(self) -> dict[str, str]:
        """Give output layers that used a bypass what the embedding has become: its weight, or its factors.

        Those with factors by name, with the embedding's.
        """
        low_rank = {}
        for name, (head, of) in self._heads.items():
            embedding = self.model.get_submodule(of)
            if isinstance(embedding, LowRankEmbedding):
                tie_head(self.model, name, of)
                low_rank[name] = of
            elif isinstance(embedding, nn.Embedding):
                head.weight = embedding.weight
                self.model.set_submodule(name, head)
        return low_rank

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's takes a weight over, which a head of several layers, in ``modules_to_save``, has not."""
        if isinstance(new_module, BaseTunerLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)

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
        saved: dict[str, dict[str, Tensor]] = {name: {} for name in known}
        for key, tensor in state_dict.items():
            module_name, _, attribute = key.rpartition(".")
            saved.get(module_name.removeprefix("base_model.model."), {})[attribute] = tensor
        for name, layer in known.items():
            _check_saved(name, layer, adapter_name, saved[name])
        for name, layer in known.items():
            layer.reset_state(adapter_name)
            for attribute, tensor in saved[name].items():
                layer.allocate_state(adapter_name, attribute, tensor, trainable=config.trains_factors)
        tuner = next((module for module in model.modules() if isinstance(module, cls)), None)
        given = {} if tuner is None else tuner._given_ranks
        if tuner is not None:
            tuner._trained.pop(adapter_name, None)
        if not config.compressed:
            given[adapter_name] = config.compact_ranks
        ranks = {name: layer.kept_rank(adapter_name) for name, layer in known.items()}
        # Without factors the run is before its compression, unless that has left every layer dense.
        compressed = any(layer.factors(adapter_name) is not None for layer in known.values()) or (
            config.compressed and config.compact_ranks == ranks
        )
        said = {"compressed": compressed, "compact_ranks": ranks if compressed else given.get(adapter_name)}
        if tuner is not None and any(getattr(config, name) != value for name, value in said.items()):
            config = tuner._own_config(adapter_name)
        for name, value in said.items():
            setattr(config, name, value)
        for layer in known.values():
            layer.observe(adapter_name, config)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _config(self, adapter_name: str) -> LoraSVDConfig:
        config = self.peft_config[adapter_name]
        assert isinstance(config, LoraSVDConfig)
        return config

    def _own_config(self, adapter_name: str) -> LoraSVDConfig:
        """The adapter's config, from here on a copy, which may say what became of it: the user may give theirs to
        another model."""
        if adapter_name not in self._owned:
            self._owned.add(adapter_name)
            self.peft_config[adapter_name] = copy.deepcopy(self._config(adapter_name))
        return self._config(adapter_name)

    def _single_adapter(self, adapter_names: list[str] | None) -> str:
        names = adapter_names or self.active_adapters
        if len(names) != 1:
            raise LoraSVDError(
                f"adapter_names: {list(names)} are {len(names)} adapters; a compact model is made from one"
            )
        return names[0]


def _check_saved(name: str, layer: LoraSVDLinear, adapter_name: str, saved: Mapping[str, Tensor]) -> None:
    """Raise if the tensors that an adapter has for a layer are not all there, or of another shape."""
    needed = {"A", "B"} | ({"left", "right"} if {PREFIX + "left", PREFIX + "right"} & saved.keys() else set())
    missing = [PREFIX + part for part in sorted(needed) if PREFIX + part not in saved]
    if missing:
        raise LoraSVDError(f"{name}.{missing[0]}: missing in this adapter, or under another name; get its file again")
    out_features, in_features = layer.out_features, layer.in_features
    rows, columns = layer.split[adapter_name].shape
    rank = min(saved[PREFIX + "right"].shape[:1], default=0) if "left" in needed else 0
    expected: dict[str, tuple[int, ...]] = {
        "A": (layer.r[adapter_name], in_features),
        "B": (out_features, layer.r[adapter_name]),
        "left": (rows, rank),
        "right": (rank, columns),
        "counts": (len(COUNTS),),
    }
    for statistic in STATISTICS:
        is_packed = PREFIX + statistic in saved and saved[PREFIX + statistic].dim() == 1
        expected[statistic] = layer.statistic_shape(adapter_name, statistic, packed=is_packed)
    for part, shape in expected.items():
        found = saved.get(PREFIX + part)
        if found is not None and tuple(found.shape) != shape:
            raise LoraSVDError(
                f"{name}.{PREFIX}{part}: has shape {tuple(found.shape)} in this adapter, expected {shape}; load it "
                "into the model it was trained on, with its own adapter_config.json"
            )


def _of_pattern(field: str, pattern: dict[str, int], name: str) -> int | None:
    """What the pattern says of a module; None if nothing.

    PEFT takes the first key that matches, but saves the keys in another order.
    """
    found = {key: value for key, value in pattern.items() if get_pattern_key([key], name) == key}
    if len(set(found.values())) > 1:
        raise LoraSVDError(f"{field}: {found} all match {name}, expected one value; write keys that do not overlap")
    return next(iter(found.values()), None)
