"""Numbers of one matrix: its spectrum, the distribution of its entries; and means by depth and projection. Pure.

Every spectrum is in *energies*, squared singular values: those of a weight W; the eigenvalues of
``X = E[x x^T]``, which are the squared singular values of the matrix of all inputs x, divided by their number, and are
not squared again; and those of ``compression.compute_spectra``, the squared singular values of W in the metrics of
its layer. All numbers are thus comparable between weights, features and weighted weights.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

# The module, not the package's registry, because its plain spectrum is meant whatever a run chooses.
from ..decompositions.svd import weighted_spectrum
from ..errors import LoraSVDError, NumericalError
from ..linalg import INDEFINITE_TOLERANCE, Metrics, eigenvalues

SPECTRA = ("weight", "features", "weighted")
# An entry this small beside the root mean square adds a millionth of an average entry to the energy.
NEGLIGIBLE = 1e-3
# A normal distribution has two in a thousand million entries beyond.
OUTLIER_DEVIATIONS = 6.0

Group = TypeVar("Group", bound=Hashable)


@dataclass(frozen=True)
class SpectrumSummary:
    """Singular values ``s_1 >= s_2 >= ...`` in a few numbers; all are 0 for a matrix of zeros.

    Attributes:
        size: number of singular values, min(out, in) for a weight and in for features.
        energy: ``sum s_i^2``, the squared Frobenius norm.
        largest: ``s_1``, the spectral norm.
        nuclear_norm: ``sum s_i``.
        stable_rank: ``sum s_i^2 / s_1^2``.
        effective_rank: ``exp(-sum p_i log p_i)`` with ``p_i = s_i / sum s`` (Roy & Vetterli 2007). Others take
            ``p_i = s_i^2 / sum s^2``, for features the normalized eigenvalues of X, and get less.
        rank_90, rank_95, rank_99: the least k with ``sum_{i <= k} s_i^2`` at least this share of the energy.
        singular_values: (size,), float64, on the CPU, descending.
    """

    size: int
    energy: float
    largest: float
    nuclear_norm: float
    stable_rank: float
    effective_rank: float
    rank_90: int
    rank_95: int
    rank_99: int
    singular_values: Tensor = field(repr=False, compare=False)

    def numbers(self) -> dict[str, float]:
        """Every number by name; those that count ranks also as a share of ``size``, which compares across shapes."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.compare}
        ranks = ("effective_rank", "rank_90", "rank_95", "rank_99")
        return values | {f"{name}_share": values[name] / self.size for name in ranks}

    def energy_kept(self, share: float) -> float:
        """Share of the energy in the leading ``share`` of all singular values, rounded; share in [0, 1]."""
        return float(self.singular_values[: round(share * self.size)].square().sum()) / (self.energy or 1.0)


@dataclass(frozen=True)
class EntrySummary:
    """The entries w of a weight as one distribution.

    Attributes:
        mean: of w.
        variance: ``E[(w - mean)^2]``.
        kurtosis: excess kurtosis ``E[(w - mean)^4] / variance^2 - 3``: 0 for a normal distribution, 3 for Laplace's.
            0 where all entries are equal.
        sparsity: share of entries with ``|w| <= NEGLIGIBLE * sqrt(E[w^2])``, exact zeros included.
        outliers: share of entries with ``|w| > OUTLIER_DEVIATIONS * sqrt(variance)``.
        largest_deviation: ``max |w| / sqrt(variance)``; 0 where all entries are equal.
    """

    mean: float
    variance: float
    kurtosis: float
    sparsity: float
    outliers: float
    largest_deviation: float


@dataclass(frozen=True)
class LayerAnalysis:
    """One linear layer.

    Attributes:
        name: of the module.
        depth, projection: :func:`depth_and_projection` of it.
        shape: (out, in).
        rank: of the stored factors; None for a dense weight.
        entries: of the weight.
        weight: its spectrum.
        features: the spectrum of the layer's inputs; None where they were not observed.
        weighted: the spectrum of the weight in the metrics of its layer; None without an adapter.
    """

    name: str
    depth: int | None
    projection: str
    shape: tuple[int, int]
    rank: int | None
    entries: EntrySummary
    weight: SpectrumSummary
    features: SpectrumSummary | None = None
    weighted: SpectrumSummary | None = None

    def spectra(self) -> dict[str, SpectrumSummary]:
        """The spectra of this layer by name, one of ``SPECTRA``."""
        return {name: spectrum for name in SPECTRA if (spectrum := getattr(self, name)) is not None}

    def numbers(self) -> dict[str, float]:
        """Every number by a name such as "kurtosis" or "features.rank_90"."""
        numbers = dataclasses.asdict(self.entries)
        for name, spectrum in self.spectra().items():
            numbers |= {f"{name}.{key}": value for key, value in spectrum.numbers().items()}
        return numbers


def summarize_spectrum(energies: Tensor) -> SpectrumSummary:
    """Summary of squared singular values, in any order; shape (size,).

    Raises:
        NumericalError: one is not finite, or negative beyond rounding.
    """
    energies = energies.detach().cpu().double().sort(descending=True).values
    if not len(energies):
        raise LoraSVDError("spectrum: got no values, expected squared singular values")
    if not torch.isfinite(energies).all() or energies[-1] < -INDEFINITE_TOLERANCE * energies[0].abs():
        raise NumericalError(
            f"spectrum: got energies from {float(energies[-1]):.3g} to {float(energies[0]):.3g}, expected finite "
            "numbers, none negative"
        )
    energies = energies.clamp_min(0)
    values, energy = energies.sqrt(), float(energies.sum())
    shares = values / (float(values.sum()) or 1.0)
    return SpectrumSummary(
        size=len(values),
        energy=energy,
        largest=float(values[0]),
        nuclear_norm=float(values.sum()),
        stable_rank=energy / (float(energies[0]) or 1.0),
        effective_rank=float(torch.special.entr(shares).sum().exp()) if energy else 0.0,
        rank_90=energy_rank(energies, 0.90),
        rank_95=energy_rank(energies, 0.95),
        rank_99=energy_rank(energies, 0.99),
        singular_values=values,
    )


def energy_rank(energies: Tensor, share: float) -> int:
    """The least k whose leading k energies sum to ``share`` of all; 0 if all are zero. energies: (n,), descending."""
    cumulative = energies.double().cumsum(0)
    return int((cumulative < share * cumulative[-1]).sum()) + int(cumulative[-1] > 0)


def weight_spectrum(weight: Tensor) -> SpectrumSummary:
    """Spectrum of a weight (out, in), from the eigenvalues of its smaller Gram matrix in float64.

    Singular values below ``1e-8 s_1`` are rounding; a singular value decomposition would resolve them at many times
    the cost, and no number of the summary depends on them.
    """
    _check_finite(weight)
    return summarize_spectrum(weighted_spectrum(weight.detach().cpu().double(), Metrics()))


def feature_spectrum(gram: Tensor) -> SpectrumSummary:
    """Spectrum of features x from ``X = E[x x^T]``, (n, n), or (n,) if it is diagonal; not centred, so the mean of x is
    one of its directions.

    "Features are low-rank, but weights are not" (Yu & Wu 2023) takes the centred covariance of a layer's outputs.
    """
    _check_finite(gram)
    gram = gram.detach().cpu().double()
    return summarize_spectrum(gram if gram.dim() == 1 else eigenvalues(gram))


def summarize_entries(weight: Tensor) -> EntrySummary:
    """Distribution of the entries of a weight, in float64."""
    _check_finite(weight)
    entries = weight.detach().cpu().double()
    mean, size = float(entries.mean()), entries.abs()
    variance = float(entries.var(correction=0))
    deviation = variance**0.5
    root_mean_square = (variance + mean**2) ** 0.5
    return EntrySummary(
        mean=mean,
        variance=variance,
        kurtosis=float((entries - mean).div_(deviation).pow_(4).mean()) - 3 if variance else 0.0,
        sparsity=float((size <= NEGLIGIBLE * root_mean_square).double().mean()),
        outliers=float((size > OUTLIER_DEVIATIONS * deviation).double().mean()),
        largest_deviation=float(size.max()) / deviation if variance else 0.0,
    )


def analyze_layer(
    name: str,
    weight: Tensor,
    *,
    rank: int | None = None,
    input_gram: Tensor | None = None,
    weighted_energies: Tensor | None = None,
) -> LayerAnalysis:
    """Analyze one layer.

    Args:
        name: of the module.
        weight: (out, in), dequantized.
        rank: of the factors it is stored as, if any.
        input_gram: ``E[x x^T]``, (in, in) or its diagonal.
        weighted_energies: of the weight in its metrics, as ``compression.compute_spectra`` gives them.

    Raises:
        NumericalError: a value is not finite; the message names the layer.
    """
    depth, projection = depth_and_projection(name)
    out_features, in_features = weight.shape
    try:
        return LayerAnalysis(
            name=name,
            depth=depth,
            projection=projection,
            shape=(out_features, in_features),
            rank=rank,
            entries=summarize_entries(weight),
            weight=weight_spectrum(weight),
            features=None if input_gram is None else feature_spectrum(input_gram),
            weighted=None if weighted_energies is None else summarize_spectrum(weighted_energies),
        )
    except NumericalError as error:
        raise NumericalError(f"{name}: {error}") from error


def depth_and_projection(name: str) -> tuple[int | None, str]:
    """Depth and projection of a layer: the first number, and the last component, in its module's name.

    "model.layers.3.mlp.up_proj" is (3, "up_proj"); "lm_head" is (None, "lm_head").
    """
    parts = name.split(".")
    return next((int(part) for part in parts if part.isdecimal()), None), parts[-1]


def by_depth(layers: Mapping[str, LayerAnalysis]) -> dict[int | None, dict[str, float]]:
    """Means of every number over the layers of one depth, shallow first; layers without depth last, under None."""
    groups = _means(layers, lambda layer: layer.depth)
    return dict(sorted(groups.items(), key=lambda item: (item[0] is None, item[0])))


def by_projection(layers: Mapping[str, LayerAnalysis]) -> dict[str, dict[str, float]]:
    """Means of every number over the layers of one projection, in the order of their first layer."""
    return _means(layers, lambda layer: layer.projection)


def _means(
    layers: Mapping[str, LayerAnalysis], group: Callable[[LayerAnalysis], Group]
) -> dict[Group, dict[str, float]]:
    """Means over groups, each number over the layers that have it, and ``layers``, how many there are."""
    members: dict[Group, list[LayerAnalysis]] = defaultdict(list)
    for layer in layers.values():
        members[group(layer)].append(layer)
    return {key: {"layers": len(some), **mean_numbers(some)} for key, some in members.items()}


def mean_numbers(layers: list[LayerAnalysis]) -> dict[str, float]:
    """Mean of each number over the layers that have it."""
    values: dict[str, list[float]] = defaultdict(list)
    for layer in layers:
        for name, number in layer.numbers().items():
            values[name].append(number)
    return {name: statistics.fmean(numbers) for name, numbers in values.items()}


def _check_finite(matrix: Tensor) -> None:
    num_bad = int((~torch.isfinite(matrix)).sum())
    if num_bad:
        raise NumericalError(f"{num_bad} of {matrix.numel()} values are not finite, expected none")
