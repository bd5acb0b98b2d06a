"""Weights that bitsandbytes stores in 4 or 8 bits: read, counted, made and packed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import dequantize_bnb_weight, replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from ..errors import NumericalError

BLOCK = 64  # numbers with one scale
_LARGEST_ERROR = 0.05  # of what is read back, relative: wide of rounding, and far below what a wrong row gives


def is_quantized(weight: object) -> bool:
    """Whether a parameter is one of bitsandbytes'."""
    return type(weight).__name__ in ("Params4bit", "Int8Params")


def has_quantized_weight(module: nn.Module) -> bool:
    """Whether a module's weight is one of bitsandbytes'."""
    return is_quantized(module._parameters.get("weight"))


def dtype_between(parameters: Iterable[nn.Parameter]) -> torch.dtype | None:
    """Type of what flows between the layers of a model: that of its tensors which are not quantized. None: all are.

    A quantized layer takes and returns any type, whatever its weight is dequantized to.
    """
    return next((p.dtype for p in parameters if p.is_floating_point() and not is_quantized(p)), None)


def full_precision(linear: nn.Module) -> Tensor:
    """The weight of a linear layer, (out, in), dequantized if need be."""
    given: Any = linear
    if not is_quantized(given.weight):
        return given.weight
    return dequantize_bnb_weight(given.weight, getattr(given, "state", None))


def num_parameters(weight: Tensor) -> int:
    """Numbers that a weight stands for; a 4-bit one holds two in a byte."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else torch.Size(state.shape).numel()


def num_bytes(weight: Tensor) -> int:
    """Bytes of a weight, with the scales of a quantized one."""
    state = getattr(weight, "quant_state", None)
    parts = [weight, *([] if state is None else state.as_dict(packed=True).values())]
    scales = (
        4 * len(weight) if type(weight).__name__ == "Int8Params" else 0
    )  # one a row; their attribute comes and goes
    return scales + sum(part.numel() * part.element_size() for part in parts)


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
    return [name for name, module in model.named_modules() if has_quantized_weight(module)]


def levels_of(config: BitsAndBytesConfig) -> Tensor:
    """The 16 levels of a unit scale, (16,), in the order of their codes."""
    functional: Any = import_module("bitsandbytes").functional
    return functional.get_4bit_type(config.bnb_4bit_quant_type, device="cpu", blocksize=BLOCK)


def empty_storage(shape: torch.Size, scales: Tensor, config: BitsAndBytesConfig) -> tuple[Tensor, Any]:
    """Packed codes of a weight (out, in), still to be written, and their state, with these scales of its blocks.

    bitsandbytes takes a block's largest number for its scale: it gets the scales as the only numbers.
    """
    largest = torch.zeros(shape.numel(), dtype=scales.dtype)
    largest[::BLOCK] = scales
    return import_module("bitsandbytes").functional.quantize_4bit(
        largest.view(shape),
        blocksize=BLOCK,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
    )


def scale_of_each(state: Any) -> Tensor:
    """The scale of every number of a weight, (out, in), as dequantization uses it."""
    absmax = state.absmax
    if state.nested:
        absmax = import_module("bitsandbytes").functional.dequantize_blockwise(absmax, state.state2) + state.offset
    shape = torch.Size(state.shape)
    return absmax.float().repeat_interleave(state.blocksize)[: shape.numel()].view(shape)


def packed_layer(codes: Tensor, packed: Tensor, state: Any, config: BitsAndBytesConfig, bias: Any) -> nn.Module:
    """bitsandbytes' layer of codes (out, in), int64, which are written into ``packed``, on the CPU.

    Raises:
        NumericalError: bitsandbytes does not return what was stored: 0.50 reads rows that are no multiple of its block
            wrongly on some CPUs.
    """
    flat = nn.functional.pad(codes.flatten(), (0, codes.numel() % 2)).to(torch.uint8)
    packed.view(torch.uint8).flatten()[: len(flat) // 2] = flat[::2] << 4 | flat[1::2]
    with torch.device("meta"):
        linear = nn.Linear(*reversed(codes.shape), bias=bias is not None)
    layer: Any = empty_quantized(linear, config)
    layer.weight = import_module("bitsandbytes").nn.Params4bit(
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
    found, expected = full_precision(layer).float(), scale_of_each(state) * state.code[codes]
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    if not error < _LARGEST_ERROR:
        raise NumericalError(
            f"a weight of {tuple(expected.shape)} that bitsandbytes stores in 4 bits comes back with a relative error "
            f"of {error:.2f}, expected 0. Leave the module out, or use factors in full precision"
        )
    return layer
