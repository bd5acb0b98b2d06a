"""The compact modules that an adapter's layers become, and what a 4-bit export asks for."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig

from ..compact.bnb import BLOCK, dtype_between, num_bytes
from ..compact.convert import compact_module
from ..compact.description import LoraSVDCompactConfig, kept_shapes
from ..compact.layers import layer_features, remember_shape
from ..compact.quantized import check_quantization
from ..compression import absorb
from ..config import PREFIX, LoraSVDConfig
from ..decompositions import DECOMPOSITIONS, Factors
from ..errors import LoraSVDError, NumericalError, in_module
from ..inputs import CompressionSettings, LayerInput, layer_metrics
from ..linalg import Metrics
from .layer import LoraSVDLinear
from .run import NOBODY_STEPS, STEP_IT, AdapterRun


@dataclass(frozen=True)
class Export:
    """What a merge puts into the model.

    Attributes:
        modules: plain compact modules by name.
        description: what the compact model says about itself; its ``tied`` heads are still to be named.
        inputs: of the pipeline, by layer, of what is kept, for metrics.
        settings: of the compression.
        bytes_before: of the weights that are replaced.
    """

    modules: dict[str, nn.Module]
    description: LoraSVDCompactConfig
    inputs: dict[str, LayerInput]
    settings: CompressionSettings
    bytes_before: int

    def metrics(self, name: str) -> Metrics:
        """Metrics of a layer that was observed; none of another one."""
        return definite_metrics(name, self.inputs[name], self.settings) if name in self.inputs else Metrics()


def export(run: AdapterRun) -> Export:
    """Compute the compact module of every layer of an adapter; the model itself is not changed.

    If training ended before the schedule did, the compression is finished first, with a warning.

    Raises:
        NumericalError: a bypass has non-finite values, or a weight cannot be factorized.
    """
    check_unmerged(run.layers)
    for name, adapter in run.adapters().items():
        if not torch.isfinite(adapter.bypass.product()).all():
            raise NumericalError(f"{name}: the LoRA bypass has non-finite values; go back to an earlier checkpoint")
    inputs, config, settings = run.inputs(), run.config, run.settings
    if not run.fits(config.param_ratio):
        now = f"compressing to param_ratio={config.param_ratio} now, without recovery"
        if run.missed_steps:
            warnings.warn(f"{NOBODY_STEPS}: {now}. {STEP_IT}", stacklevel=4)
        elif config.compressed or run.was_observed:
            mend = "Train longer, or lower warmup and compression"
            warnings.warn(f"training ended before the schedule did: {now}. {mend}", stacklevel=4)
        run.apply(run.compressed_to(config.param_ratio, inputs, chosen=run.chosen_size))
    layers, kept = run.layers, run.kept_inputs(inputs)
    dtype = dtype_between(p for name, p in run.model.named_parameters() if PREFIX not in name)
    bar = tqdm(layers.items(), desc="merge", unit="layer", leave=False, delay=2)
    modules = {name: _module(name, run, layer, kept[name], settings, dtype) for name, layer in bar}
    description = LoraSVDCompactConfig(
        ranks={name: min(layer_features(module)) for name, module in modules.items()},
        shapes=kept_shapes(run.groups, inputs, kept),
        factor_format=config.factor_format,
        dense_parameters=sum(given.shape.parameters for given in inputs.values()),
        method={
            name: getattr(config, name)
            for name in ("importance", "allocation", "decomposition", "compensation", "param_ratio")
        },
    )
    return Export(modules, description, kept, settings, sum(layer.weight_bytes() for layer in layers.values()))


def _module(
    name: str,
    run: AdapterRun,
    layer: LoraSVDLinear,
    given: LayerInput,
    settings: CompressionSettings,
    dtype: torch.dtype | None,
) -> nn.Module:
    adapter = layer.adapter(run.name)
    factors = None if adapter.factors is None else adapter.factors.value()
    return compact_layer(name, layer, given, factors, adapter.bypass, settings, dtype)


def compact_layer(
    name: str,
    layer: LoraSVDLinear,
    given: LayerInput,
    factors: Factors | None,
    bypass: Factors,
    settings: CompressionSettings,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The plain module for a layer whose weight is ``factors`` (None: whole) and whose bypass is ``bypass``.

    Args:
        dtype: if the base is quantized; else the module has that of the base.
    """
    bypass = bypass.narrowed(factors)
    if factors is None:
        result: Factors | Tensor = given.weight() + bypass.product().cpu().double()
    elif given.shape.extra_rank or factors.is_full:
        result = factors.stacked(bypass)
        result = result.product() if result.is_full else result
    else:
        result = absorb(name, given, factors, bypass, settings)
    like = layer.dense_weight()[:0].to(None if layer.quantization_backend is None else dtype)
    with in_module(name):
        metrics = partial(definite_metrics, name, given, settings)
        module = compact_module(result, layer.get_base_layer(), like, settings.factor_format, metrics, given.rows)
        remember_shape(module, (layer.out_features, layer.in_features) if given.is_narrowed else None)
        return module


def definite_metrics(name: str, given: LayerInput, settings: CompressionSettings) -> Metrics:
    """The metrics of a layer; the identity in the place of one that is zero."""
    return layer_metrics(name, given, settings).definite


def check_unmerged(layers: Mapping[str, LoraSVDLinear]) -> None:
    """Raise if the adapter is merged into the weights that are to be factorized."""
    if any(layer.merged for layer in layers.values()):
        raise LoraSVDError(
            "merge_and_unload: the adapter is merged into the dense weights; call unmerge_adapter() first"
        )


def check_export(quantization: BitsAndBytesConfig, configs: Iterable[LoraSVDConfig], *, smaller: bool) -> None:
    """Raise if the compact model of these adapters cannot be rounded to 4 bits; warn if it would exceed its budget."""
    configs = list(configs)
    if not smaller:
        raise LoraSVDError(
            "quantization_config: got one for a dense model, expected compact=True and param_ratio < 1. Save the "
            "merged model and give it to from_pretrained"
        )
    if any(not DECOMPOSITIONS[config.decomposition].is_low_rank for config in configs):
        raise LoraSVDError(
            "decomposition: got 'kronecker' with a quantization_config, expected a low-rank one: its factors are "
            "reshaped when they are applied, and rows as short as theirs do not fill the blocks of 64 that share a "
            "scale. Leave the quantization out"
        )
    if any(config.factor_format != "factors" for config in configs):
        raise LoraSVDError(
            "factor_format: got 'pivoted' with a quantization_config, expected 'factors', since pivoted ones "
            "amplify rounding. Train with it, best with rank_multiple=64 as well; after training, set it in the "
            "adapter's config and call set_param_ratio"
        )
    check_quantization(quantization)
    for config in configs:
        for name, width in (config.compact_widths or {}).items():
            if width % BLOCK:
                raise LoraSVDError(
                    f"compact_widths: got {width} neurons for {name} with a quantization_config, expected a multiple "
                    f"of {BLOCK}: so many weights share a scale. Set rank_multiple={BLOCK}, or neurons=False, in the "
                    "adapter's config and call set_param_ratio"
                )
    for multiple in (config.rank_multiple for config in configs):
        if multiple % BLOCK:
            warnings.warn(
                f"rank_multiple: got {multiple} with a quantization_config, expected {BLOCK}: 4-bit factors are "
                f"filled up to ranks that are multiples of {BLOCK}, beyond param_ratio. Train with it; after "
                "training, set it in the adapter's config and call set_param_ratio",
                stacklevel=3,
            )


def warn_if_larger(modules: Iterable[nn.Module], bytes_before: int) -> None:
    """Warn where a pair of factors in full precision is larger than the 4-bit weight that it replaces."""
    tensors: Any = [tensor for module in modules for tensor in module.state_dict(keep_vars=True).values()]
    size = sum(num_bytes(tensor) for tensor in tensors)
    if size > bytes_before:
        warnings.warn(
            f"merge_and_unload: the compact layers take {size:,} bytes, the weights they replace {bytes_before:,}. Use "
            "merge_and_unload(quantization_config=BitsAndBytesConfig(load_in_4bit=True)), or a lower param_ratio",
            stacklevel=4,
        )
