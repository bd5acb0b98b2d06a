"""What the observations mean: statistics of a layer -> the metrics in which its weight is factorized.

A preset names the statistics it needs and turns them into a row metric and a column metric. A new preset is one
function and one record in ``IMPORTANCES``; a statistic of its own, :func:`lora_svd.statistics.statistic`, one more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .errors import LoraSVDError
from .linalg import Metrics
from .statistics import STATISTICS, LayerStatistics


@dataclass(frozen=True)
class Importance:
    """A preset: what it reads of a layer and the metrics that it makes of it.

    Attributes:
        statistics: names in ``statistics.STATISTICS``, of what ``metrics`` reads.
        metrics: ``statistics -> Metrics``.
        elementwise: whether these are weights of single elements.

    Raises:
        LoraSVDError: a statistic is not registered.
    """

    statistics: tuple[str, ...]
    metrics: Callable[[LayerStatistics], Metrics]
    elementwise: bool = False

    def __post_init__(self) -> None:
        if unknown := [name for name in self.statistics if name not in STATISTICS]:
            raise LoraSVDError(f"importance: unknown statistic {unknown[0]!r}, expected some of {sorted(STATISTICS)}")

    @property
    def observed(self) -> tuple[str, ...]:
        """Names of the statistics that are collected: those that are read, and what these need."""
        needed = [name for read in self.statistics for name in sorted(STATISTICS[read].needs) if name in STATISTICS]
        return tuple(dict.fromkeys([*self.statistics, *needed]))


def lora(seen: LayerStatistics) -> Metrics:
    """Rows by ``J_i = sum_j ( G_BA,ij (w_ij + s (BA)_ij) )^2``, LoRAPrune's sensitivity under FWSVD's row assumption,
    from the gradients of LoRA's A and B alone: :func:`~lora_svd.statistics.lora_gradients.lora_gradient`.

    J is the loss change from zeroing a weight, not from perturbing it, and carries the scale of weight and input:
    published, kept as written, but not comparable across layers. Use "lora_diagonal" or "lora_activation".
    """
    return Metrics(row=seen.mean("lora_rows"))


def lora_minnorm(seen: LayerStatistics) -> Metrics:
    """Rows as in "lora", with the minimum-norm estimate of dL/dW, from the same gradients of A and B."""
    return Metrics(row=seen.mean("minnorm_rows"))


def lora_activation(seen: LayerStatistics) -> Metrics:
    """``C = sum g g^T`` for the rows and ``X = E[x x^T]`` for the columns, the metric of "kronecker", with C from sums
    of a few tokens' gradients, for a quarter of the work on outputs.

    It reads what "kronecker" reads, inputs and gradients of outputs in LoRA's backward pass, and no gradient of A or
    B. The error is in units of loss, comparable across layers.
    :func:`~lora_svd.statistics.sketch.signed_sums`.
    """
    return Metrics(row=seen.total("signed_output_gram"), column=seen.mean("input_gram"))


def lora_diagonal(seen: LayerStatistics) -> Metrics:
    """The diagonal of C for the rows, from the gradients of LoRA's B that the optimizer uses, and X for the columns: a
    third of the memory for statistics. :func:`~lora_svd.statistics.lora_gradients.gradient_rows`.
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
    "lora_activation": Importance(("signed_output_gram", "input_gram"), lora_activation),
    "lora_diagonal": Importance(("gradient_rows", "input_gram"), lora_diagonal),
    "fisher": Importance(("weight_gradient_rows",), fisher),
    "fisher_elementwise": Importance(("weight_gradient_square",), fisher_elementwise, elementwise=True),
    "activation_scale": Importance(("input_abs",), activation_scale),
    "activation": Importance(("input_gram",), activation),
    "gradient_activation": Importance(("output_square", "input_gram"), gradient_activation),
    "kronecker": Importance(("output_gram", "input_gram"), kronecker),
    "none": Importance((), plain),
}
