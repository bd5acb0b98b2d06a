"""``compress_checkpoint``: a folder in, a compact folder out, by the pipeline of :mod:`lora_svd.compression`."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..allocation import LayerShape, check_budget, given_ranks
from ..compact import ParameterReport
from ..compact.description import LoraSVDCompactConfig
from ..compression import CompressionSettings, LayerInput, choose_ranks, compute_spectra, factorize, layer_metrics
from ..config import LoraSVDConfig
from ..decompositions import DECOMPOSITIONS
from ..errors import LoraSVDError
from ..importance import IMPORTANCES
from ..statistics import STATISTICS
from ..statistics.limit import choose_sketches, describe_sketches
from .cache import write_whole
from .checkpoint import Checkpoint
from .observe import Observation
from .writing import describe, write_shards


@torch.no_grad()
def compress_checkpoint(
    folder: str | Path,
    output: str | Path,
    ids: Tensor,
    config: LoraSVDConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | str = "cpu",
) -> ParameterReport:
    """Compress a causal language model without training, with one decoder block of it in memory at a time.

    Hidden states go from block to block through files; where the importance looks at gradients, the blocks are gone
    through backwards as well, from the model's loss on ``ids``. Statistics go to files, then spectra, ranks and factors
    are computed layer by layer, and the compact model is written shard by shard. It is the one that the same statistics
    give in memory with ``neurons=False``: ranks alone are chosen. In memory at once: a block's weights and statistics,
    one sequence's activations in it, the float64 work on one layer; at the two ends embedding and head. On disk beside
    ``output``: the statistics of all layers and the hidden states of all tokens, before every block where there are
    gradients.

    A run that was killed goes on where it was, called again with the same arguments.

    Args:
        folder: with config.json and safetensors, in full precision.
        output: a folder that does not exist yet.
        ids: token ids, (samples, tokens), as from ``lora_svd.evaluation.token_blocks``, which puts the BOS token
            in front where the model expects it. Samples are read one by one.
        config: what applies without training: ``param_ratio``, ``importance``, ``allocation``, ``factor_format``,
            ranks, shrinkages, targets among the linear layers of the blocks, and ``statistics_limit``, which is that of
            one block. Presets of inputs alone count every token; their spectra are not in units of loss, so
            ``allocation="uniform"`` suits them.
        tokenizer: saved with the model.
        device: on which blocks run.

    Raises:
        LoraSVDError: the importance needs a LoRA that is trained, or the model or a folder is not one that can be
            streamed. The message says why.
    """
    source, target = Path(folder), Path(output).absolute()
    statistics = _statistics(config)
    if target.exists():
        raise LoraSVDError(f"output: {target} exists; name a folder that does not")
    if ids.dim() != 2 or len(ids) < 1 or ids.shape[1] < 2:
        raise LoraSVDError(f"ids: got shape {tuple(ids.shape)}, expected (samples, tokens), at least (1, 2)")
    checkpoint = Checkpoint(source, torch.device(device))
    shapes = checkpoint.layers(config)
    layers = {name: LayerShape(*shape) for name, shape in shapes.items()}
    check_budget(layers, config.param_ratio, config.factor_format)
    work = target.with_name(f".{target.name}-stream")
    compact = _begin(work, source, ids, config)
    sketches = _sketches(checkpoint, shapes, statistics, config)
    observation = Observation(checkpoint, ids, list(layers), statistics, sketches, work)
    observation.run()
    settings = CompressionSettings.of(config)
    inputs = {
        name: LayerInput(shape, partial(_weight, checkpoint, name), partial(observation.read, name))
        for name, shape in layers.items()
    }
    ranks = _ranks(work, inputs, layers, settings, config)
    write_shards(
        checkpoint,
        compact,
        config.factor_format,
        layers,
        lambda names: factorize({name: inputs[name] for name in names}, ranks, settings),
        lambda name: layer_metrics(name, inputs[name], settings).definite,
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(compact)
    description = LoraSVDCompactConfig(
        ranks=ranks,
        factor_format=config.factor_format,
        dense_parameters=sum(shape.parameters for shape in layers.values()),
        method={name: getattr(config, name) for name in ("importance", "allocation", "decomposition", "param_ratio")},
    )
    size = describe(checkpoint, source, compact, description)
    compact.rename(target)
    shutil.rmtree(work)
    return size


def _statistics(config: LoraSVDConfig) -> tuple[str, ...]:
    statistics = IMPORTANCES[config.importance].observed
    of_lora = {name for name, statistic in STATISTICS.items() if statistic.reads_bypass}
    possible = [name for name, preset in IMPORTANCES.items() if of_lora.isdisjoint(preset.observed)]
    if config.importance not in possible:
        raise LoraSVDError(
            f"importance: got {config.importance!r}, which looks at the gradients of a LoRA that is trained, and "
            f"streaming trains none; expected one of {possible}"
        )
    if not DECOMPOSITIONS[config.decomposition].is_low_rank:
        raise LoraSVDError(
            f"decomposition: got {config.decomposition!r}, expected a low-rank one: streaming writes no other; "
            "compress in memory with get_peft_model"
        )
    if config.param_ratio == 1:
        raise LoraSVDError("param_ratio: got 1, expected a smaller share; there is nothing to compress")
    return statistics


def _begin(work: Path, source: Path, ids: Tensor, config: LoraSVDConfig) -> Path:
    """The folder for the compact model, inside of one for the run, which may be taken up again."""
    compact, job = work / "compact", work / "job.json"
    files = {path.name: path.stat().st_size for path in sorted(source.glob("*.safetensors"))}
    chosen = json.dumps(config.to_dict(), sort_keys=True, default=sorted)
    digest = hashlib.sha256(chosen.encode() + ids.cpu().long().numpy().tobytes()).hexdigest()
    this = {"source": str(source.resolve()), "files": files, "config and ids": digest}
    if job.exists() and json.loads(job.read_text(encoding="utf-8")) != this:
        raise LoraSVDError(f"output: {work} is of a run with other arguments that did not end; repeat it, or delete it")
    compact.mkdir(parents=True, exist_ok=True)
    write_whole(json.dumps(this), job)
    return compact


def _sketches(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, int]], statistics: tuple[str, ...], config: LoraSVDConfig
) -> dict[str, dict[str, int]]:
    """Of each block, whose statistics are in memory together."""
    found: dict[str, dict[str, int]] = {}
    for index in range(len(checkpoint.blocks)):
        of_block = {name: shape for name, shape in shapes.items() if checkpoint.block_of(name) == index}
        found |= choose_sketches(of_block, statistics, config.statistics_limit)
    if found:
        warnings.warn(describe_sketches(shapes, found, config.statistics_limit), stacklevel=3)
    return found


def _weight(checkpoint: Checkpoint, name: str) -> Tensor:
    return checkpoint.linear_weight(name).double()


def _ranks(
    work: Path,
    inputs: Mapping[str, LayerInput],
    layers: Mapping[str, LayerShape],
    settings: CompressionSettings,
    config: LoraSVDConfig,
) -> dict[str, int]:
    """Chosen from the spectra, or given; those of a run that is taken up stand in its folder."""
    if config.compact_ranks:
        return given_ranks(config.compact_ranks, layers, config.param_ratio, config.factor_format)
    file = work / "ranks.json"
    if not file.exists():
        chosen = choose_ranks(inputs, compute_spectra(inputs, settings), config.param_ratio, settings)
        write_whole(json.dumps(chosen), file)
    return json.loads(file.read_text(encoding="utf-8"))
