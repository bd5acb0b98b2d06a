"""Loading of compact models through transformers' own ``from_pretrained``, and what they say about themselves.

The ranks stand in ``config.json`` as a quantization config of the method "lora_svd", whose quantizer gives the empty
model its low-rank layers before the weights are read. Afterwards the model is a plain one. A reader without this
package makes dense layers, whose ``weight`` has another shape than the marker in the checkpoint: it fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

from ..errors import LoraSVDError
from .architecture import find_module, put_empty_layers, spellings
from .bnb import empty_quantized, inner_quantizer, keep_unpacked, quantized_names
from .checks import check_tensors, saved_shapes
from .description import LoraSVDCompactConfig
from .host import mark_quantized
from .layers import LowRankLinear, expose_output, mark_loaded, remember_shape


class LoraSVDCompactQuantizer(HfQuantizer):
    """Builds the low-rank layers of a compact checkpoint; loads nothing but tensors.

    Weights that are quantized are left to transformers' quantizer of bitsandbytes.
    """

    requires_calibration = True  # refuses to be asked for on a dense checkpoint
    quantization_config: LoraSVDCompactConfig

    def __init__(self, quantization_config: LoraSVDCompactConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        given = quantization_config.bitsandbytes
        self._inner = inner_quantizer(given) if given else None
        if self._inner is not None:
            self.serialized_names = self._inner.serialized_names

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self._inner is not None:
            self._inner.validate_environment(*args, **kwargs)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return self._inner is not None and self._inner.param_needs_quantization(model, param_name, **kwargs)

    @property
    def quantized_element_size(self) -> float | None:
        return None if self._inner is None else self._inner.quantized_element_size

    def get_load_operations(self) -> dict[str, Any]:
        return {} if self._inner is None else self._inner.get_load_operations()

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        config = self.quantization_config
        packed = {f"{name}.weight" for name in config.quantized}
        shapes = saved_shapes(checkpoint_files or [], model.name_or_path, config.checksums)
        prefix = model.base_model_prefix + "."
        plain = {key: shape for key, shape in shapes.items() if key not in packed}
        _check_ranks(config, plain, prefix)
        # What is stored dense may be for a head of another size.
        put_empty_layers(model, config, {name for name in config.ranks if len(plain.get(f"{name}.weight", ())) == 2})
        for saved_name in config.quantized:
            name, linear = find_module(model, saved_name)
            if isinstance(linear, nn.Linear | Conv1D):
                new = empty_quantized(linear, cast(Any, self._inner).quantization_config)
                remember_shape(new, getattr(linear, "dense_shape", None))
                model.set_submodule(name, new)
        if checkpoint_files:
            mark_loaded(model, missing=check_tensors(model, shapes, packed))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        # Without quantized weights nothing is: casting, training and PEFT treat the model like any other.
        mark_quantized(model, None if self._inner is None else self)
        keep_unpacked(model)
        expose_output(model)
        model.config.quantization_config.checksums = {}  # of files that were read; the model may now change
        vars(model.config).pop("model_file", None)  # for mlx-lm, beside the files that were read
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _check_ranks(config: LoraSVDCompactConfig, shapes: Mapping[str, list[int]], prefix: str) -> None:
    """Raise if a saved tensor contradicts ``ranks``; names that transformers changes on saving are left to it."""
    marked = {key.removesuffix(".weight") for key, shape in shapes.items() if key.endswith(".weight") and shape == [1]}
    named = {spelling: rank for name, rank in config.ranks.items() for spelling in spellings(name, prefix)}
    splits = {spelling: split for name, split in config.splits.items() for spelling in spellings(name, prefix)}
    saved = {
        name: shapes[left][1] // splits.get(name, (0, 1))[1]
        for name in marked
        if (left := f"{name}.left.weight") in shapes
    }
    saved |= {name: min(shape) for name in named if len(shape := shapes.get(f"{name}.weight", [])) == 2}
    for name, rank in saved.items():
        if named.get(name, rank) != rank:
            raise LoraSVDError(
                f"{name}: the tensors of this compact checkpoint have rank {rank}, its config.json says {named[name]}; "
                "restore the config.json that was saved with them. If the model was made by its class from a compact "
                "config, it is dense: del model.config.quantization_config; from_config makes a low-rank one"
            )


def describe_compact(model: nn.Module, config: LoraSVDCompactConfig, quantization: Any = None) -> None:
    """Make a model with low-rank layers plain and self-describing: trainable, its ranks in ``model.config``.

    Args:
        model: with low-rank layers and no tuner's.
        config: what it says about itself, with full ranks; those of low-rank layers and what is said of quantized
            weights are filled in.
        quantization: the ``BitsAndBytesConfig`` of the weights that are quantized, if some are.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    if not isinstance(model, PreTrainedModel):
        return
    if config.tied_parameters or config.tied:
        # Some configs (T5) read False as something else and tie anyway; the loader unties by the names in ranks.
        untied = {**model.config.to_dict(), "tie_word_embeddings": False}
        model.config.tie_word_embeddings = type(model.config).from_dict(untied).tie_word_embeddings
    for name in config.ranks:
        module = model.get_submodule(name)
        if isinstance(module, LowRankLinear):
            config.ranks[name] = module.rank
            if module.split is not None:
                config.splits[name] = list(module.split)
    config.quantized = quantized_names(model)
    if config.quantized:
        config.bitsandbytes = quantization if isinstance(quantization, dict) else quantization.to_dict()
    mark_quantized(model, LoraSVDCompactQuantizer(config) if config.quantized else None)
    keep_unpacked(model)
    expose_output(model)
    model.config.quantization_config = config
