"""Weights of adapted layers that a model or a loss multiplies with itself, instead of calling the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from ..errors import LoraSVDError
from ..importance import IMPORTANCES

# What a loss that a trainer computes can be replaced by, in TRL.
OWN_LOSS = (
    "let the model compute its loss, with TRL by `class OwnLoss(SFTTrainer): compute_loss = "
    "transformers.Trainer.compute_loss`"
)


def noticed(weight: Tensor, notice: Callable[[], None]) -> Tensor:
    """A frozen weight whose gradient, which comes if something is computed with it, is noticed and dropped."""
    handed = weight.detach().requires_grad_()
    handed.register_hook(lambda _: notice())
    return handed


def refused(weight: Tensor, name: str, wanted: Iterable[str], is_hidden: Callable[[str], bool]) -> Tensor:
    """A weight that is refused in the backward pass if its gradient hides a statistic that is wanted.

    Args:
        name: of the module whose weight it is.
        is_hidden: whether a statistic is not seen in the gradient of the weight.
    """

    def refuse(_: Tensor) -> None:
        possible = [name for name, preset in IMPORTANCES.items() if not any(map(is_hidden, preset.observed))]
        raise LoraSVDError(
            f"importance: got one that observes single tokens of {name}, whose weight the loss reads instead of "
            f"calling the output layer (TRL's trainers, fused cross-entropy), expected one of {sorted(possible)}. Or "
            f"{OWN_LOSS}; or leave it out: exclude_modules={[name]}"
        )

    if weight.requires_grad and any(map(is_hidden, wanted)):
        weight.register_hook(refuse)
    return weight
