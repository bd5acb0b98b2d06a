"""Rounding of a compact model to 4 bits; how they are stored is in :mod:`.bnb`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils.import_utils import is_bitsandbytes_available

from ..errors import LoraSVDError, in_module
from ..linalg import Metrics, metric_times
from .bnb import (
    BLOCK,
    empty_storage,
    full_precision,
    has_quantized_weight,
    levels_of,
    packed_layer,
    scale_of_each,
)
from .convert import dense_weight
from .layers import LowRankEmbedding, LowRankLinear, remember_shape
from .rounding import fit_scales, mix, refit_left, round_weight

PASSES = 3  # over both factors; the first takes most of what there is to gain


def check_quantization(config: BitsAndBytesConfig) -> None:
    """Raise unless ``config`` asks for 4 bits and bitsandbytes is there."""
    if not config.load_in_4bit:
        raise LoraSVDError(
            "quantization_config: got load_in_4bit=False, expected True, since a compact model is rounded to 4 bits "
            "only. Use BitsAndBytesConfig(load_in_4bit=True), or leave it out for factors in full precision"
        )
    if not is_bitsandbytes_available():
        raise LoraSVDError("quantization_config: needs bitsandbytes, which is not installed; pip install bitsandbytes")


@torch.inference_mode(False)  # or a LoRA on the factors could not be trained
@torch.no_grad()
def quantize_modules(
    model: PreTrainedModel, config: BitsAndBytesConfig, metrics: Callable[[str], Metrics] = lambda _: Metrics()
) -> None:
    """Round the linear layers of a compact model to 4 bits, in place; the output layer and embeddings stay.

    The ranks are mixed; then each factor in turn is refitted to the other one as it is rounded, and rounded itself,
    with error feedback (:mod:`.rounding`). Ranks are filled up to a multiple of 64, the block that the kernels
    of bitsandbytes need in a row; where that is no longer smaller than the product, the product is stored.

    Args:
        model: compact, with ``factor_format="factors"``.
        config: fp4 or nf4, double quantization and the type to compute in as the user wants.
        metrics: what an error of a module's weight costs, by its name; where the column metric E[x x^T] is missing or
            diagonal, there is nothing to feed back, and numbers are rounded to nearest.

    Raises:
        NumericalError: bitsandbytes does not return what was stored.
    """
    check_quantization(config)
    kept = set(get_keys_to_not_convert(model))
    low_rank = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    layers = {name: module for name, module in low_rank.items() if not isinstance(module, LowRankEmbedding)}
    factors = {id(factor) for module in low_rank.values() for factor in (module.left, module.right)}
    others = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear or has_quantized_weight(module)
        if name not in kept and id(module) not in factors
    }
    for name, module in tqdm({**layers, **others}.items(), desc="4 bits", leave=False, delay=2):
        with in_module(name):
            if isinstance(module, LowRankLinear):
                new = _quantize_factors(module, config, metrics(name))
            else:
                new = _quantized(full_precision(module).detach(), config, metrics(name).column, _bias(module))
        remember_shape(new, getattr(module, "dense_shape", None))
        model.set_submodule(name, new)


def _quantize_factors(module: LowRankLinear, config: BitsAndBytesConfig, metrics: Metrics) -> nn.Module:
    dtype, bias, padding = module.left.weight.dtype, _bias(module.left), -module.rank % BLOCK
    rank = module.rank + padding
    if rank * (module.in_features + module.out_features) >= module.in_features * module.out_features:
        weight = dense_weight(module).to(module.left.weight.device, dtype)
        return _quantized(weight, config, metrics.column, bias)
    left, right = (factor.weight.detach().cpu().double() for factor in (module.left, module.right))
    left, right = mix(nn.functional.pad(left, (0, padding)), nn.functional.pad(right, (0, 0, 0, padding)))
    device, refitted = module.left.weight.device, right
    for turn in range(PASSES):
        if turn:
            rounded_left = full_precision(module.left).cpu().double()
            refitted = refit_left(right.T, left.T, rounded_left.T, metrics.row).T
        module.right = _quantized(refitted.to(device, dtype), config, metrics.column, None)
        rounded = full_precision(module.right).cpu().double()
        gram = rounded @ metric_times(metrics.column, rounded.T)
        refitted_left = refit_left(left, right, rounded, metrics.column)
        module.left = _quantized(refitted_left.to(device, dtype), config, gram, bias)
    module.rank = rank
    return module


def _bias(linear: nn.Module) -> nn.Parameter | None:
    bias: Any = linear.bias
    return bias


def _quantized(weight: Tensor, config: BitsAndBytesConfig, metric: Tensor | None, bias: nn.Parameter | None) -> Any:
    """bitsandbytes' layer of a weight (out, in), rounded in the metric of its columns."""
    levels = levels_of(config)
    packed, state = empty_storage(weight.shape, fit_scales(weight.cpu(), levels, BLOCK).to(weight.dtype), config)
    scale = scale_of_each(state)
    codes = round_weight(weight.cpu(), scale, state.code, metric)
    return packed_layer(codes, packed, state, config, bias).to(weight.device)
