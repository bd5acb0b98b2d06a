"""How bypasses get into a model: which modules are targets, what is refused, and what an embedding is tied to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from ..compact import LowRankLinear
from ..compact.convert import is_plain_linear
from ..config import LoraSVDConfig
from ..errors import LoraSVDError
from ..statistics.shared import SharedGram
from .embedding import LoraSVDEmbedding, check_embedding, is_plain_embedding
from .layer import LoraSVDLinear
from .targets import check_modules_to_save, is_quantized_linear, patterns, warn_of_fused_weights

# Names of the heads that PEFT trains whole for a task, after the adapter is injected.
_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def check_model(model: nn.Module, config: LoraSVDConfig) -> None:
    """Raise if the model cannot take such an adapter; warn of weights that it leaves out."""
    if config.param_ratio < 1 and any(isinstance(module, LowRankLinear) for module in model.modules()):
        if config.inference_mode or config.compressed:
            raise LoraSVDError(
                f"adapter: got one of a dense model, made with param_ratio={config.param_ratio}, for a model that "
                "is compact already and contains it, expected the dense model or no adapter. transformers loads an "
                "adapter that it finds in the folder of a model: save the two to different folders"
            )
        raise LoraSVDError(
            f"param_ratio: got {config.param_ratio} for a model that is compact already, expected 1, which trains "
            "a LoRA on it. To make it smaller still, give lora_svd.compact.densify(model) to get_peft_model"
        )
    check_modules_to_save(model, config.modules_to_save or ())
    if not (config.inference_mode or config.compressed):
        warn_of_fused_weights(model)


def expand_all_linear(config: LoraSVDConfig, model: nn.Module) -> None:
    """Put names in the place of "all-linear": without the head, which PEFT trains whole, and of the layers that
    ``layers_to_transform`` chooses; PEFT would fail with the one and pass over the other without a word."""
    if str(config.target_modules).lower() != "all-linear":
        return
    _maybe_include_all_linear_layers(config, model)
    names = set(config.target_modules or ()).difference(_HEADS.get(config.task_type or "", ()))
    config.target_modules = names  # pyright: ignore[reportAttributeAccessIssue] - as in PEFT
    if config.layers_to_transform is None:
        return
    by_suffix = ((name, replace(config, target_modules=[name.rpartition(".")[2]])) for name in names)
    chosen = {name for name, of_suffix in by_suffix if check_target_module_exists(of_suffix, name)}
    if not chosen:
        raise LoraSVDError(
            f"layers_to_transform: got {config.layers_to_transform!r} with layers_pattern="
            f"{config.layers_pattern!r}, expected indices of layers that hold one of the {len(names)} linear "
            "modules; look at model.named_modules()"
        )
    config.target_modules = chosen  # pyright: ignore[reportAttributeAccessIssue] - as in PEFT


def adapted_layer(
    model: nn.Module,
    name: str,
    target: nn.Module,
    config: LoraSVDConfig,
    *,
    shared: SharedGram,
    aliases: Mapping[nn.Module, list[str]],
    **quantization: Any,
) -> LoraSVDLinear:
    """The layer with adapters that ``target`` is already, or that takes its place in the model.

    Args:
        aliases: the names of modules that have several, before any adapter was injected.

    Raises:
        TypeError: the target is of a kind that has no factors; the type is what PEFT's callers expect here.
        LoraSVDError: the target is another one's as well, or an embedding that cannot be looked up in factors.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if is_plain_embedding(base):
        check_embedding(name, base, config, tied_to(model, name, base, config))
    if isinstance(target, LoraSVDLinear):
        target.shared = shared
        return target
    if not (is_plain_embedding(base) or is_quantized_linear(base) or is_plain_linear(base)):
        names = {other: type(module) is type(base) for other, module in model.named_modules()}
        raise TypeError(
            f"target_modules: {name} is {type(base).__name__}, which is not supported; expected "
            "torch.nn.Linear, torch.nn.Embedding or transformers Conv1D, without a forward of its own, or a "
            "quantized linear layer. "
            f"Name others, or leave this kind out: exclude_modules={patterns(filter(names.get, names), names)}"
        )
    if names := aliases.get(target):
        raise LoraSVDError(
            f"target_modules: {names[0]} is the same module as {', '.join(names[1:])}, expected one name for each, "
            f"since a compact module would take the place of one only. Set exclude_modules={names}"
        )
    kind = LoraSVDEmbedding if is_plain_embedding(base) else LoraSVDLinear
    return kind(target, shared, **quantization)


def tied_to(model: nn.Module, name: str, base: nn.Module, config: LoraSVDConfig) -> dict[str, nn.Module]:
    """The modules that are tied to an embedding, without linear layers that get factors of their own."""
    names = {
        other.removesuffix(".weight").removesuffix(".base_layer")
        for other, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is base.weight
    }
    others = {other: model.get_submodule(other) for other in sorted(names - {name})}
    return {
        other: module
        for other, module in others.items()
        if isinstance(module, nn.Embedding | LoraSVDEmbedding) or not check_target_module_exists(config, other)
    }


def value_for(field: str, pattern: dict[str, int], name: str) -> int | None:
    """What a pattern says of a module; None if nothing.

    PEFT takes the first key that matches, but saves the keys in another order.
    """
    matching = {key: value for key, value in pattern.items() if get_pattern_key([key], name) == key}
    if len(set(matching.values())) > 1:
        raise LoraSVDError(f"{field}: {matching} all match {name}, expected one value; write keys that do not overlap")
    return next(iter(matching.values()), None)
