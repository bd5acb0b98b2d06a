"""Models, tokenizers and texts that commands read, the device they compute on and its memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..config import LoraSVDConfig
from ..errors import LoraSVDError
from ..evaluation import text_tokens
from .arguments import DTYPES

_NO_CODE: Any = {"trust_remote_code": False}  # without it transformers asks, where there is a terminal
# Tokens held out of a text, in windows of the evaluation: few cost accuracy, many cost time.
_FEWEST_WINDOWS, _MOST_WINDOWS = 2, 32
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def load_model(
    name: str, dtype: str, device: torch.device, quantization_config: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """A causal language model, dense or compact, from a local folder or the Hub.

    Raises:
        LoraSVDError: there is no such model, or it cannot be loaded.
    """
    if dtype not in DTYPES:
        raise LoraSVDError(f"dtype: unknown value {dtype!r}, expected one of {sorted(DTYPES)}")
    try:
        # bitsandbytes quantizes where the weights are loaded to, and 8-bit models cannot be moved
        placed: Any = {"device_map": {"": device}, "quantization_config": quantization_config}
        options = placed if quantization_config else {}
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **_NO_CODE, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise LoraSVDError(f"model: cannot load {name!r}: {error}") from error
    return model if quantization_config else model.to(device)


def load_config(name: str, dtype: str) -> tuple[PreTrainedConfig, torch.dtype]:
    """The configuration of a model, and the type that its weights are loaded in.

    Raises:
        LoraSVDError: there is no such model.
    """
    try:
        config: Any = AutoConfig.from_pretrained(name, **_NO_CODE)
    except (OSError, ValueError) as error:
        raise LoraSVDError(f"model: cannot load {name!r}: {error}") from error
    return config, getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32


def adapted(model: PreTrainedModel, config: LoraSVDConfig) -> PeftModel | PeftMixedModel:
    """The model with a LoraSVD adapter in it.

    Raises:
        LoraSVDError: PEFT or the tuner refuses the configuration.
    """
    try:
        return get_peft_model(model, config)
    except (ValueError, TypeError) as error:  # how PEFT refuses a configuration, LoraSVDError included
        raise LoraSVDError(str(error)) from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or of the Hub.

    Raises:
        LoraSVDError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name, **_NO_CODE)
    except (OSError, ValueError) as error:
        raise LoraSVDError(f"model: cannot load {name!r}, its tokenizer: {error}") from error


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


def device_memory(device: torch.device) -> int | None:
    """Bytes that a run can take: what is free on a CUDA device, all that the machine or its container has for the CPU,
    where what is free would not count the caches that the system gives up. None: the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CONTAINER_LIMIT.read_text(encoding="ascii").strip() if _CONTAINER_LIMIT.is_file() else ""
    return min(physical, int(limit)) if limit.isdigit() else physical


def read_text(field: str, path: str) -> str:
    """A UTF-8 text file.

    Raises:
        LoraSVDError: it cannot be read; the message names the field.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoraSVDError(f"{field}: cannot read {path!r} as UTF-8 text: {error}") from error


def write_text(field: str, path: Path, text: str) -> None:
    """Write a UTF-8 text file, whose folder is made.

    Raises:
        LoraSVDError: it cannot be written; the message names the field that chose the place.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LoraSVDError(f"{field}: cannot write {str(path)!r}: {error}") from error


def hold_out(text: str, tokenizer: PreTrainedTokenizerBase, window: int) -> tuple[str, str]:
    """A text without its end, and the end, to be evaluated on: a tenth of the tokens, but 2 windows at least and 32 at
    most.

    Raises:
        LoraSVDError: that would be more than half of the text.
    """
    tokens = len(text_tokens(tokenizer, text))
    held_out = min(max(tokens // 10, _FEWEST_WINDOWS * window), _MOST_WINDOWS * window)
    if 2 * held_out > tokens:
        raise LoraSVDError(
            f"eval_text: none given, and {tokens:,} tokens are too few to hold out {held_out:,} of them, "
            f"{_FEWEST_WINDOWS} times `window`: give --eval_text FILE, more text or a smaller --window"
        )
    end = len(text) - round(len(text) * held_out / tokens)
    return text[:end], text[end:]


@contextmanager
def about(path: str) -> Iterator[None]:
    """Put the file in front of an error in the ``with`` block, which is about it."""
    try:
        yield
    except LoraSVDError as error:
        raise type(error)(f"{path}: {error}") from error
