"""Compact models whose factors are stored in 4 or 8 bits by bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.utils.import_utils import is_bitsandbytes_available

from ..errors import LoraSVDError, NumericalError, in_module
from ..linalg import Metrics, metric_times
from ..rounding import fit_scales, mix, refit_left, round_weight
from .low_rank import dense_weight
from .standalone import LowRankEmbedding, LowRankLinear
from .stored import full_precision, is_quantized

BLOCK = 64  # numbers with one scale
PASSES = 3  # over both factors; the first takes most of what there is to gain


def keep_unpacked(model: nn.Module) -> list[nn.Module]:
    """Stop bitsandbytes from repacking 4-bit weights, undo it where it has happened, and return the layers concerned.

    On a CPU with AVX512-BF16 an evaluation pass repacks the weights for good. From then on dequantization gives other
    numbers, training loses the gradients of the inputs, and sizes that are no multiple of 64 fail.
    """
    layers = [layer for layer in model.modules() if getattr(layer, "support_avx512bf16_for_cpu", False)]
    for layer in layers:
        setattr(layer, "support_avx512bf16_for_cpu", False)  # noqa: B010 - for the type checker
        layer.state_dict()  # unpacks in place
    return layers


def inner_quantizer(config: Mapping[str, Any]) -> HfQuantizer:
    """transformers' own quantizer of a ``BitsAndBytesConfig.to_dict()``, for weights that are quantized already."""
    given: Any = BitsAndBytesConfig.from_dict(dict(config))
    kind: Any = Bnb4BitHfQuantizer if given.load_in_4bit else Bnb8BitHfQuantizer
    return kind(given, pre_quantized=True)


def empty_quantized(linear: nn.Module, config: BitsAndBytesConfig) -> nn.Module:
    """bitsandbytes' layer of the shape of ``linear``, without weights."""
    holder = nn.ModuleDict({"linear": linear})
    return replace_with_bnb_linear(holder, quantization_config=config, pre_quantized=True)["linear"]  # pyright: ignore[reportIndexIssue]


def quantized_names(model: nn.Module) -> list[str]:
    """The modules whose weight is one of bitsandbytes'."""
    return [name for name, module in model.named_modules() if is_quantized(getattr(module, "weight", None))]


def check_quantization(config: BitsAndBytesConfig) -> None:
    """Raise unless ``config`` asks for 4 bits and bitsandbytes is there."""
    if not config.load_in_4bit:
        raise LoraSVDError(
            "quantization_config: got load_in_4bit=False, expected True, since a compact model is rounded to 4 bits "
            "only. Use BitsAndBytesConfig(load_in_4bit=True), or leave it out for factors in full precision"
        )
    if not is_bitsandbytes_available():
        raise LoraSVDError("quantization_config: needs bitsandbytes, which is not installed; pip install bitsandbytes")


def quantize_modules(
    model: PreTrainedModel, config: BitsAndBytesConfig, metrics: Callable[[str], Metrics] = lambda _: Metrics()
) -> None:
    """Round the linear layers of a compact model to 4 bits, in place; the output layer and embeddings stay.

    The ranks are mixed; then each factor in turn is refitted to the other one as it is rounded, and rounded itself,
    with error feedback (:mod:`lora_svd.rounding`). Ranks are filled up to a multiple of 64, the block that the kernels
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
        if type(module) is nn.Linear or is_quantized(getattr(module, "weight", None))
        if name not in kept and id(module) not in factors
    }
    for name, module in tqdm({**layers, **others}.items(), desc="4 bits", leave=False, delay=2):
        with in_module(name):
            if isinstance(module, LowRankLinear):
                new = _quantize_factors(module, config, metrics(name))
            else:
                new = _quantized(full_precision(module).detach(), config, metrics(name).column, _bias(module))
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
    bitsandbytes: Any = import_module("bitsandbytes")
    out_features, in_features = weight.shape
    with torch.device("meta"):
        linear = nn.Linear(in_features, out_features, bias=bias is not None)
    layer: Any = empty_quantized(linear, config)
    device, weight = weight.device, weight.cpu()
    levels = bitsandbytes.functional.get_4bit_type(config.bnb_4bit_quant_type, device="cpu", blocksize=BLOCK)
    # bitsandbytes takes a block's largest number for its scale: it gets the scales that fit as the only numbers.
    largest = torch.zeros(weight.numel(), dtype=weight.dtype)
    largest[::BLOCK] = fit_scales(weight, levels, BLOCK).to(weight.dtype)
    packed, state = bitsandbytes.functional.quantize_4bit(
        largest.view(weight.shape),
        blocksize=BLOCK,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
    )
    scale = _scales(state)
    codes = round_weight(weight, scale, state.code, metric)
    flat = nn.functional.pad(codes.flatten(), (0, codes.numel() % 2)).to(torch.uint8)
    packed.view(torch.uint8).flatten()[: len(flat) // 2] = flat[::2] << 4 | flat[1::2]
    layer.weight = bitsandbytes.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
        bnb_quantized=True,
        module=layer,
    )
    layer.quant_state, layer.bias = state, bias
    keep_unpacked(layer)
    layer.to(device)
    _check_stored(layer, scale * state.code.cpu()[codes])
    return layer


def _check_stored(layer: nn.Module, expected: Tensor) -> None:
    """bitsandbytes 0.50 reads rows that are no multiple of its block wrongly on some CPUs."""
    found = full_precision(layer).detach().cpu().float()
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    if not error < 0.05:
        raise NumericalError(
            f"a weight of {tuple(expected.shape)} that bitsandbytes stores in 4 bits comes back with a relative error "
            f"of {error:.2f}, expected 0. Leave the module out, or use factors in full precision"
        )


def _scales(state: Any) -> Tensor:
    """The scale of every number of a weight, (out, in), as dequantization uses it."""
    absmax = state.absmax
    if state.nested:
        absmax = import_module("bitsandbytes").functional.dequantize_blockwise(absmax, state.state2) + state.offset
    shape = torch.Size(state.shape)
    return absmax.float().repeat_interleave(state.blocksize)[: shape.numel()].view(shape)
