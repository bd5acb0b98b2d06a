"""A model file beside the tensors, with which mlx-lm loads a compact model without this package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from ..errors import LoraSVDError
from .description import LoraSVDCompactConfig

MODEL_FILE = "mlx_model.py"


def write_mlx(model: PreTrainedModel, folder: Path) -> None:
    """Add ``mlx_model.py`` to a folder that ``save_pretrained`` has written, and name it in config.json.

    Raises:
        LoraSVDError: the model is not compact, is in 4 or 8 bits, is made of Kronecker products, or has experts.
    """
    described = getattr(model.config, "quantization_config", None)
    if not isinstance(described, LoraSVDCompactConfig):
        raise LoraSVDError("mlx: got a model that is not compact, expected a compact one; mlx-lm loads it as it is")
    reason = None
    if described.quantized:
        reason = f"{described.quantized[0]} in 4 or 8 bits"
    elif described.splits:
        reason = f"{next(iter(described.splits))} as Kronecker products"
    elif experts := [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "expert" in name]:
        reason = f"a mixture of experts, {experts[0]}"
    if reason is not None:
        raise LoraSVDError(
            f"mlx: got a model with {reason}, expected low-rank layers in full precision; leave mlx out, or make the "
            "model dense: lora_svd.compact.densify(model)"
        )
    shutil.copyfile(Path(__file__).with_name(MODEL_FILE), folder / MODEL_FILE)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model_file"] = MODEL_FILE
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
