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

from ..allocation import LayerShape, check_size
from ..compact import ParameterReport
from ..compact.description import LoraSVDCompactConfig, kept_shapes
from ..compression import choose_size, factorize, given_size, size_choices
from ..config import LoraSVDConfig
from ..decompositions import DECOMPOSITIONS
from ..errors import LoraSVDError
from ..groups import describe_failing, usable_groups
from ..importance import IMPORTANCES
from ..inputs import CompressionSettings, LayerInput, layer_metrics, narrow_layers, units_of
from ..neurons import NeuronGroup
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
    through backwards as well, from the model's loss on ``ids``. Statistics go to files, then spectra, neurons, ranks
    and factors are computed layer by layer, or MLP by MLP, and the compact model is written shard by shard. It is the
    one that the same statistics give in memory. In memory at once: a block's weights and statistics, one sequence's
    activations in it, the float64 work on one layer or MLP; at the two ends embedding and head. On disk beside
    ``output``: the statistics of all layers and the hidden states of all tokens, before every block where there are
    gradients.

    A run that was killed goes on where it was, called again with the same arguments.

    Args:
        folder: with config.json and safetensors, in full precision.
        output: a folder that does not exist yet.
        ids: token ids, (samples, tokens), as from ``lora_svd.evaluation.token_blocks``, which puts the BOS token
            in front where the model expects it. Samples are read one by one.
        config: what applies without training: ``param_ratio``, ``importance``, ``allocation``, ``factor_format``,
            ``neurons``, ranks and widths, shrinkages, targets among the linear layers of the blocks, and
            ``statistics_limit``, which is that of one block. Presets of inputs alone count every token; their spectra
            are not in units of loss, so ``allocation="uniform"`` suits them.
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
    check_size(layers, config.param_ratio, config.factor_format, config.compact_ranks, config.compact_widths)
    work = target.with_name(f".{target.name}-stream")
    compact = _begin(work, source, ids, config)
    sketches = _sketches(checkpoint, shapes, statistics, config)
    seeks_groups = config.prices_neurons and config.neuron_groups is None
    observation = Observation(checkpoint, ids, layers, statistics, seeks_groups, sketches, work)
    observation.run()
    groups = _groups(observation, config)
    settings = CompressionSettings.of(config)
    inputs = {
        name: LayerInput(shape, partial(_weight, checkpoint, name), partial(observation.read, name))
        for name, shape in layers.items()
    }
    ranks, neurons = _size(work, units_of(inputs, groups), groups, settings, config)
    kept = narrow_layers(inputs, groups, neurons)
    write_shards(
        checkpoint,
        compact,
        config.factor_format,
        kept,
        lambda some: factorize(some, ranks, settings),
        lambda name: layer_metrics(name, kept[name], settings).definite,
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(compact)
    description = LoraSVDCompactConfig(
        ranks=ranks,
        shapes=kept_shapes(groups, inputs, kept),
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


def _groups(observation: Observation, config: LoraSVDConfig) -> dict[str, NeuronGroup]:
    """The layers that share neurons, by the one that takes them: found, or given; none if ranks alone are chosen."""
    found, failed = observation.groups()
    if failed:
        warnings.warn(describe_failing(failed), stacklevel=4)
    return usable_groups(config, observation.layers, found if config.neuron_groups is None else None)


def _size(
    work: Path,
    units: Mapping[str, Mapping[str, LayerInput]],
    groups: Mapping[str, NeuronGroup],
    settings: CompressionSettings,
    config: LoraSVDConfig,
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Ranks by layer and neurons by group that are kept: chosen, given, or in the folder of a run that is taken up."""
    file = work / "size.json"
    if not file.exists():
        if config.compact_ranks:
            given = config.compact_ranks, config.compact_widths or {}
            ranks, neurons = given_size(units, groups, *given, config.param_ratio, settings)
        else:
            found = choose_size(dict(size_choices(units, groups, settings)), config.param_ratio, settings)
            ranks, neurons = found.ranks, found.neurons
        said = {"ranks": ranks, "neurons": {name: index.tolist() for name, index in neurons.items()}}
        write_whole(json.dumps(said), file)
    said = json.loads(file.read_text(encoding="utf-8"))
    return said["ranks"], {name: torch.tensor(index) for name, index in said["neurons"].items()}
