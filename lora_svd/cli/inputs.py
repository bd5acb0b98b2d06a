"""Models, tokenizers and texts that commands read, and the device they compute on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import LoraSVDError
from .arguments import DTYPES


def load_model(
    name: str, dtype: str, device: torch.device, quantization_config: BitsAndBytesConfig | None = None
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and causal language model, dense or compact, from a local folder or the Hub.

    Raises:
        LoraSVDError: there is no such model, or it cannot be loaded.
    """
    if dtype not in DTYPES:
        raise LoraSVDError(f"dtype: unknown value {dtype!r}, expected one of {sorted(DTYPES)}")
    try:
        safe: Any = {"trust_remote_code": False}  # without it transformers asks, where there is a terminal
        tokenizer = AutoTokenizer.from_pretrained(name, **safe)
        # bitsandbytes quantizes where the weights are loaded to, and 8-bit models cannot be moved
        placed: Any = {"device_map": {"": device}, "quantization_config": quantization_config}
        options = placed if quantization_config else {}
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **safe, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise LoraSVDError(f"model: cannot load {name!r}: {error}") from error
    return tokenizer, model if quantization_config else model.to(device)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or of the Hub.

    Raises:
        LoraSVDError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise LoraSVDError(f"model: cannot load the tokenizer of {name!r}: {error}") from error


def bitsandbytes_config(quantization: str) -> BitsAndBytesConfig | None:
    """Settings of bitsandbytes for a name in ``QUANTIZATIONS``; None for "none"."""
    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_use_double_quant=True)


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is the accelerator if there is one, else the CPU.

    Raises:
        LoraSVDError: torch knows no such device, or finds none.
    """
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # torch raises the latter if it was built without CUDA
            raise LoraSVDError(f"device: cannot use {name!r}: {error}") from error
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def read_text(field: str, path: str) -> str:
    """A UTF-8 text file.

    Raises:
        LoraSVDError: it cannot be read; the message names the field.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoraSVDError(f"{field}: cannot read {path!r} as UTF-8 text: {error}") from error


@contextmanager
def about(path: str) -> Iterator[None]:
    """Put the file in front of an error in the ``with`` block, which is about it."""
    try:
        yield
    except LoraSVDError as error:
        raise type(error)(f"{path}: {error}") from error
