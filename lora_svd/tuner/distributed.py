"""Several processes, each with its own batches: what is summed over them, divided among them, and refused.

One process: everything here does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from ..errors import LoraSVDError

T = TypeVar("T")
R = TypeVar("R")


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_mine(index: int) -> bool:
    """Whether the work on layer ``index`` is this process's; layer 0 is process 0's."""
    return world_size() == 1 or index % world_size() == dist.get_rank()


def all_reduce_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place. All have one type and device."""
    if world_size() == 1 or not tensors:
        return
    if len(tensors) == 1:
        dist.all_reduce(tensors[0])
    else:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


def with_averaged_gradient(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter, its gradient averaged over all processes: for one that was not there when DDP began."""
    if parameter.requires_grad:
        parameter.register_post_accumulate_grad_hook(_average_gradient)
    return parameter


def _average_gradient(parameter: Tensor) -> None:
    if world_size() > 1 and parameter.grad is not None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= world_size()


def is_sharded(tensor: object) -> bool:
    """Whether each process holds a part of the tensor only (FSDP2)."""
    return isinstance(tensor, DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """The tensor, gathered from its shards; all processes have to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered_objects(mine: T) -> list[T]:
    """What every process gives, in their order; all processes have to call it."""
    every = [mine] * world_size()
    if len(every) > 1:
        dist.all_gather_object(every, mine)
    return every


def run_alone(items: Mapping[str, T], compute: Callable[[Mapping[str, T]], Iterable[tuple[str, R]]]) -> dict[str, R]:
    """``dict(compute(items))`` in this process."""
    return dict(compute(items))


def run_divided(items: Mapping[str, T], compute: Callable[[Mapping[str, T]], Iterable[tuple[str, R]]]) -> dict[str, R]:
    """As :func:`run_alone`, each process computing its share of the items and all receiving everything.

    Raises:
        LoraSVDError: one process raised it; all do.
    """
    if world_size() == 1:
        return run_alone(items, compute)
    mine, error = {}, None
    try:
        mine = dict(compute({name: item for index, (name, item) in enumerate(items.items()) if is_mine(index)}))
    except LoraSVDError as raised:
        error = raised
    errors: list[LoraSVDError | None] = [None] * world_size()
    dist.all_gather_object(errors, error)
    for raised in filter(None, errors):
        raise raised
    results = {}
    for index, name in enumerate(items):
        received = [mine.pop(name, None)]
        dist.broadcast_object_list(received, src=index % world_size())
        results[name] = received[0]
    return results


def check_engine(args: TrainingArguments, model: nn.Module) -> None:
    """Refuse, before the first step, ways to train in which what is observed would be wrong or cannot be read.

    Raises:
        LoraSVDError: DeepSpeed, FSDP1, tensor, context or sequence parallelism, ``nn.DataParallel``, or checkpoints of
            FSDP2 from which a run could not be resumed.
    """
    state = AcceleratorState()
    plugin = getattr(state, "fsdp_plugin", None)
    kind = DistributedType.DEEPSPEED if args.deepspeed else state.distributed_type
    found = None
    if kind == DistributedType.DEEPSPEED:
        found = "DeepSpeed, which reduces and frees the gradients inside of its backward pass, before they can be read"
    elif kind in (DistributedType.MEGATRON_LM, DistributedType.XLA):
        found = f"{kind.value}, in which layers and gradients are not those of the model"
    elif args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
        found = f"nn.DataParallel on {args.n_gpu} devices, whose copies of the model lose what they observe"
    elif getattr(plugin, "fsdp_version", 2) == 1:
        found = "FSDP1, which flattens weights and gradients so that no layer has its own (fsdp_version: 1)"
    elif parallel := _parallelism(model, getattr(state, "parallelism_config", None)):
        found = f"{parallel} parallelism, in which no process sees a layer's whole input and gradient"
    if found:
        raise LoraSVDError(
            f"LoraSVDCallback: got {found}; expected one process, DDP or FSDP2. Start one process a device with "
            "`accelerate launch` (DDP), and shard with fsdp_version: 2 if the model is too large for one device"
        )
    saved = str(getattr(plugin, "state_dict_type", "FULL_STATE_DICT"))
    if args.save_strategy != "no" and "FULL_STATE_DICT" not in saved:
        raise LoraSVDError(
            f"fsdp_state_dict_type: got {saved}, expected FULL_STATE_DICT: sharded checkpoints have no adapter from "
            "which statistics and factors can be restored"
        )


def _parallelism(model: nn.Module, config: Any) -> str | None:
    """How the work on one sample is divided among processes, if it is."""
    if (getattr(model, "tp_size", None) or 1) > 1:
        return "tensor"
    for name, word in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence")):
        if getattr(config, f"{name}_enabled", False):
            return word
    return None
