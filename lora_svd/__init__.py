"""lora_svd: a smaller model for the cost of a LoRA fine-tune.

Importing this package registers the PEFT tuner and the loader of compact checkpoints.
"""

from .config import LoraSVDConfig
from .errors import LoraSVDError, NumericalError
from .model import LoraSVDModel
from .registration import register
from .training import LoraSVDCallback

register()

__version__ = "0.1.0"
__all__ = ["LoraSVDCallback", "LoraSVDConfig", "LoraSVDError", "LoraSVDModel", "NumericalError"]
