"""A causal language model in a folder, of which single decoder blocks are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..compact.convert import is_plain_linear
from ..compact.tensors import Tensors, skeleton
from ..config import LoraSVDConfig
from ..errors import LoraSVDError


class Checkpoint:
    """The model without its weights, and the files with them.

    Attributes:
        model: parameters on the meta device.
        tensors: of the files.
        prefix: name of the list of decoder blocks.
        blocks: the decoder blocks.
        device: where weights are put.
        dtype: of the weights, if config.json names one.

    Raises:
        LoraSVDError: it is no dense causal language model of one list of decoder blocks, in full precision.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.model = skeleton(folder).eval().requires_grad_(False)
        config: Any = self.model.config
        if getattr(config, "quantization_config", None) is not None:
            raise LoraSVDError(f"folder: {folder} holds a compact or quantized model, expected dense weights")
        if config.is_encoder_decoder or self.model.get_output_embeddings() is None:
            raise LoraSVDError(
                f"folder: {folder} holds a {type(self.model).__name__}, expected a causal language model; compress it "
                "in memory"
            )
        self.tensors = Tensors(folder, self.model)
        self.prefix, self.blocks = _find_blocks(self.model)
        self.device = device
        self.dtype = None if config.dtype is None else getattr(torch, str(config.dtype).removeprefix("torch."))
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)

    def block_of(self, name: str) -> int | None:
        """Index of the block that a module or tensor is in."""
        inside = name.startswith(f"{self.prefix}.")
        return int(name.removeprefix(f"{self.prefix}.").partition(".")[0]) if inside else None

    def block_weights(self, index: int) -> dict[str, Tensor]:
        """Parameters and buffers of a block, by their names in it."""
        names = self.blocks[index].state_dict().keys()
        return {name: self.read(f"{self.prefix}.{index}.{name}") for name in names}

    def outer_weights(self) -> dict[str, Tensor]:
        """Those of everything outside of the blocks, by their names in the model; tied ones once."""
        names = [name for name in self.model.state_dict() if not name.startswith(f"{self.prefix}.")]
        tied: dict[str, str] = getattr(self.model, "all_tied_weights_keys", {})
        read = {name: self.read(name) for name in names if name in self.tensors or name not in tied}
        return {name: read[name] if name in read else read[tied[name]] for name in names}

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the model, in the model's type."""
        if name not in self.tensors:
            raise LoraSVDError(
                f"{name}: not among the tensors of this checkpoint, or put together from several while it is loaded "
                "(fused experts), which streaming does not do; compress the model in memory"
            )
        tensor = self.tensors.read_stored(self.tensors.stored[name])
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def linear_weight(self, name: str) -> Tensor:
        """The weight (out, in) of a linear layer, on the CPU, in the model's type."""
        weight = self.read(f"{name}.weight").cpu()
        return weight.T if isinstance(self.model.get_submodule(name), Conv1D) else weight

    def layers(self, config: LoraSVDConfig) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers of the blocks that a config targets, by name, in the order of the blocks."""
        everything = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
        targets = LoraSVDConfig(target_modules=".*", exclude_modules=config.exclude_modules) if everything else config
        found = {}
        for name, module in self.model.named_modules():
            inside = is_plain_linear(module) and self.block_of(name) is not None
            if inside and check_target_module_exists(targets, name):
                weight: Any = module.weight
                found[name] = tuple(weight.shape[::-1] if isinstance(module, Conv1D) else weight.shape)
        if not found:
            raise LoraSVDError(f"target_modules: {config.target_modules!r} is no linear layer of {self.prefix}")
        return found


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The one list of modules that is not inside of another one."""
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise LoraSVDError(
            f"folder: {type(model).__name__} has {len(outer)} lists of modules ({', '.join(outer) or 'none'}), "
            "expected one, of its decoder blocks; compress it in memory"
        )
    return outer[0], lists[outer[0]]
