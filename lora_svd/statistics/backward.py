"""``Observe``: where a layer's backward pass is looked at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Observe(torch.autograd.Function):
    """The identity on y that hands (x, dL/dy) to ``sink`` in the backward pass. y must not be a view. x comes with the
    graph that has made it, in which others find this node by the name of its ``layer``.

    y comes back itself, marked as changed: a view or a copy could not be changed in place afterwards, as some models
    do, or would take memory. x is saved by autograd, so gradient checkpointing recomputes it instead of keeping it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, sink: Callable[[Tensor, Tensor], None], layer: str | None = None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink, ctx.layer = sink, layer
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[None, Tensor, None, None]:
        (x,) = ctx.saved_tensors
        with torch.autocast(device_type=x.device.type, enabled=False):
            ctx.sink(x, grads[0].detach())
        return None, grads[0], None, None
