"""lora_svd: a smaller model for the cost of a LoRA fine-tune.

Importing this package registers the PEFT tuner and the loader of compact checkpoints; the names below are imported
from their modules when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from .registration import register

if TYPE_CHECKING:
    from .compact import densify, parameter_report, push_compact, save_compact
    from .config import LoraSVDConfig
    from .errors import LoraSVDError, NumericalError
    from .evaluation import perplexity, token_blocks
    from .generation import own_text
    from .streaming import compress_checkpoint
    from .tuner.callback import LoraSVDCallback, attach
    from .tuner.model import LoraSVDModel

__all__ = [
    "LoraSVDCallback",
    "LoraSVDConfig",
    "LoraSVDError",
    "LoraSVDModel",
    "NumericalError",
    "attach",
    "compress_checkpoint",
    "densify",
    "own_text",
    "parameter_report",
    "perplexity",
    "push_compact",
    "save_compact",
    "token_blocks",
]
_MODULES = {
    "compact": ("densify", "parameter_report", "push_compact", "save_compact"),
    "config": ("LoraSVDConfig",),
    "errors": ("LoraSVDError", "NumericalError"),
    "evaluation": ("perplexity", "token_blocks"),
    "generation": ("own_text",),
    "streaming": ("compress_checkpoint",),
    "tuner.callback": ("LoraSVDCallback", "attach"),
    "tuner.model": ("LoraSVDModel",),
}

register()


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{module}", __name__), name)


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
