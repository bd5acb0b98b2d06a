"""A trained model's ranks and spectra, and its compact layers at other sizes; changes nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainerState

from ...allocation import Allocation, LayerShape
from ...compact import LowRankEmbedding, TiedHead, parameter_report
from ...compression import choose_size, compute_spectra, factorize
from ...errors import LoraSVDError
from ...evaluation import Perplexity
from ...inputs import narrow_layers, units_of
from ...schedule import Schedule
from ...tuner.export import compact_layer
from ...tuner.model import LoraSVDModel


@dataclass(frozen=True)
class LayerSummary:
    """One targeted layer. rank: kept, the full one = dense. spectrum: squared singular values of the weight in its
    metrics, descending, float64, (full rank,)."""

    shape: LayerShape
    rank: int
    spectrum: Tensor

    @property
    def kept_share(self) -> float:
        """Kept rank / full rank."""
        return self.rank / self.shape.full_rank

    @property
    def importance(self) -> float:
        """Sum of the spectrum: what losing the weight would cost."""
        return float(self.spectrum.sum())

    @property
    def discarded(self) -> float:
        """Sum of the spectrum beyond the kept rank."""
        return 0.0 if self.rank >= self.shape.full_rank else float(self.spectrum[self.rank :].sum())


@dataclass(frozen=True)
class TrainingSummary:
    """Layers, log and schedule of a finished training.

    Attributes:
        layers: the targeted layers by name; empty if nothing was compressed.
        log: of the Trainer, one dict an entry, with ``step``.
        steps: optimizer steps done.
        schedule: phases of the run.
        neurons: kept share of the neurons by the layer that takes them; empty if none could go.
    """

    layers: Mapping[str, LayerSummary]
    log: Sequence[Mapping[str, Any]]
    steps: int
    schedule: Schedule
    neurons: Mapping[str, float] = field(default_factory=dict)


class TrainedRun:
    """Layers of a finished training, and the compact layers that they give at any size.

    Made before ``merge_and_unload``, used after it: it holds the layers that the merge takes out of the model, and
    changes none of them. Without layers for ``param_ratio=1``, where nothing was observed.

    Args:
        tuner: the trained model's ``base_model``, with one active adapter.
        state: of the Trainer.
    """

    def __init__(self, tuner: LoraSVDModel, state: TrainerState) -> None:
        self._run = run = tuner.run()
        self._adapter, self._config, self._settings = run.name, run.config, run.settings
        self._layers, self._inputs, self._groups = run.layers, run.inputs(), run.groups
        self._kept = run.kept_inputs(self._inputs)
        self._state, self._schedule = state, run.schedule(state.max_steps)
        if self._config.param_ratio == 1:
            self._layers, self._inputs, self._kept = {}, {}, {}

    @cached_property
    def spectra(self) -> dict[str, Tensor]:
        """Squared singular values of what is kept of every weight in its metrics, by layer."""
        return compute_spectra(self._kept, self._settings)

    def summary(self) -> TrainingSummary:
        """Ranks, spectra and training log at the merged size."""
        ranks = self._config.compact_ranks or {}
        layers = {
            name: LayerSummary(layer.shape, ranks[name], self.spectra[name]) for name, layer in self._kept.items()
        }
        neurons = {
            name: self._kept[name].shape.in_features / self._inputs[name].shape.in_features
            for name in self._groups
            if name in self._kept
        }
        return TrainingSummary(layers, self._state.log_history, self._state.global_step, self._schedule, neurons)

    def sketched(self) -> dict[str, float]:
        """The layers that kept a sketch of a Gram matrix, and their share of the targeted parameters."""
        total = sum(layer.shape.parameters for layer in self._inputs.values())
        return {
            name: layer.shape.parameters / total
            for name, layer in self._inputs.items()
            if self._layers[name].adapter(self._adapter).observer.is_sketched
        }

    def perplexities(
        self, model: nn.Module, param_ratios: Iterable[float], measure: Callable[[nn.Module], Perplexity]
    ) -> dict[float | None, Perplexity]:
        """Perplexity by the share of parameters kept: of the dense model (None), the merged one, and of other sizes
        without further training. A size out of reach is left out with a warning.

        Args:
            model: the compact model, which has other layers during the call only.
            param_ratios: sizes to try besides; none: measure nothing.
            measure: the evaluation.
        """
        others = [ratio for ratio in param_ratios if ratio != self._config.param_ratio]
        if not others or not self._layers:
            return {}
        with replaced(model, {name: layer.get_base_layer() for name, layer in self._layers.items()}):
            perplexities: dict[float | None, Perplexity] = {None: measure(model)}
        perplexities[parameter_report(model).param_ratio] = measure(model)
        for size in tqdm(self._sizes(others), desc="other sizes for the report", unit="size", leave=False, delay=2):
            with replaced(model, self.modules(size)):
                perplexities[parameter_report(model).param_ratio] = measure(model)
        return perplexities

    def _sizes(self, param_ratios: Iterable[float]) -> list[Allocation]:
        """What is kept at each of the sizes that can be reached."""
        sizes, choices = [], self._run.choices(units_of(self._inputs, self._groups), self._groups, self._settings)
        for param_ratio in param_ratios:
            try:
                sizes.append(choose_size(choices, param_ratio, self._settings))
            except LoraSVDError as error:
                warnings.warn(f"report_sizes: {param_ratio} is left out of the report: {error}", stacklevel=3)
        return sizes

    @torch.no_grad()
    def modules(self, size: Allocation) -> dict[str, nn.Module]:
        """The layers that ``set_param_ratio`` and ``merge_and_unload`` would have made, by name."""
        modules, inputs = {}, narrow_layers(self._inputs, self._groups, size.neurons)
        for name, factors in factorize(inputs, size.ranks, self._settings):
            layer = self._layers[name]
            bypass = layer.adapter(self._adapter).bypass
            if factors is not None:
                left, right = factors.left.to(bypass.left), factors.right.to(bypass.right)
                factors = replace(factors, left=left, right=right)
            modules[name] = compact_layer(name, layer, inputs[name], factors, bypass, self._settings)
        return modules


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other submodules of these names into ``model`` for the length of a with block. An output layer that is tied
    to one of them follows it."""
    tied = {id(part.weight): name for name in modules if _is_embedding(part := model.get_submodule(name))}
    heads = {
        name: _head(modules[tied[id(weight)]])
        for name, module in model.named_modules()
        if id(weight := getattr(module, "weight", None)) in tied and name not in modules
    }
    after = {**modules, **heads}
    before = {name: model.get_submodule(name) for name in after}
    try:
        for name, module in after.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, LowRankEmbedding | nn.Embedding)


def _head(embedding: Any) -> nn.Module:
    """The output layer that is tied to an embedding."""
    if isinstance(embedding, LowRankEmbedding):
        return TiedHead(embedding)
    head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
    head.weight = embedding.weight
    return head
