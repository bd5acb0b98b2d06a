"""Cost of training: steps, whole runs and the factorization beside those of PEFT's LoRA and of whole SVDs."""

from __future__ import annotations

import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from common import CostArguments, PeakMemory, load, paired, timed, train, training_arguments
from peft import LoraConfig, get_peft_model
from torch import Tensor

from lora_svd import LoraSVDCallback, LoraSVDConfig
from lora_svd.compression import choose_size, factorize, size_choices
from lora_svd.inputs import CompressionSettings, LayerInput, layer_metrics, narrow_layers, units_of
from lora_svd.linalg import Metrics
from lora_svd.neurons import NeuronGroup

LORA = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"}
RANKS_ALONE = {"neurons": False}


class Stepper:
    """Optimizer steps on random tokens; with ``config`` of lora_svd, in the phase that ``observing`` says."""

    def __init__(self, given: CostArguments, config: dict[str, Any] | None, *, observing: bool = True) -> None:
        base = load(given.model)
        self.vocabulary, self.shape = base.config.vocab_size, (given.batch, given.window)
        self.is_ours, self.step = config is not None, 0
        if config is None:
            self.model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **LORA))
        else:
            phases = {"total_steps": 10_000, "warmup": 9_000 if observing else 1}
            self.model = get_peft_model(base, LoraSVDConfig(**{**LORA, **RANKS_ALONE, **phases, **config}))
        self.tuner: Any = self.model.base_model
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        self.model.train()
        for _ in range(0 if observing else 2):
            self()

    def __call__(self) -> None:
        tokens = torch.randint(self.vocabulary, self.shape)
        with torch.autocast(self.model.device.type, dtype=torch.bfloat16):
            loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        if self.is_ours:
            self.tuner.update_and_allocate(self.step, optimizer=self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1


def peak(given: CostArguments, config: dict[str, Any] | None, observing: bool) -> int:
    """MiB that three steps take in a process of their own."""
    memory = PeakMemory()
    with memory.watch():
        stepper = Stepper(given, config, observing=observing)
        for _ in range(3):
            stepper()
    return memory.mebibytes


def training_step(given: CostArguments, config: dict[str, Any], *, observing: bool) -> dict[str, Any]:
    """One step beside one of PEFT's LoRA, and the peak memory of both."""
    ours, theirs = Stepper(given, config, observing=observing), Stepper(given, None)
    result: dict[str, Any] = paired(ours, theirs, given.repetitions)
    del ours, theirs
    with alone() as pool:
        mine = pool.submit(peak, given, config, observing).result()
        other = pool.submit(peak, given, None, True).result()
    return result | {"ours_mebibytes": mine, "theirs_mebibytes": other, "memory_ratio": round(mine / other, 4)}


def alone() -> ProcessPoolExecutor:
    """A fresh process for every task, one thread each, as many at once as there are tasks."""
    context = get_context("spawn")
    return ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1, initializer=one_thread)


def one_thread() -> None:
    torch.set_num_threads(1)


def whole_run(given: CostArguments, config: dict[str, Any]) -> dict[str, Any]:
    """A run of Trainer from the dense model to the compact one, and one of PEFT's LoRA of the same steps."""
    with alone() as pool:
        runs = [pool.submit(run_seconds, given, chosen) for chosen in (config, None)]
        ours, theirs = (run.result() for run in runs)
    found = {
        f"{whose}_{name}": value for whose, seen in (("ours", ours), ("theirs", theirs)) for name, value in seen.items()
    }
    ratios = {f"{name}_ratio": round(ours[name] / theirs[name], 4) for name in ("wall", "cpu", "mebibytes")}
    return {"steps": given.steps, **found, **ratios}


def run_seconds(given: CostArguments, config: dict[str, Any] | None) -> dict[str, Any]:
    """Wall and CPU seconds and peak memory of a whole run; how long merging and saving take of them."""
    memory, spent = PeakMemory(), {}
    with memory.watch(), tempfile.TemporaryDirectory() as folder:
        model = load(given.model)
        tokens = torch.randint(model.config.vocab_size, (8 * given.batch, given.window))
        examples = [{"input_ids": row, "labels": row} for row in tokens]
        settings = training_arguments(Path(folder), steps=given.steps, batch=given.batch, learning_rate=1e-3, seed=0)

        def work() -> None:
            kind = (
                LoraConfig(task_type="CAUSAL_LM", **LORA)
                if config is None
                else LoraSVDConfig(**LORA, **RANKS_ALONE, **config)
            )
            callbacks = [] if config is None else [LoraSVDCallback()]
            tuned = train(get_peft_model(model, kind), examples, settings, *callbacks)
            spent["merge"], _ = timed(lambda: tuned.merge_and_unload().save_pretrained(folder))

        wall, cpu = timed(work)
    seconds = {"wall": wall, "cpu": cpu, **spent}
    return {name: round(value, 1) for name, value in seconds.items()} | {"mebibytes": memory.mebibytes}


def factorization(given: CostArguments, config: dict[str, Any]) -> dict[str, Any]:
    """Spectra, ranks and factors of some blocks beside square roots and whole SVDs of the same scaled weights."""
    few, _, settings = _observed(given, config)

    def theirs() -> None:
        for name, layer in few.items():
            whole_svd(layer, layer_metrics(name, layer, settings))

    ours = partial(_compress, few, {}, config["param_ratio"], settings)
    return {"layers": len(few), **paired(ours, theirs, max(1, given.repetitions // 3))}


def search(given: CostArguments, config: dict[str, Any]) -> dict[str, Any]:
    """Neurons, heads, ranks and factors of some blocks beside ranks and factors alone."""
    few, groups, settings = _observed(given, {**config, "neurons": True})
    ours, theirs = (partial(_compress, few, of, config["param_ratio"], settings) for of in (groups, {}))
    return {"layers": len(few), "groups": len(groups), **paired(ours, theirs, max(1, given.repetitions // 3))}


def _observed(
    given: CostArguments, config: dict[str, Any]
) -> tuple[dict[str, LayerInput], dict[str, NeuronGroup], CompressionSettings]:
    """The layers of the first blocks after a step, and the groups among them."""
    stepper = Stepper(given, config)
    stepper()
    run = stepper.tuner.run()
    few = dict(list(run.inputs().items())[: 7 * given.blocks])
    return few, {name: group for name, group in run.groups.items() if name in few}, run.settings


def _compress(
    layers: dict[str, LayerInput], groups: dict[str, NeuronGroup], param_ratio: float, settings: CompressionSettings
) -> None:
    choices = dict(size_choices(units_of(layers, groups), groups, settings))
    chosen = choose_size(choices, param_ratio, settings)
    assert len(list(factorize(narrow_layers(layers, groups, chosen.neurons), chosen.ranks, settings))) == len(layers)


def whole_svd(layer: LayerInput, metrics: Metrics) -> None:
    """``C^(1/2) W X^(1/2)``, decomposed at full length."""
    scaled = square_root(metrics.row) @ layer.weight() @ square_root(metrics.column)
    torch.linalg.svd(scaled, full_matrices=False)


def square_root(metric: Any) -> Tensor:
    if metric.dim() == 1:
        return metric.sqrt().diag()
    values, vectors = torch.linalg.eigh(metric)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T
