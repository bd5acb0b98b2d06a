"""KnGPT2 (Edalati et al., ACL 2022): every weight as one Kronecker product, taught by the model that it was.

``W ~ A (x) B`` with A (m1, n1) and B (m2, n2) at the least Frobenius distance, from the leading singular vectors of the
rearranged weight (Van Loan and Pitsianis 1993). A single product has one size for each pair of divisors of (out, in):
the largest within ``param_ratio`` is taken, and what is left of the budget keeps layers dense, those first that lose
the most for what they save. (The paper leaves every second block dense.)

Then all parameters are trained with the sum of the task's loss, the KL divergence from the dense model's prediction and
the mean squared distance of the hidden states behind the embedding and every block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_svd.compact.convert import compact_module
from lora_svd.decompositions import Factors, Split
from lora_svd.decompositions.kronecker import splits
from lora_svd.decompositions.svd import weighted_svd
from lora_svd.linalg import Metrics


@torch.no_grad()
def kronecker_products(model: nn.Module, names: list[str], param_ratio: float) -> nn.Module:
    """Replace linear layers in place so that at most ``param_ratio`` of their weights is kept."""
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    products = {name: nearest_product(layer.weight.double().cpu(), param_ratio) for name, layer in layers.items()}
    size = {name: layer.weight.numel() for name, layer in layers.items()}
    saved = {name: size[name] - product.left.numel() - product.right.numel() for name, product in products.items()}
    lost = {name: float((layers[name].weight.cpu() - product.product()).norm()) for name, product in products.items()}
    spare = int(param_ratio * sum(size.values()) + 1e-6) - sum(size.values()) + sum(saved.values())
    for name in sorted(names, key=lambda name: lost[name] ** 2 / saved[name], reverse=True):
        if saved[name] <= spare:
            spare -= saved[name]
        else:
            layer = layers[name]
            model.set_submodule(name, compact_module(products[name], layer, layer.weight, "factors"))
    return model


def nearest_product(weight: Tensor, param_ratio: float) -> Factors:
    """One term, the largest that takes at most ``param_ratio`` of the weight (out, in), float64; of equal ones the one
    that fits best.

    Raises:
        ValueError: even the smallest product is larger.
    """
    possible = splits(*weight.shape)
    affordable = [split for split in possible if sum(split.shape) <= param_ratio * weight.numel()]
    if not affordable:
        raise ValueError(
            f"param_ratio: {param_ratio} is too small for one product of a weight of {tuple(weight.shape)}, expected "
            f"at least {min(sum(split.shape) for split in possible) / weight.numel():.3f}"
        )
    largest = max(sum(split.shape) for split in affordable)
    terms = [one_term(weight, split) for split in affordable if sum(split.shape) == largest]
    return min(terms, key=lambda term: float((weight - term.product()).norm()))


def one_term(weight: Tensor, split: Split) -> Factors:
    """The nearest product of a split."""
    factors = weighted_svd(split.rearranged(weight), Metrics(), 1)
    return Factors(factors.left, factors.right, split)


@contextmanager
def taught_by(teacher: Any, model: Any) -> Iterator[None]:
    """Add the teacher's part to the loss of every forward pass with a gradient."""

    def add(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        with torch.no_grad():
            taught = teacher(*args, **{**kwargs, "output_hidden_states": True})
        prediction = outputs.logits.log_softmax(-1)
        outputs.loss = outputs.loss + F.kl_div(
            prediction, taught.logits.log_softmax(-1), reduction="batchmean", log_target=True
        )
        for student, target in zip(outputs.hidden_states, taught.hidden_states, strict=True):
            outputs.loss = outputs.loss + F.mse_loss(student, target)

    teacher.eval()
    shown, model.config.output_hidden_states = model.config.output_hidden_states, True
    hook = model.register_forward_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        model.config.output_hidden_states = shown
