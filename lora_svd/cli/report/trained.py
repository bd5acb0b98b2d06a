"""A trained model's ranks and spectra, and its compact layers at other sizes; changes nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState

from ...allocation import LayerShape
from ...compact import LowRankEmbedding, TiedHead, parameter_report
from ...compression import choose_ranks, compute_spectra, factorize
from ...decompositions import DECOMPOSITIONS, Factors
from ...errors import LoraSVDError
from ...evaluation import Perplexity
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
    """

    layers: Mapping[str, LayerSummary]
    log: Sequence[Mapping[str, Any]]
    steps: int
    schedule: Schedule


class TrainedRun:
    """Layers of a finished training, and the compact layers that they give at any size.

    Made before ``merge_and_unload``, used after it: it holds the layers that the merge takes out of the model, and
    changes none of them. Without layers for ``param_ratio=1``, where nothing was observed.

    Args:
        tuner: the trained model's ``base_model``, with one active adapter.
        state: of the Trainer.
    """

    def __init__(self, tuner: LoraSVDModel, state: TrainerState) -> None:
        run = tuner.run()
        self._adapter, self._config, self._settings = run.name, run.config, run.settings
        self._layers, self._inputs = run.layers, run.inputs()
        self._state, self._schedule = state, run.schedule(state.max_steps)
        if self._config.param_ratio == 1:
            self._layers, self._inputs = {}, {}

    @cached_property
    def spectra(self) -> dict[str, Tensor]:
        """Squared singular values of every weight in its metrics, by layer."""
        return compute_spectra(self._inputs, self._settings)

    def summary(self) -> TrainingSummary:
        """Ranks, spectra and training log at the merged size."""
        ranks = self._config.compact_ranks or {}
        layers = {
            name: LayerSummary(layer.shape, ranks[name], self.spectra[name]) for name, layer in self._inputs.items()
        }
        return TrainingSummary(layers, self._state.log_history, self._state.global_step, self._schedule)

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
        for modules in self.modules(self._ranks(others)):
            with replaced(model, modules):
                perplexities[parameter_report(model).param_ratio] = measure(model)
        return perplexities

    def _ranks(self, param_ratios: Iterable[float]) -> list[dict[str, int]]:
        """Kept ranks for each of the sizes that can be reached."""
        ranks = []
        for param_ratio in param_ratios:
            try:
                ranks.append(choose_ranks(self._inputs, self.spectra, param_ratio, self._settings))
            except LoraSVDError as error:
                warnings.warn(f"report_sizes: {param_ratio} is left out of the report: {error}", stacklevel=3)
        return ranks

    @torch.no_grad()
    def modules(self, sizes: Sequence[Mapping[str, int]]) -> Iterator[dict[str, nn.Module]]:
        """The layers that ``set_param_ratio`` and ``merge_and_unload`` would have made, by name, size by size.

        Each weight is factorized once, at its largest rank, if the smaller ones are the leading parts of that.

        Args:
            sizes: kept rank by name, for each size.
        """
        if len(sizes) > 1 and DECOMPOSITIONS[self._settings.decomposition].elementwise:
            for ranks in sizes:
                yield from self.modules([ranks])
            return
        cut: dict[str, int] = {}
        for name, inputs in self._inputs.items():
            unchanged = inputs.shape.full_rank if inputs.trained is None else inputs.trained.rank
            cut[name] = max((ranks[name] for ranks in sizes if ranks[name] != unchanged), default=unchanged)
        largest = {
            name: factors and replace(factors, left=factors.left.float().cpu(), right=factors.right.float().cpu())
            for name, factors in factorize(self._inputs, cut, self._settings)
        }
        for ranks in sizes:
            yield {name: self._module(name, ranks[name], largest[name]) for name in self._layers}

    def _module(self, name: str, rank: int, largest: Factors | None) -> nn.Module:
        layer, inputs = self._layers[name], self._inputs[name]
        bypass = layer.adapter(self._adapter).bypass
        if inputs.trained is not None and rank == inputs.trained.rank:
            factors = inputs.trained
        elif largest is None or (inputs.trained is None and rank >= inputs.shape.full_rank):
            factors = None
        else:
            left, right = largest.left[:, :rank].to(bypass.left), largest.right[:rank].to(bypass.right)
            factors = replace(largest, left=left, right=right)
        return compact_layer(name, layer, inputs, factors, bypass, self._settings)


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
