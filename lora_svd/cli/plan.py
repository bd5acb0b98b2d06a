"""What a run of ``lora-svd compress`` will do and need, from shapes: known before a weight is loaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.training_args import OptimizerNames

from ..allocation import budget_of
from ..errors import LoraSVDError
from ..evaluation import check_positions
from ..schedule import Schedule
from ..statistics import STATISTICS
from ..tuner.observer import Observer
from .inputs import adapted, device_memory, load_config
from .recipe import Recipe, TrainArguments

_FEWEST_STEPS, _MOST_STEPS = 30, 500
_QUANTIZED_BYTES = {"nf4": 0.5, "fp4": 0.5, "int8": 1.0}
# Bytes a trained number, of optimizers that certainly keep two in float32.
_MOMENTS = {OptimizerNames.ADAMW_TORCH: 8, OptimizerNames.ADAMW_TORCH_FUSED: 8}


@dataclass(frozen=True)
class Memory:
    """Bytes that a run takes at the least, beside the activations of a step.

    Attributes:
        weights: of the model as it is loaded.
        statistics: sums that are kept until the layers are cut, and half of them from then on.
        bypasses: the LoRA, its gradients and the optimizer's state.
        factors: those that take the places of the weights, the same with ``train_factors``.
    """

    weights: int
    statistics: int
    bypasses: int
    factors: int

    def total(self, *, with_statistics: bool) -> int:
        """The larger of what is needed before and after the layers are cut."""
        statistics = self.statistics if with_statistics else 0
        return self.weights + self.bypasses + max(statistics, statistics // 2 + self.factors)

    def __str__(self) -> str:
        parts = (f"{part} {_size(size)}" for part, size in vars(self).items())
        return ", ".join(parts)


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        model: its name.
        layers: number of targeted layers.
        parameters: of the whole model, tied ones once.
        targeted: parameters of the targeted weights.
        kept: of these, what the compact model may have.
        schedule: phases of the run, in steps.
        step_tokens: tokens that a step reads.
        passes: times that the run reads the text.
        memory: what it takes.
        device: where it runs.
        statistics_device: where the statistics are kept.
    """

    model: str
    layers: int
    parameters: int
    targeted: int
    kept: int
    schedule: Schedule
    step_tokens: int
    passes: float
    memory: Memory
    device: torch.device
    statistics_device: torch.device

    def __str__(self) -> str:
        steps, after = self.schedule, self.parameters - self.targeted + self.kept
        return (
            f"{Path(self.model).name}: {self.layers} layers with {self.targeted:,} parameters to {self.kept:,} at most "
            f"(param_ratio {steps.param_ratio:g}), the whole model from {self.parameters:,} to {after:,}.\n"
            f"{steps.total_steps} steps of {self.step_tokens:,} tokens, {self.passes:.2f} passes over the text: "
            f"{self._phases()}.\n"
            f"Memory, at least: {_size(self.needs()[self.device])} and the activations of a step ({self.memory})."
        )

    def _phases(self) -> str:
        schedule = self.schedule
        if schedule.param_ratio == 1:
            return "a LoRA is trained, nothing is cut"
        lengths = {
            "observe": schedule.warmup_end,
            "compress": schedule.compression_end - schedule.warmup_end,
            "recover": schedule.total_steps - schedule.compression_end,
        }
        return ", ".join(f"{steps} {phase}" for phase, steps in lengths.items() if steps)

    def needs(self) -> dict[torch.device, int]:
        """Bytes that the run takes at the least, by device."""
        together = self.device == self.statistics_device
        needs = {self.device: self.memory.total(with_statistics=together)}
        return needs if together else needs | {self.statistics_device: self.memory.statistics}

    def check_memory(self) -> None:
        """Raise if a device certainly has too little memory."""
        for device, needed in self.needs().items():
            has = device_memory(device)
            if has is not None and needed > has:
                raise LoraSVDError(
                    f"memory: the run takes at least {_size(needed)} on {device} ({self.memory}), which has "
                    f"{_size(has)}. Set --statistics_limit BYTES, --train_factors false or a smaller --r; or take "
                    "`lora-svd stream`, which trains nothing and holds one block of the model at a time"
                )


def make_plan(recipe: Recipe, num_blocks: int) -> Plan:
    """The plan of a run over so many sequences.

    Raises:
        LoraSVDError: the model, the targets, the size or the phases are not possible.
    """
    run, config, training = recipe.run, recipe.config, recipe.training
    model_config, dtype = load_config(run.model, run.dtype)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # what there is to warn of is said when the weights are there
        model: Any = AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=False)
        check_positions(model, run.block_length, "block_length")
        parameters = sum(p.numel() for p in model.parameters())
        tuned: Any = adapted(model, deepcopy(config))
    adapter = tuned.base_model.run()
    if config.param_ratio < 1:
        adapter.check_budget()
    shapes, schedule = adapter.shapes, adapter.schedule(num_steps(training, num_blocks))
    sequences = training.per_device_train_batch_size * training.gradient_accumulation_steps
    targeted, kept = sum(shape.parameters for shape in shapes.values()), budget_of(shapes, config.param_ratio)
    return Plan(
        model=run.model,
        layers=len(shapes),
        parameters=parameters,
        targeted=targeted,
        kept=kept,
        schedule=schedule,
        step_tokens=sequences * run.block_length,
        passes=schedule.total_steps * sequences / num_blocks,
        memory=_memory(recipe, tuned, dtype, targeted, kept),
        device=training.device,
        statistics_device=torch.device(config.statistics_device or training.device),
    )


def _memory(recipe: Recipe, tuned: Any, dtype: torch.dtype, targeted: int, kept: int) -> Memory:
    """What a model with adapters takes, from its shapes."""
    config, quantization = recipe.config, recipe.run.base_quantization
    weights = sum(p.numel() * p.element_size() for p in tuned.parameters() if not p.requires_grad)
    if quantization != "none":
        weights -= int(targeted * (dtype.itemsize - _QUANTIZED_BYTES[quantization]))
    moments = _MOMENTS.get(OptimizerNames(recipe.training.optim), 0)
    trained = 4 + 4 + moments  # bytes of a number in float32, its gradient and what the optimizer keeps of it
    adapters = tuned.base_model.run().adapters()
    return Memory(
        weights=weights,
        statistics=least_statistics_bytes({name: adapter.observer for name, adapter in adapters.items()}),
        bypasses=trained * sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        factors=kept * (trained if config.train_factors else dtype.itemsize) if config.param_ratio < 1 else 0,
    )


def num_steps(training: TrainArguments, num_blocks: int) -> int:
    """Optimizer steps of a run: those asked for, those of the epochs asked for, or one pass over the text, but 30 at
    least, lest a short text is observed and recovered from too little, and 500 at most."""
    if training.max_steps > 0:
        return training.max_steps
    batches = math.ceil(num_blocks / training.per_device_train_batch_size)
    one_pass = math.ceil(batches / training.gradient_accumulation_steps)
    if training.num_train_epochs > 0:
        return math.ceil(training.num_train_epochs * one_pass)
    return min(max(one_pass, _FEWEST_STEPS), _MOST_STEPS)


def least_statistics_bytes(observers: Mapping[str, Observer]) -> int:
    """Bytes of the sums of all layers, by name, at the least: layers of one parent and width may have one input, whose
    Gram matrix they then share."""
    sizes: dict[tuple[str, ...], int] = {}
    for layer, observer in observers.items():
        for name in observer.wanted:
            of_inputs = STATISTICS[name].gram and STATISTICS[name].side == "columns" and name not in observer.sketches
            key = (name, layer.rpartition(".")[0], str(observer.shape[1])) if of_inputs else (name, layer)
            sizes[key] = 4 * math.prod(observer.sum_shape(name))
    return sum(sizes.values())


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
