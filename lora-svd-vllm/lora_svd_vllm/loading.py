"""The tensors of a layer of low rank on their way from the files into a module of vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from vllm.model_executor.utils import set_weight_attrs

from .description import CheckpointError, Layer
from .weights import Weight

_QKV = {"q": 0, "k": 1, "v": 2}


class Received:
    """The tensors of one module of vLLM as they come from the files, by part and name."""

    def __init__(self, parts: Sequence[Layer]) -> None:
        self.parts = parts
        self.tensors: list[dict[str, Tensor]] = [{} for _ in parts]

    def register(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Give a module empty parameters of the names in the files, which hand on what vLLM loads into them."""
        for name in {name for part in self.parts for name in part.tensors()} - {"bias"}:
            *path, last = name.split(".")
            for child in path:
                if not hasattr(module, child):
                    module.add_module(child, nn.Module())
            owner = module.get_submodule(".".join(path))
            kind = torch.int32 if name == "order" else dtype
            owner.register_parameter(last, Parameter(torch.empty(0, dtype=kind), requires_grad=False))
            set_weight_attrs(getattr(owner, last), {"weight_loader": partial(self.load, name)})
        module.weight_loader = partial(self.load, "bias")  # of the bias, which vLLM registers after this

    def load(self, name: str, parameter: Parameter, tensor: Tensor, shard: int | str | None = None) -> None:
        """What vLLM calls with a tensor of a file; ``shard`` says of which part of a fused module it is."""
        index = _QKV[shard] if isinstance(shard, str) else shard or 0
        part = self.parts[index]
        expected = part.tensors().get(name)
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"{part.name}.{name}: vLLM gives it with shape {list(tensor.shape)}, expected "
                f"{'no such tensor' if expected is None else list(expected)}; this kind of model is not served"
            )
        self.tensors[index][name] = tensor

    def finish(self, module: nn.Module) -> list[tuple[Weight, Tensor | None]]:
        """The weight and bias of each part, once all are there."""
        for part, tensors in zip(self.parts, self.tensors, strict=True):
            if missing := part.tensors().keys() - tensors.keys():
                raise CheckpointError(f"{part.name}.{min(missing)}: has not been loaded; get the files again")
        for child in ("left", "right", "order"):
            if hasattr(module, child):
                delattr(module, child)
        stored = [_stored(part, tensors) for part, tensors in zip(self.parts, self.tensors, strict=True)]
        for tensors in self.tensors:
            tensors.clear()  # the module keeps its loaders
        return stored


def _stored(part: Layer, tensors: dict[str, Tensor]) -> tuple[Weight, Tensor | None]:
    bias = tensors.get("bias", tensors.get("left.bias"))
    if not part.is_low_rank:
        return Weight(tensors["weight"]), bias
    right = tensors["right.weight"].T if part.is_embedding else tensors["right.weight"]
    order = tensors["order"].long() if part.pivoted else None
    return Weight(right, tensors["left.weight"], order), bias
