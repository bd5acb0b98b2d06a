"""``LoraSVDCallback``: walks a Trainer run through the phases."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpoints import seal
from .errors import LoraSVDError
from .model import LoraSVDModel


class LoraSVDCallback(TrainerCallback):
    """Calls ``update_and_allocate`` before every optimizer step of a ``Trainer``. Nothing to configure.

    At that point gradients are accumulated, averaged over processes, unscaled and clipped, and the weights are those
    that the gradients belong to.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Check before the first step that the schedule fits the run."""
        tuner = find_tuner(model)
        for adapter_name in tuner.active_adapters:
            tuner.schedule(adapter_name, state.max_steps)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step >= state.max_steps:  # Trainer takes one step too many if a finished run is resumed
            cast(nn.Module, model).zero_grad()
            return
        optimizer = kwargs["optimizer"]  # accelerate wraps the one that owns the parameter groups
        scaled = getattr(optimizer, "scaler", None) is not None
        optimizer = getattr(optimizer, "optimizer", optimizer)
        find_tuner(model).update_and_allocate(state.global_step, state.max_steps, optimizer, scaled=scaled)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save nothing after the last step of the run."""
        control.should_save &= state.global_step <= state.max_steps

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the checksums by which damage to a checkpoint is found."""
        PartialState().wait_for_everyone()
        folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():  # a search for hyperparameters saves elsewhere
            seal(folder)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add the size of the model to the Trainer's log and to what later callbacks report."""
        if logs is not None:
            logs["param_ratio"] = find_tuner(model).current_param_ratio()
            state.log_history[-1]["param_ratio"] = logs["param_ratio"]


def find_tuner(model: nn.Module | None) -> LoraSVDModel:
    """The tuner inside a (wrapped) PEFT model."""
    for module in model.modules() if model is not None else ():
        if isinstance(module, LoraSVDModel):
            return module
    raise LoraSVDError(
        f"LoraSVDCallback: {type(model).__name__} has no LoraSVD adapter; make it with "
        "get_peft_model(model, LoraSVDConfig(...))"
    )
