"""Code beside the tensors, for people without this package: ``from_pretrained(folder, trust_remote_code=True)``."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from string import Template
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from ..errors import LoraSVDError
from . import layers as standalone
from .description import LoraSVDCompactConfig

MODULE = "modeling_compact"
_CLASS = Template('''

try:  # where the package is installed, its functions should know the layers
    from lora_svd.compact import LowRankEmbedding, LowRankLinear, TiedHead
except ImportError:
    pass


class Compact$base(transformers.$base):
    """$base with low-rank layers at the ranks of its config."""

    _auto_class = "$auto"

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        description = config.quantization_config
        put_low_rank_layers(self, description if isinstance(description, dict) else description.to_dict())

    def get_output_embeddings(self):
        head = super().get_output_embeddings()
        if isinstance(head, LowRankLinear) and not head.right.weight.is_meta:
            head.become_output()  # for losses that read its weight
        return head
''')


def write_code(model: PreTrainedModel, folder: Path) -> None:
    """Add a module with the model's class to a folder that ``save_pretrained`` has written, and name it in config.json.

    Raises:
        LoraSVDError: the model is not compact, is in 4 bits, or has a class that no auto class of transformers knows.
    """
    described, base = getattr(model.config, "quantization_config", None), type(model)
    if not isinstance(described, LoraSVDCompactConfig) or described.quantized:
        kind = "a model in 4 or 8 bits" if isinstance(described, LoraSVDCompactConfig) else "one that is not compact"
        raise LoraSVDError(f"self_contained: got {kind}, expected a compact model in full precision; leave it out")
    autos = auto_classes(model)
    if getattr(transformers, base.__name__, None) is not base or not autos:
        raise LoraSVDError(
            f"self_contained: got {base.__name__}, expected a class of transformers with an auto class; leave it out"
        )
    source = inspect.getsource(standalone).replace("import torch\n", "import torch\nimport transformers\n", 1)
    code = source + _CLASS.substitute(base=base.__name__, auto=autos[0])
    (folder / f"{MODULE}.py").write_text(code, encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = dict.fromkeys(autos, f"{MODULE}.Compact{base.__name__}")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def auto_classes(model: PreTrainedModel) -> list[str]:
    """Names of the auto classes of transformers that make models of this class, the one to load it with first."""
    found = [name for name, auto in vars(modeling_auto).items() if _maps(auto, model)]
    return sorted(found, key=lambda name: name == "AutoModelForPreTraining")


def _maps(auto: Any, model: PreTrainedModel) -> bool:
    """Whether an auto class makes models of this class from configs like its own."""
    mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
    if mapping is None or type(model.config) not in mapping:
        return False
    found = mapping[type(model.config)]
    return type(model) in (found if isinstance(found, tuple) else (found,))
