"""``LoraSVDCallback``: walks a Trainer run through the phases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import LoraSVDError
from ..schedule import Schedule
from .checkpoints import seal
from .distributed import check_engine, is_sharded
from .model import LoraSVDModel
from .run import AdapterRun


class SizeLogger(TrainerCallback):
    """Adds ``param_ratio``, the size of the model, to the Trainer's log and to what later callbacks report."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **given: Any,
    ) -> None:
        if logs is not None:
            logs["param_ratio"] = find_tuner(given["model"]).current_param_ratio()
            state.log_history[-1]["param_ratio"] = logs["param_ratio"]


class LoraSVDCallback(SizeLogger):
    """Calls ``update_and_allocate`` before every optimizer step of a ``Trainer``. Nothing to configure.

    At that point gradients are accumulated, averaged over processes, unscaled and clipped, and the weights are those
    that the gradients belong to. Before a checkpoint is saved, the statistics of all processes are added up. The best
    model (``load_best_model_at_end``, early stopping) is sought anew whenever the size has changed.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Check before the first step that the schedule fits the run, and that layers can be observed in it."""
        tuner = find_tuner(given["model"])
        check_engine(args, tuner)
        for run in tuner.active_runs():
            _check_sharding(tuner, run, run.schedule(state.max_steps), state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Say what the loss is multiplied by; in float16 that changes from step to step."""
        scaler = getattr(given["optimizer"], "scaler", None)
        find_tuner(given["model"]).set_loss_scale(1.0 if scaler is None else scaler.get_scale())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Observe the step and, where the schedule says so, factorize."""
        if state.global_step >= state.max_steps:  # Trainer takes one step too many if a finished run is resumed
            given["model"].zero_grad()
            return
        optimizer = given["optimizer"]  # accelerate wraps the one that owns the parameter groups
        scaled = getattr(optimizer, "scaler", None) is not None
        optimizer = getattr(optimizer, "optimizer", optimizer)
        tuner = find_tuner(given["model"])
        before = _ranks_in_force(tuner)
        tuner.update_and_allocate(state.global_step, state.max_steps, optimizer, scaled=scaled)
        if _ranks_in_force(tuner) != before:  # a larger model is no rival of the smaller ones that follow
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Add up the statistics of all processes if a checkpoint follows, or may follow; none does after the run."""
        control.should_save &= state.global_step <= state.max_steps
        if control.should_save or (control.should_evaluate and args.save_strategy == "best"):
            find_tuner(given["model"]).join_statistics()

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Write the checksums by which damage to a checkpoint is found.

        Raises:
            LoraSVDError: its statistics are not those of all processes.
        """
        if not all(run.has_joined_statistics for run in find_tuner(given["model"]).active_runs()):
            raise LoraSVDError(
                f"LoraSVDCallback: the checkpoint of step {state.global_step} was saved without its statistics, since "
                "a later callback asked for it; put LoraSVDCallback behind the callbacks that set control.should_save"
            )
        PartialState().wait_for_everyone()
        folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():  # a search for hyperparameters saves elsewhere
            seal(folder)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        find_tuner(given["model"]).join_statistics()


def attach(trainer: Trainer) -> Trainer:
    """Give a Trainer a :class:`LoraSVDCallback`, if it has none, in the right places, and return it.

    Loggers see ``param_ratio`` if it is added before they run; a checkpoint holds the statistics of all processes if
    they are added up after every callback that may ask for it. ``callbacks=[LoraSVDCallback()]`` does the second only.
    """
    callbacks = trainer.callback_handler.callbacks
    if not any(isinstance(callback, LoraSVDCallback) for callback in callbacks):
        trainer.add_callback(LoraSVDCallback())
    callbacks.insert(1, SizeLogger())  # behind the callback that controls the run
    return trainer


def find_tuner(model: nn.Module | None) -> LoraSVDModel:
    """The tuner inside a (wrapped) PEFT model."""
    for module in model.modules() if model is not None else ():
        if isinstance(module, LoraSVDModel):
            return module
    raise LoraSVDError(
        f"LoraSVDCallback: {type(model).__name__} has no LoraSVD adapter; make it with "
        "get_peft_model(model, LoraSVDConfig(...))"
    )


def _ranks_in_force(tuner: LoraSVDModel) -> list[dict[str, int] | None]:
    """Ranks of every active adapter; None while it is whole."""
    configs = (run.config for run in tuner.active_runs())
    return [config.compact_ranks if config.compressed else None for config in configs]


def _check_sharding(tuner: LoraSVDModel, run: AdapterRun, schedule: Schedule, global_step: int) -> None:
    """Refuse what weights sharded by FSDP2 do not allow.

    Raises:
        LoraSVDError: trained factors, a quantized base, or a run resumed without its statistics or factors.
    """
    config = run.config
    if config.param_ratio == 1 or not any(map(is_sharded, tuner.parameters())):
        return
    if config.train_factors:
        raise LoraSVDError(
            "train_factors: got True with FSDP2, which shards and averages only the parameters that it finds at the "
            "start; expected False, or DDP"
        )
    if any(layer.quantization_backend is not None for layer in run.layers.values()):
        raise LoraSVDError("FSDP2: got a quantized base, whose shards cannot be dequantized; expected DDP")
    is_continued = config.compressed or run.was_observed
    if global_step and (not is_continued or (global_step >= schedule.warmup_end and not config.compressed)):
        raise LoraSVDError(
            f"FSDP2: resumed at step {global_step} without statistics or factors, which Trainer cannot load into a "
            "sharded model. Make the model with PeftModel.from_pretrained(base, checkpoint, is_trainable=True) and "
            "pass the checkpoint to trainer.train as well"
        )
    if config.compressed and global_step < schedule.compression_end:
        raise LoraSVDError(
            f"FSDP2: resumed at step {global_step}, while the budget falls until step {schedule.compression_end}; "
            f"factors that are sharded cannot be replaced. Resume from a step before {schedule.warmup_end}"
        )
