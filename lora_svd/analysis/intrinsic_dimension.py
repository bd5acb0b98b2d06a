"""Intrinsic dimension of a task: training in a random subspace of all parameters (Li et al. 2018).

``theta = theta_0 + P d`` with trainable coordinates d, ``dimension`` of them for the whole model, and a fixed random P
of as many columns. Structure-aware (SAID, Aghajanyan et al. 2021), layer i has a scale of its own, taken from the same
budget: ``theta_i = theta_0,i + lambda_i (P d)_i``.

P is the signed hashing matrix (Weinberger et al. 2009): each parameter follows one coordinate, drawn at random, with a
random sign, and columns have unit norm. Columns are thus orthonormal, and the part of a fixed vector that lies in the
subspace has the expected length that it has under a dense Gaussian P, at one addition a parameter where Fastfood, the
papers' choice, takes Hadamard transforms. P is drawn anew, tensor by tensor, from its seed, and never held. It is meant
for dimensions far below the number of parameters: above, some coordinates get no parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import LoraSVDError


class RandomSubspace(nn.Module):
    """A model whose trainable parameters are coordinates; made by :func:`random_subspace`.

    Attributes:
        model: the model at theta_0, frozen.
        coordinates: d, zeros at first.
        scales: lambda by layer, ones at first; None if not structure-aware.
    """

    scale: Tensor

    def __init__(self, model: nn.Module, dimension: int, *, structure_aware: bool, seed: int) -> None:
        super().__init__()
        # The wrapped parameters' names do not change, so neither do the tensors drawn for them.
        moved = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._seeds = {name: seed + 1_000_003 * index for index, name in enumerate(moved)}
        layers = list(dict.fromkeys(layer_of(name) for name in moved)) if structure_aware else []
        self._layer = {name: layers.index(layer_of(name)) for name in moved} if structure_aware else {}
        size, total = dimension - len(layers), sum(p.numel() for p in moved.values())
        if not 0 < size <= total:
            raise LoraSVDError(
                f"dimension: got {dimension}, expected {len(layers) + 1} to {len(layers) + total}: the model has "
                f"{total} trainable parameters, and {len(layers)} of the dimensions are the scales of layers"
            )
        self.model = model.requires_grad_(False)
        device = next(iter(moved.values())).device
        self.coordinates = nn.Parameter(torch.zeros(size, device=device))
        self.scales = nn.Parameter(torch.ones(len(layers), device=device)) if structure_aware else None
        counts = torch.zeros(size)
        for name, parameter in moved.items():
            counts += torch.bincount(_draw(self._seeds[name], size, parameter.numel())[0], minlength=size)
        self.register_buffer("scale", counts.clamp_min(1).rsqrt().to(device))

    @property
    def dimension(self) -> int:
        """Number of trainable values, scales included."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def moved_parameters(self) -> dict[str, Tensor]:
        """theta by parameter name, as a function of the coordinates and scales; of those parameters that move."""
        values, start = self.coordinates * self.scale, dict(self.model.named_parameters())
        moved = {}
        for name, seed in self._seeds.items():
            change = _Spread.apply(values, seed, start[name].shape)
            if self.scales is not None:
                change = self.scales[self._layer[name]] * change
            moved[name] = start[name] + change.to(start[name].dtype)
        return moved

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, self.moved_parameters(), args, kwargs)


def random_subspace(
    model: nn.Module, dimension: int, *, structure_aware: bool = False, seed: int = 0
) -> RandomSubspace:
    """Confine a model's training to a random subspace through its present parameters; see the module.

    Args:
        model: its parameters that require a gradient are moved together; all its parameters are frozen by this.
        dimension: number of trainable values, with the scales of the layers if ``structure_aware``.
        structure_aware: one scale a layer: a block with a number in its name, or a module outside of all blocks.
            Published code has one for each tensor.
        seed: of P.

    Raises:
        LoraSVDError: ``dimension`` is larger than the model, or too small for the scales.
    """
    return RandomSubspace(model, dimension, structure_aware=structure_aware, seed=seed)


def intrinsic_dimension(accuracies: Mapping[int, float], full_accuracy: float, share: float = 0.9) -> int:
    """The least dimension whose accuracy is at least ``share * full_accuracy``: d_90 (Li et al. 2018) at 0.9.

    Args:
        accuracies: by dimension; higher is better.
        full_accuracy: when all parameters are trained.
        share: in (0, 1].

    Raises:
        LoraSVDError: none reaches it.
    """
    reached = [dimension for dimension, accuracy in accuracies.items() if accuracy >= share * full_accuracy]
    if not reached:
        best = max(accuracies.values(), default=float("nan"))
        raise LoraSVDError(
            f"intrinsic_dimension: the best accuracy is {best:.4g}, below {share} * {full_accuracy:.4g}; train in "
            f"more dimensions than {max(accuracies, default=0)}"
        )
    return min(reached)


def layer_of(parameter: str) -> str:
    """The layer a parameter belongs to: up to the first number in its name, else the module that holds it."""
    parts = parameter.split(".")
    end = next((index + 1 for index, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[:end])


def _draw(seed: int, dimension: int, count: int) -> tuple[Tensor, Tensor]:
    """Coordinate (int64) and sign (float32) of each of ``count`` parameters, on the CPU: the same for every device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2 * dimension, (count,), generator=generator)
    return drawn // 2, (drawn % 2).float().mul_(2).sub_(1)


class _Spread(torch.autograd.Function):
    """``sign * values[index]`` with index and sign drawn again in the backward pass: the graph holds neither."""

    @staticmethod
    def forward(ctx, values: Tensor, seed: int, shape: torch.Size) -> Tensor:
        ctx.seed, ctx.dimension = seed, len(values)
        index, sign = _draw(seed, len(values), shape.numel())
        return (values[index.to(values.device)] * sign.to(values.device)).view(shape)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        gradient = grads[0].flatten()
        index, sign = (t.to(gradient.device) for t in _draw(ctx.seed, ctx.dimension, gradient.numel()))
        total = torch.zeros(ctx.dimension, dtype=gradient.dtype, device=gradient.device)
        return total.index_add_(0, index, gradient * sign), None, None
