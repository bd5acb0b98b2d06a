"""Registration with PEFT and transformers, through tables that are not part of their public interface."""

from typing import Any

from peft import mapping
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from .compact.description import LoraSVDCompactConfig
from .compact.loader import LoraSVDCompactQuantizer
from .compact.patches import patch_models
from .config import LORA_SVD, PREFIX, LoraSVDConfig
from .errors import LoraSVDError
from .tuner.model import LoraSVDModel


def register() -> None:
    """Enter the tuner and the compact loader into the tables of PEFT and transformers. Safe to call again.

    Raises:
        LoraSVDError: another package has taken the name.
    """
    entries: Any = (
        # The tables are changed in place, since PEFT's modules imported them by reference.
        (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, LORA_SVD, LoraSVDConfig),
        (mapping.PEFT_TYPE_TO_TUNER_MAPPING, LORA_SVD, LoraSVDModel),
        (mapping.PEFT_TYPE_TO_PREFIX_MAPPING, LORA_SVD, PREFIX),
        (AUTO_QUANTIZATION_CONFIG_MAPPING, "lora_svd", LoraSVDCompactConfig),
        (AUTO_QUANTIZER_MAPPING, "lora_svd", LoraSVDCompactQuantizer),
    )
    for table, key, value in entries:
        if table.setdefault(key, value) is not value:
            raise LoraSVDError(
                f"{key}: {table[key]} has registered this name before; import only one of the two packages"
            )
    patch_models()
