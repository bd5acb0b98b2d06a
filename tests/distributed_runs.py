"""The processes of ``test_distributed.py``: ``accelerate launch`` starts this file, which forks one process a run.

``distributed_runs.py FOLDER RUN...``, RUN a key of ``RUNS``. A process leaves the tensors that its model ends with
in FOLDER/RUN/rank-N.safetensors, and what a run wants to tell in FOLDER/RUN/rank-N.json.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from models import LLAMA as SDPA_LLAMA
from models import make_trainer, settings, tensors
from models import wrap as wrap_model
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig, Trainer, TrainerCallback

from lora_svd import LoraSVDCallback, LoraSVDError, NumericalError
from lora_svd.cli.compress import compress
from lora_svd.cli.recipe import read_recipe
from lora_svd.tuner import run as runs

# The first query sees one key, so that its gradient is zero, and a token is observed where it is not: fused attention
# leaves rounding errors there, which depend on the batch and on the CPU, and Adam makes steps of them.
LLAMA = replace(SDPA_LLAMA, config=partial(SDPA_LLAMA.config, attn_implementation="eager"))
wrap = partial(wrap_model, LLAMA)
STEPS, EVERY, WORLD = 8, 2, 2
TIMEOUT = 180  # seconds a run may take before it counts as hanging
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}
CUBIC = {"warmup": 3, "compression": 4, "compression_interval": 1}
EVERYTHING = {**CUBIC, "importance": "kronecker", "train_factors": True, "distillation": 0.5}
ACCUMULATED = {"gradient_accumulation_steps": 2}
# Heads are not tried, and so stay, where weights are sharded.
MINNORM = {"importance": "lora_minnorm", "warmup": 5, "heads": False}
LIMITED = {"warmup": 5, "importance": "kronecker", "statistics_limit": 60_000, "statistics_device": "cpu"}
SEGMENTS = {"warmup": 5, "importance": "lora_activation", "heads": False}
DISTILLED = {"warmup": 5, "distillation": 0.5, "heads": False}


def prepare(folder: Path, model: PeftModel, world: int = WORLD, **options: Any) -> Trainer:
    """A Trainer whose steps see the same samples whatever the number of processes."""
    saving = {"save_strategy": "steps", "save_steps": EVERY, "per_device_train_batch_size": 4 // world}
    return make_trainer(model, folder, steps=STEPS, **{**saving, **options})


def train(
    folder: Path,
    config: dict[str, Any] | None = None,
    resume: str | None = None,
    *,
    reload: bool = False,
    world: int = WORLD,
    **options: Any,
) -> PeftModel:
    """A run. resume: checkpoint beside the folder; reload: make the model from it."""
    checkpoint = None if resume is None else str(folder.parent / resume)
    if "fsdp" in options:
        allow_fsdp_on_cpu()
    base = LLAMA.build()
    if reload:
        model = PeftModel.from_pretrained(base, checkpoint, is_trainable=True)
    else:
        model = wrap(**(config or {"warmup": 5}))
    prepare(folder, model, world, **options).train(resume_from_checkpoint=checkpoint)
    return model


def allow_fsdp_on_cpu() -> None:
    """accelerate has FSDP for accelerators only; gloo can do it on CPUs, if they pass for such."""

    def prepare_backend(*_: Any, **__: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_XPU

    def set_device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend, PartialState.set_device = prepare_backend, set_device


# -- killed processes --------------------------------------------------------------------------------------------------


def kill(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


class KilledAtStep(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, *args: Any, **_: Any) -> None:
        if args[1].global_step == self.step:
            kill(rank=1)


def killed_in_warmup(folder: Path) -> PeftModel:
    return train(folder, callbacks=[LoraSVDCallback(), KilledAtStep(3)])


def killed_while_factorizing(folder: Path, **options: Any) -> PeftModel:
    runs.size_choices = lambda *_: kill(rank=1) or {}
    return train(folder, **options)


def killed_while_saving(folder: Path, **options: Any) -> PeftModel:
    save = Trainer._save_optimizer_and_scheduler

    def save_optimizer(self: Trainer, output_dir: str) -> None:
        if self.state.global_step == STEPS:
            kill(rank=0)
        save(self, output_dir)

    Trainer._save_optimizer_and_scheduler = save_optimizer
    return train(folder, **options)


# -- other ways --------------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """DDP does not get the PEFT model itself, but a module that has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> Any:
        return self.model(**batch).loss


def by_hand(folder: Path, world: int = WORLD) -> PeftModel:
    """A loop without Trainer, interrupted during the warm-up, with trained factors."""
    config = {"warmup": 3, "train_factors": True, "total_steps": 6, "importance": "lora_diagonal"}
    model, data = wrap(**config).train(), LLAMA.data()
    rank = dist.get_rank() if world > 1 else 0
    for steps in (range(2), range(2, 6)):
        whole = Holder(model)
        module = nn.parallel.DistributedDataParallel(whole) if world > 1 else whole
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for step in steps:
            rows = data[2 * step : 2 * step + 2][rank::world]
            batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            module(**batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            model.base_model.update_and_allocate(step, optimizer=optimizer)
            optimizer.step()
            optimizer.zero_grad()
        if step == 1:
            model.base_model.join_statistics()
            if rank == 0:
                model.save_pretrained(folder)
            if world > 1:
                dist.barrier()
            model = PeftModel.from_pretrained(LLAMA.build(), folder, is_trainable=True).train()
    return model


class SaveLater(TrainerCallback):
    def on_step_end(self, *args: Any, **_: Any) -> None:
        args[2].should_save = True


def failing_layer(folder: Path) -> None:
    """A layer of process 1 cannot be factorized."""
    size_choices = runs.size_choices

    def fails(*args: Any) -> Any:
        if dist.get_rank() == 1:
            raise NumericalError("a layer of process 1")
        return size_choices(*args)

    runs.size_choices = fails
    prepare(folder, wrap(warmup=1), save_strategy="no").train()


def command_line(folder: Path) -> None:
    file = folder / f"recipe-{dist.get_rank()}.yaml"
    text, output = str(folder / "text"), str(folder / "run")
    Path(text).write_text("w")
    options = {"model": "m", "text": text, "eval_text": text, "output_dir": output, "use_cpu": True, "bf16": False}
    file.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in options.items()))
    compress(read_recipe(file), print)


def late_save(folder: Path) -> None:
    prepare(folder, wrap(warmup=3), save_strategy="no", callbacks=[LoraSVDCallback(), SaveLater()]).train()


class PretendResumed(TrainerCallback):
    """A Trainer that resumes without loading anything."""

    def on_train_begin(self, *args: Any, **_: Any) -> None:
        args[1].global_step = 2


def resumed_while_the_budget_falls(folder: Path) -> None:
    checkpoint = folder.parent / "fsdp" / "checkpoint-6"
    model = PeftModel.from_pretrained(LLAMA.build(), checkpoint, is_trainable=True)
    vars(model.peft_config["default"]).update(CUBIC)
    prepare(folder, model, **FSDP).train(resume_from_checkpoint=str(checkpoint))


def another_size(folder: Path) -> None:
    train(folder, {"warmup": 1}, **FSDP, max_steps=1, save_strategy="no").base_model.set_param_ratio(0.5)


def quantized_base(folder: Path) -> None:
    LLAMA.build(hidden_size=64, intermediate_size=64).save_pretrained(folder / "base")  # process 0 does
    dist.barrier()
    base = LLAMA.model.from_pretrained(folder / "base", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    prepare(folder, get_peft_model(base, settings()), **FSDP).train()


def refused(runs: dict[str, Callable[[Path], Any]], folder: Path) -> dict[str, str]:
    """What each of the runs says."""
    said = {}
    for name, run in runs.items():
        try:
            run(folder)
        except LoraSVDError as error:
            said[name] = str(error)
    return said


def refused_with_fsdp(folder: Path) -> dict[str, str]:
    allow_fsdp_on_cpu()
    sharded = {**FSDP["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}
    runs = {
        "train_factors": partial(train, config={"train_factors": True}, **FSDP),
        "state dict": partial(train, **{**FSDP, "fsdp_config": sharded}),
        "resume": partial(train, **FSDP, callbacks=[PretendResumed(), LoraSVDCallback()]),
        "cubic": resumed_while_the_budget_falls,
        "another size": another_size,
        "quantized": quantized_base,
    }
    return refused(runs, folder)


RUNS: dict[str, Callable[[Path], Any]] = {
    "ddp": train,
    "ddp-killed-in-warmup": killed_in_warmup,
    "ddp-from-2": partial(train, resume="ddp-killed-in-warmup/checkpoint-2"),
    "ddp-killed-while-factorizing": killed_while_factorizing,
    "ddp-from-4": partial(train, resume="ddp-killed-while-factorizing/checkpoint-4"),
    "ddp-killed-while-saving": killed_while_saving,
    "ddp-from-6": partial(train, resume="ddp-killed-while-saving/checkpoint-6"),
    "limited": partial(train, config=LIMITED),
    "everything": partial(train, config=EVERYTHING),
    "everything-from-4": partial(train, config=EVERYTHING, resume="everything/checkpoint-4"),
    "by-hand": by_hand,
    "fsdp": partial(train, config=DISTILLED, **FSDP),
    "fsdp-killed-while-factorizing": partial(killed_while_factorizing, config=DISTILLED, **FSDP),
    "fsdp-from-4": partial(train, resume="fsdp-killed-while-factorizing/checkpoint-4", reload=True, **FSDP),
    "fsdp-killed-while-saving": partial(killed_while_saving, config=DISTILLED, **FSDP),
    "fsdp-from-6": partial(train, resume="fsdp-killed-while-saving/checkpoint-6", reload=True, **FSDP),
    "segments": partial(train, config=SEGMENTS),
    "fsdp-segments": partial(train, config=SEGMENTS, **FSDP),
    "fsdp-minnorm": partial(train, config=MINNORM, **ACCUMULATED, **FSDP),
    "refused": partial(refused, {"late save": late_save, "failing layer": failing_layer, "command": command_line}),
    "refused-with-fsdp": refused_with_fsdp,
}


def run_here(name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rank = int(os.environ["RANK"])
    # the launcher's own store serves one run only
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    code = 1
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    try:
        result = RUNS[name](folder)
        result_file = folder / f"rank-{rank}"
        if isinstance(result, dict):
            result_file.with_suffix(".json").write_text(json.dumps(result))
        else:
            ends = {k: t.full_tensor() if isinstance(t, DTensor) else t for k, t in tensors(result).items()}
            save_file(ends, result_file.with_suffix(".safetensors"))
        dist.destroy_process_group()
        code = 0
    except Exception:  # noqa: BLE001 - the forked process must not go on
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for run in sys.argv[2:]:
        child = os.fork()
        if not child:
            run_here(run, Path(sys.argv[1]) / run)
        os.waitpid(child, 0)
