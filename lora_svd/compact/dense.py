"""A compact model as a dense one, for programs that know no low-rank layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import LoraSVDError
from .architecture import find_module
from .bnb import dtype_between, full_precision, has_quantized_weight, keep_unpacked
from .convert import dense_module, dense_weight
from .description import description_of
from .host import mark_quantized
from .layers import LowRankLinear, TiedHead
from .remote_code import MODULE


@torch.inference_mode(False)  # or the model could not be trained
@torch.no_grad()
def densify(model: PreTrainedModel) -> PreTrainedModel:
    """Put a dense layer in the place of every low-rank or quantized one, in place, and return the model.

    A weight is ``left right``, taken in float64 and rounded to the type of the factors, or dequantized. The model is
    then as large as the original, and what it saves is loaded without this package by whatever loads its architecture.

    Raises:
        LoraSVDError: the model is not a transformers model, or has adapters.
    """
    adapted = isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules())
    if adapted or not isinstance(model, PreTrainedModel):
        raise LoraSVDError(
            f"model: got {type(model).__name__}{' with adapters' if adapted else ''}, expected a transformers model "
            "without adapters; call merge_and_unload() first"
        )
    keep_unpacked(model)
    config: Any = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if f"{MODULE}." in str(getattr(config, "auto_map", "")):  # the code makes low-rank layers
        del config.auto_map
    names = {module: name for name, module in model.named_modules()}
    heads = {name: names[module.embedding] for module, name in names.items() if isinstance(module, TiedHead)}
    if heads:
        config.tie_word_embeddings = True
    with torch.device("meta"):
        plain = _architecture(model)(config)
    replaced = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear) or has_quantized_weight(module)
    }
    shapes = description.shapes if (description := description_of(model.config)) else {}
    replaced |= {name: module for saved, _ in shapes.items() for name, module in [find_module(model, saved)]}
    whole = {find_module(model, saved)[0]: shape for saved, shape in shapes.items()}
    factors = {f"{name}.{side}" for name in replaced for side in ("left", "right")}
    dtype = dtype_between(model.parameters())
    for name, module in replaced.items():
        if name not in factors:
            model.set_submodule(name, _dense(module, plain.get_submodule(name), dtype, whole.get(name)))
    for name, embedding in heads.items():
        head = cast(nn.Linear, plain.get_submodule(name))
        head.weight = cast(nn.Embedding, model.get_submodule(embedding)).weight
        model.set_submodule(name, head)
        model.all_tied_weights_keys = plain.all_tied_weights_keys
    model.__class__, model.config = type(plain), config
    mark_quantized(model, None)
    return model


def _architecture(model: PreTrainedModel) -> Any:
    """Its class; of a model that was loaded with the code in its folder, the one that this code extends."""
    given = type(model)
    return given.__base__ if given.__module__.endswith(f".{MODULE}") else given


def _dense(module: nn.Module, like: nn.Module, dtype: torch.dtype | None, shape: Mapping[str, Any] | None) -> nn.Module:
    """A module of the class of ``like`` with the weight, bias and device of ``module``, and its type.

    Args:
        dtype: of a weight that is quantized.
        shape: of a layer without some neurons, for which it has zeros then.
    """
    given: Any = module
    if isinstance(module, LowRankLinear):
        kept = None if has_quantized_weight(module.right) else module.right.weight.dtype
        weight = dense_weight(module).to(module.right.weight.device, kept or dtype)
    elif has_quantized_weight(module):
        weight = full_precision(module).to(dtype)
    else:
        weight = given.weight.T if isinstance(module, Conv1D) else given.weight
    bias = given.bias
    if shape is not None:
        weight = _with_zeros(weight, shape)
        bias = (
            _with_zeros(bias[:, None], {**shape, "dense": (shape["dense"][0], 1)})[:, 0] if bias is not None else None
        )
    return dense_module(weight, like, bias if isinstance(bias, Tensor) else None).train(module.training)


def _with_zeros(matrix: Tensor, shape: Mapping[str, Any]) -> Tensor:
    """A matrix with zeros behind the rows of every chunk and behind the columns."""
    (rows, columns), chunks = shape["dense"], shape["chunks"]
    whole = matrix.new_zeros(chunks, rows // chunks, columns)
    whole[:, : matrix.shape[0] // chunks, : matrix.shape[1]] = matrix.unflatten(0, (chunks, -1))
    return whole.flatten(0, 1)
