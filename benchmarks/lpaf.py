"""LPAF (Ren and Zhu, 2023): prune single weights, factorize what is left, and train at two ranks at once.

For a model that was fine-tuned, all of its parameters trained, in three stages:

1. First-order pruning. In every linear layer of the blocks the weights of the highest score stay,

       S = |sum over steps of (dL/dW') * W|,   W' = M * W,   M the mask

   The share that is gone follows a cubic from none to the target. Masked weights keep their values and their scores, so
   that they may come back.
2. Sparsity-aware SVD. An error costs what the mask says, with all weights of a row alike:
   ``min sum_i c_i |(W')_i - (left right)_i|^2`` with c_i the weights that row i has left, an SVD in a row metric.
3. Mixed-rank fine-tuning. In every forward pass each layer computes with W' if ``z = 1`` and with its factors if not,
   ``z ~ Bernoulli(p)``, p falling linearly to 0. Two passes with a z of their own share the loss, and the divergence
   between what they predict, in both directions, is added to it.

The authors' code is not public. What the paper leaves open is chosen here: scores compete within a layer, and the mask
keeps as many weights as the factors have numbers. The paper's score has a sign, ``-sum (dL/dW') * W``, so that what
training drives towards zero goes first. In runs of hundreds of steps the sign of a large term is chance, and the lowest
scores are those of weights that matter: a fifth of MiniLM's weights removed that way, after 35 steps and before any
training, leaves an accuracy of 0.500 on 400 kept-out sentences of SST-2, by the absolute score here 0.888. So the
stronger of the two is the baseline.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from lora_prune import removed_share
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from lora_svd.compact.convert import compact_module
from lora_svd.decompositions.svd import weighted_svd
from lora_svd.linalg import Metrics

PRUNE_EVERY = 10  # steps


class MixedRankLinear(nn.Module):
    """``y = (M * W) x + b`` or, once there are factors, by chance ``y = left (right x) + b``."""

    mixing = 0.0  # p: the chance of the pruned weight beside the factors

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.factors: nn.Module | None = None
        self.mask = torch.ones_like(linear.weight, dtype=torch.bool)
        self.score = torch.zeros_like(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.factors is not None and not (self.training and torch.rand(()) < self.mixing):
            return self.factors(x)
        weight = self.mask * self.linear.weight
        if weight.requires_grad and self.factors is None:
            weight.register_hook(self._observe)
        return F.linear(x, weight, self.linear.bias)

    def _observe(self, gradient: Tensor) -> None:
        self.score -= gradient * self.linear.weight.detach()

    def prune(self, density: float) -> None:
        """Keep the share ``density`` of the weights."""
        kept = self.score.flatten().abs().topk(round(density * self.score.numel())).indices
        self.mask.fill_(False).view(-1)[kept] = True

    @torch.no_grad()
    def factorize(self, rank: int) -> None:
        """Put factors beside the pruned weight."""
        pruned = (self.mask * self.linear.weight).double().cpu()
        kept = self.mask.sum(1).double().cpu()
        factors = weighted_svd(pruned, Metrics(row=kept), rank)
        self.factors = compact_module(factors, self.linear, self.linear.weight, "factors")


class Pruning(TrainerCallback):
    """Stage 1: prunes before every tenth optimizer step, since sorting takes as long as training, and the last."""

    def __init__(self, layers: list[MixedRankLinear], density: float) -> None:
        self.layers, self.density = layers, density

    def on_pre_optimizer_step(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step % PRUNE_EVERY and state.global_step < state.max_steps - 1:
            return
        gone = (1 - self.density) * removed_share(state.global_step, state.max_steps, warmup=0.1, cooldown=0.1)
        for layer in self.layers:
            layer.prune(1 - gone)


class Mixing(TrainerCallback):
    """Stage 3: lets the chance of the pruned weight fall."""

    def __init__(self, layers: list[MixedRankLinear], start: float) -> None:
        self.layers, self.start = layers, start

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        for layer in self.layers:
            layer.mixing = self.start * (1 - state.global_step / state.max_steps)


def wrap(model: nn.Module, names: list[str]) -> list[MixedRankLinear]:
    """Put a :class:`MixedRankLinear` in the place of every linear layer of these names."""
    layers = [MixedRankLinear(model.get_submodule(name)) for name in names]  # pyright: ignore[reportArgumentType]
    for name, layer in zip(names, layers, strict=True):
        model.set_submodule(name, layer)
    return layers


def prune(layers: list[MixedRankLinear], trainer: Trainer, param_ratio: float) -> None:
    """Stages 1 and 2, over one run of the trainer; all layers keep the same share."""
    trainer.add_callback(Pruning(layers, param_ratio))
    trainer.train()
    for layer in layers:
        out_features, in_features = layer.linear.weight.shape
        layer.factorize(max(1, int(param_ratio * out_features * in_features / (out_features + in_features))))


def train_mixed(
    layers: list[MixedRankLinear], trainer: Trainer, *, start: float = 0.5, consistency: float = 1.0
) -> None:
    """Stage 3, over one run of the trainer, which has not been made before the factors were."""
    trainer.add_callback(Mixing(layers, start))
    with consistent(trainer.model, consistency):
        trainer.train()


def unwrap(model: nn.Module) -> nn.Module:
    """Leave the factors in the places of the layers."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, MixedRankLinear)]
    for name, layer in found:
        assert layer.factors is not None
        model.set_submodule(name, layer.factors)
    return model


@contextmanager
def consistent(model: Any, weight: float) -> Iterator[None]:
    """Every forward pass with a gradient is made twice: the mean of both losses, and ``weight`` times the mean of both
    KL divergences between their predictions, averaged over samples."""

    def twice(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        if torch.is_grad_enabled():
            again = module.forward(*args, **kwargs)
            p, q = outputs.logits.log_softmax(-1), again.logits.log_softmax(-1)
            distance = sum(F.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in ((p, q), (q, p))) / 2
            outputs.loss = (outputs.loss + again.loss) / 2 + weight * distance

    hook = model.register_forward_hook(twice, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
