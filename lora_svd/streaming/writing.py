"""A compact checkpoint, written shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..compact import ParameterReport, parameter_report
from ..compact.card import compact_card
from ..compact.convert import compact_module, dense_module
from ..compact.description import LoraSVDCompactConfig
from ..compact.layers import put_low_rank_layers
from ..compact.saving import add_checksums
from ..decompositions import Factors
from ..errors import in_module
from ..inputs import LayerInput
from ..linalg import Metrics
from .cache import save_whole
from .checkpoint import Checkpoint

_COPIED = ("generation_config.json",)


def plan_shards(checkpoint: Checkpoint) -> list[list[str]]:
    """Names in the files, by shard: one for each block, and others of at most a block's size or of one tensor."""
    sizes, names = checkpoint.tensors.sizes(), {key: name for name, key in checkpoint.tensors.stored.items()}
    blocks: list[list[str]] = [[] for _ in checkpoint.blocks]
    rest: list[str] = []
    for key in sizes:
        index = checkpoint.block_of(names.get(key, ""))
        (rest if index is None else blocks[index]).append(key)
    most = max(sum(sizes[key] for key in block) for block in blocks)
    shards: list[list[str]] = []
    for key in rest:
        if not shards or sum(sizes[other] for other in shards[-1]) + sizes[key] > most:
            shards.append([])
        shards[-1].append(key)
    return shards + blocks


def write_shards(
    checkpoint: Checkpoint,
    folder: Path,
    factor_format: str,
    layers: Mapping[str, LayerInput],
    factorize: Callable[[Mapping[str, LayerInput]], Iterable[tuple[str, Factors | None]]],
    metrics: Callable[[str], Metrics],
) -> None:
    """Write the shards that are not in the folder yet, and the index.

    Args:
        layers: of what is kept of each.
        factorize: gives the factors of some layers; None where the weight stays as it is.
        metrics: says what an error in a layer costs.
    """
    shards, stored = plan_shards(checkpoint), checkpoint.tensors.stored
    weight_map, total = {}, 0
    for number, keys in enumerate(shards, start=1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        if not file.exists():
            tensors = {key: checkpoint.tensors.read_stored(key) for key in keys}
            here = {name: layer for name, layer in layers.items() if stored[f"{name}.weight"] in tensors}
            for name, factors in factorize(here):
                if factors is not None:
                    prefix = stored[f"{name}.weight"].removesuffix(".weight")
                    with in_module(name):
                        like = checkpoint.model.get_submodule(name)
                        _replace(tensors, prefix, like, factors, factor_format, partial(metrics, name))
            save_whole(tensors, file)
        with safe_open(file, framework="pt") as opened:
            weight_map |= dict.fromkeys(opened.keys(), file.name)
        total += file.stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _replace(
    tensors: dict[str, Tensor],
    prefix: str,
    like: nn.Module,
    factors: Factors,
    factor_format: str,
    metrics: Callable[[], Metrics],
) -> None:
    """The tensors of a linear layer by those of the one that takes its place. like: the layer, without its tensors."""
    weight, bias = tensors.pop(f"{prefix}.weight"), tensors.pop(f"{prefix}.bias", None)
    base = dense_module(weight.T if isinstance(like, Conv1D) else weight, like, bias)
    result = factors.product() if factors.is_full else factors
    module = compact_module(result, base, weight, factor_format, metrics, factors.rows)
    tensors |= {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def describe(checkpoint: Checkpoint, source: Path, folder: Path, config: LoraSVDCompactConfig) -> ParameterReport:
    """Write what belongs to the shards of a compact model: its config with checksums, and a card. Returns its size."""
    said = json.loads((source / "config.json").read_text(encoding="utf-8"))
    said["quantization_config"] = config.to_dict()
    (folder / "config.json").write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    add_checksums(folder)
    for path in (source / name for name in _COPIED):
        if path.exists():
            shutil.copy(path, folder)
    model: Any = checkpoint.model
    with torch.device("meta"):
        put_low_rank_layers(model, config.to_dict())
    model.config.quantization_config = config
    model.to(checkpoint.dtype).tie_weights()
    size = parameter_report(model)
    card = compact_card(size, str(source), folder, folder.name)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return size
