"""What the observations mean: statistics of a layer -> the metrics in which its weight is factorized.

A preset names the statistics it needs and turns them into a row metric and a column metric. A new preset is one
function and one registry line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .linalg import Metrics
from .statistics import LayerStatistics


@dataclass(frozen=True)
class Importance:
    """A preset.

    Attributes:
        statistics: names in ``statistics.STATISTICS``.
        metrics: ``statistics -> Metrics``.
        elementwise: whether these are weights of single elements.
    """

    statistics: tuple[str, ...]
    metrics: Callable[[LayerStatistics], Metrics]
    elementwise: bool = False


def lora(seen: LayerStatistics) -> Metrics:
    """Rows by ``J_i = sum_j ( G_BA,ij ((BA)_ij + w_ij) )^2``, LoRAPrune's sensitivity under FWSVD's row assumption.

    J is the loss change from zeroing a weight, not from perturbing it, and carries the scale of weight and input:
    published, kept as written, but not comparable across layers. Use "lora_activation".
    """
    return Metrics(row=seen.mean("lora_rows"))


def lora_minnorm(seen: LayerStatistics) -> Metrics:
    """As "lora" with the minimum-norm estimate of the gradient."""
    return Metrics(row=seen.mean("minnorm_rows"))


def lora_activation(seen: LayerStatistics) -> Metrics:
    """``C = sum g g^T``, estimated from LoRA's gradients of segments of tokens, for the rows; ``X = E[x x^T]`` for the
    columns: :func:`lora_svd.statistics.segment_gradients`. The metric of "kronecker", so that the error is in units of
    loss, comparable across layers, for a quarter of the work on outputs.
    """
    return Metrics(row=seen.total("lora_gradient_gram"), column=seen.mean("input_gram"))


def lora_diagonal(seen: LayerStatistics) -> Metrics:
    """The diagonal of C alone, from LoRA's gradients of whole batches, and X: a third of the memory for statistics.
    :func:`lora_svd.statistics.gradient_rows`.
    """
    return Metrics(row=seen.mean("gradient_rows"), column=seen.mean("input_gram"))


def fisher(seen: LayerStatistics) -> Metrics:
    """FWSVD (Hsu et al. 2022): rows by ``sum_j E[(dL/dw_ij)^2]``, gradients of single samples, not of the batch mean.

    A widespread implementation weights input columns, and shifts the labels twice.
    """
    return Metrics(row=seen.mean("weight_gradient_rows"))


def fisher_elementwise(seen: LayerStatistics) -> Metrics:
    """TFWSVD (Hua et al. 2022): every element by its own ``E[(dL/dw_ij)^2]``, without the assumption on rows."""
    return Metrics(elements=seen.mean("weight_gradient_square"))


def activation_scale(seen: LayerStatistics) -> Metrics:
    """ASVD (Yuan et al. 2023): columns scaled by ``mean(|x_j|)^(1/2)``, so the metric is ``mean |x_j|``."""
    return Metrics(column=seen.mean("input_abs"))


def activation(seen: LayerStatistics) -> Metrics:
    """SVD-LLM (Wang et al. 2025): ``X = E[x x^T]``, the error of the layer's output."""
    return Metrics(column=seen.mean("input_gram"))


def gradient_activation(seen: LayerStatistics) -> Metrics:
    """The diagonal of ``C = sum g g^T`` for the rows and X for the columns."""
    return Metrics(row=seen.total("output_square"), column=seen.mean("input_gram"))


def kronecker(seen: LayerStatistics) -> Metrics:
    """``C = sum g g^T`` and ``X = E[x x^T]``: the loss to second order, ``1/2 tr(D^T C D X)`` (K-FAC).

    The sum over tokens, not the mean: a layer that sees one token of a sample, such as one behind a pooling, costs a
    loss that much less often than one that sees all of them.
    """
    return Metrics(row=seen.total("output_gram"), column=seen.mean("input_gram"))


def plain(seen: LayerStatistics) -> Metrics:
    """The identity on both sides: plain SVD."""
    return Metrics()


IMPORTANCES: dict[str, Importance] = {
    "lora": Importance(("lora_rows",), lora),
    "lora_minnorm": Importance(("minnorm_rows",), lora_minnorm),
    "lora_activation": Importance(("lora_gradient_gram", "input_gram"), lora_activation),
    "lora_diagonal": Importance(("gradient_rows", "input_gram"), lora_diagonal),
    "fisher": Importance(("weight_gradient_rows",), fisher),
    "fisher_elementwise": Importance(("weight_gradient_square",), fisher_elementwise, elementwise=True),
    "activation_scale": Importance(("input_abs",), activation_scale),
    "activation": Importance(("input_gram",), activation),
    "gradient_activation": Importance(("output_square", "input_gram"), gradient_activation),
    "kronecker": Importance(("output_gram", "input_gram"), kronecker),
    "none": Importance((), plain),
}
