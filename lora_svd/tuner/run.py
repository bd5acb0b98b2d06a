"""``AdapterRun``: all that one adapter's run has led to, from its first observed step to the size it ends at."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..allocation import LayerShape, budget_of, check_budget, given_ranks, kept_parameters
from ..compression import CompressionSettings, LayerInput, choose_ranks, compute_spectra, factorize
from ..config import LoraSVDConfig
from ..decompositions import Factors
from ..errors import LoraSVDError, in_module
from ..importance import IMPORTANCES
from ..schedule import Schedule, build_schedule
from ..statistics import STATISTICS
from . import distributed
from .adapter import LayerAdapter
from .layer import LoraSVDLinear
from .observer import pack_statistics
from .optimizer import gradients_are_finite, hand_over, has_all_factors, trained_parameters
from .targets import check_called, check_gradients

NOBODY_STEPS = "the adapter trains, but update_and_allocate is not called"
STEP_IT = (
    "Add LoraSVDCallback to the Trainer, lora_svd.attach(trainer), or call "
    "model.base_model.update_and_allocate(step) before optimizer.step()"
)


@dataclass(frozen=True)
class Compression:
    """What the layers of an adapter become at one size. A value: nothing has changed yet.

    Attributes:
        ranks: kept rank by layer; the full one means dense.
        factors: by layer; None where the weight stays.
        trained: factors as training has left them, by layer, from which other sizes start as well.
        chosen: the ranks that the user gave, if these are they.
    """

    ranks: dict[str, int]
    factors: dict[str, Factors | None]
    trained: dict[str, Factors]
    chosen: dict[str, int] | None


class AdapterRun:
    """The run of one adapter of a model: what it has chosen, and what its layers have become.

    A layer is observed while its weight is whole; :meth:`compressed_to` computes a size from what was observed, and
    :meth:`apply` lets its factors stand for the weights. The config in ``configs`` says the state: every change of it
    is a copy, since the user may give theirs to another model.

    Args:
        model: the adapted model.
        configs: of all its adapters, by name.
        name: of this one.
    """

    def __init__(self, model: nn.Module, configs: dict[str, Any], name: str) -> None:
        self.name = name
        self.model, self._configs = model, configs
        self._chosen: dict[str, int] | None = None  # compact_ranks of the user, once those in force stand in the config
        self._trained: dict[str, Factors] | None = None
        self._is_stepped = False
        self._before: list[float] | None = None
        self.missed_steps = 0

    @property
    def config(self) -> LoraSVDConfig:
        config = self._configs[self.name]
        assert isinstance(config, LoraSVDConfig)
        return config

    def _reconfigure(self, **changes: Any) -> None:
        config = copy.deepcopy(self.config)
        for field, value in changes.items():
            setattr(config, field, value)
        self._configs[self.name] = config

    @property
    def layers(self) -> dict[str, LoraSVDLinear]:
        """The adapter's layers by name; none are left after a merge."""
        modules = self.model.named_modules()
        return {
            name: layer for name, layer in modules if isinstance(layer, LoraSVDLinear) and layer.has_adapter(self.name)
        }

    def adapters(self) -> dict[str, LayerAdapter]:
        """What the adapter has in every layer."""
        return {name: layer.adapter(self.name) for name, layer in self.layers.items()}

    @property
    def settings(self) -> CompressionSettings:
        return CompressionSettings.of(self.config)

    @property
    def shapes(self) -> dict[str, LayerShape]:
        keep = self.config.compensation == "keep"
        return {name: layer.layer_shape(self.name, keep=keep) for name, layer in self.layers.items()}

    @property
    def chosen_ranks(self) -> dict[str, int] | None:
        """``compact_ranks`` as the user gave them; None: the allocation chooses."""
        return self._chosen if self.config.compressed else self.config.compact_ranks

    def schedule(self, total_steps: int | None = None) -> Schedule:
        """The phases of this run; raises if they do not fit into ``total_steps``."""
        config = self.config
        return build_schedule(
            warmup=config.warmup,
            compression=config.compression,
            interval=config.compression_interval,
            total_steps=total_steps or config.total_steps,
            param_ratio=config.param_ratio,
        )

    # -- size ----------------------------------------------------------------------------------------------------------

    def kept_parameters(self) -> int:
        """Numbers stored for the targeted weights as they stand."""
        config, shapes = self.config, self.shapes
        ranks = config.compact_ranks if config.compressed and config.compact_ranks else {}
        in_force = {name: ranks.get(name, shape.full_rank) for name, shape in shapes.items()}
        return kept_parameters(in_force, shapes, config.factor_format)

    def current_param_ratio(self) -> float:
        """Parameters kept / original parameters of the targeted weights as they stand: 1 until they are factorized."""
        return self.kept_parameters() / sum(shape.parameters for shape in self.shapes.values())

    def fits(self, param_ratio: float) -> bool:
        """Whether the weights are factorized and within this budget."""
        return self.config.compressed and self.kept_parameters() <= budget_of(self.shapes, param_ratio)

    def check_budget(self) -> None:
        """Raise if the target cannot be reached, or the ranks that were given do not reach it."""
        config, shapes = self.config, self.shapes
        if config.compact_ranks and not config.compressed:
            given_ranks(config.compact_ranks, shapes, config.param_ratio, config.factor_format)
        else:
            check_budget(shapes, config.param_ratio, config.factor_format)

    # -- compression ---------------------------------------------------------------------------------------------------

    def trained_factors(self) -> dict[str, Factors]:
        """Factors as training has left them, by layer, however many sizes were applied since; none if not trained."""
        if self._trained is not None or not self.config.train_factors:
            return self._trained or {}
        adapters = self.adapters().items()
        return {name: adapter.factors.value() for name, adapter in adapters if adapter.factors is not None}

    def inputs(self, *, gather: bool = False) -> dict[str, LayerInput]:
        """What the pipeline needs of every layer. ``gather``: all processes call it, so sharded weights can be read."""
        shapes, trained = self.shapes, self.trained_factors()
        return {
            name: LayerInput(
                shape=shapes[name],
                weight=_weight_reader(name, layer, gather=gather, mine=distributed.is_mine(index)),
                statistics=layer.adapter(self.name).observer.statistics,
                trained=trained.get(name),
            )
            for index, (name, layer) in enumerate(self.layers.items())
        }

    @torch.no_grad()
    def compressed_to(
        self,
        param_ratio: float,
        inputs: dict[str, LayerInput] | None = None,
        *,
        chosen: dict[str, int] | None = None,
        together: bool = False,
    ) -> Compression:
        """Ranks and factors at a size. Changes nothing.

        Args:
            param_ratio: the budget.
            inputs: :meth:`inputs`, if they are at hand.
            chosen: ranks to keep instead of those that the allocation would choose.
            together: whether all processes call it; each then computes its share of the layers.

        Raises:
            LoraSVDError: nothing was observed, or the size is out of reach.
        """
        divide = distributed.run_divided if together else distributed.run_alone
        config, settings, layers = self.config, self.settings, self.layers
        inputs = self.inputs(gather=together) if inputs is None else inputs
        shapes = {name: layer.shape for name, layer in inputs.items()}
        if param_ratio == 1:
            ranks = {name: shape.full_rank for name, shape in shapes.items()}
        elif chosen:
            ranks = given_ranks(chosen, shapes, config.param_ratio, config.factor_format)
        else:
            spectra = divide(inputs, lambda share: compute_spectra(share, settings).items())
            ranks = choose_ranks(inputs, spectra, param_ratio, settings)
        factors = divide(
            inputs,
            lambda share: (
                (name, found and layers[name].rounded_factors(found, trainable=config.trains_factors))
                for name, found in factorize(share, ranks, settings)
            ),
        )
        return Compression(ranks, factors, self.trained_factors(), chosen)

    def apply(self, result: Compression, *, param_ratio: float | None = None) -> None:
        """Let factors stand for the weights, and observe no more. ``param_ratio``: a new target."""
        self._trained, self._chosen = result.trained, result.chosen
        target = {} if param_ratio is None else {"param_ratio": param_ratio}
        self._reconfigure(compact_ranks=result.ranks, compressed=True, **target)
        adapters = self.adapters()
        for name, adapter in adapters.items():
            adapter.trains_factors = self.config.trains_factors
            adapter.set_factors(result.factors[name])
            adapter.observer.collect(self.config)
        pack_statistics(adapter.observer for adapter in adapters.values())

    # -- training ------------------------------------------------------------------------------------------------------

    def step(
        self,
        global_step: int,
        total_steps: int | None,
        optimizer: torch.optim.Optimizer | None,
        *,
        scaled: bool,
    ) -> None:
        """Observe an optimizer step and, where the schedule says so, compress; see ``update_and_allocate``."""
        schedule, layers = self.schedule(total_steps), self.layers
        self._is_stepped, self.missed_steps = True, 0
        units = {STATISTICS[name].per for name in IMPORTANCES[self.config.importance].statistics}
        if global_step == 0:  # what would fail after the warm-up fails now
            self.check_budget()
            check_called(layers, self.name, measured=bool(units))
        if global_step == 1 and units & {"token", "sample"}:
            check_gradients(layers, self.name)
        if gradients_are_finite(self.adapters(), global_step, scaled=scaled):
            self._observe_step(layers)
        budget = schedule.budget(global_step)
        self._trained = None
        if budget is not None and not self.fits(budget):
            self.join_statistics()
            before = trained_parameters(self.model)
            self.apply(self.compressed_to(budget, chosen=self.chosen_ranks, together=True))
            if self.config.trains_factors:
                hand_over(optimizer, self.model, before)
        elif optimizer is not None and self.config.trains_factors and not has_all_factors(optimizer, self.model):
            hand_over(optimizer, self.model, set())  # they were loaded after it was made
        self._trained = None  # the optimizer is about to change the factors

    def watch(self) -> None:
        """Count, forward pass by forward pass, the steps of an optimizer that nobody told this run of; warn of two."""
        if self._is_stepped or self.config.compressed or self.config.param_ratio == 1:
            return
        adapter = next(iter(self.adapters().values()), None)
        if adapter is None or distributed.is_sharded(adapter.A):
            return
        now = [float(side.detach().sum()) for side in (adapter.A, adapter.B)]
        self.missed_steps += self._before not in (None, now)
        if self.missed_steps == 2 and self._before != now:
            warnings.warn(f"{NOBODY_STEPS}: nothing is compressed before the merge. {STEP_IT}", stacklevel=2)
        self._before = now

    def _observe_step(self, layers: Mapping[str, LoraSVDLinear]) -> None:
        """Let the layers see the gradients of the step, with what A lets through of the inputs of all processes."""
        adapters = {name: layer.adapter(self.name) for name, layer in layers.items()}
        observed = {name: adapter for name, adapter in adapters.items() if adapter.has_step}
        inputs: list[Tensor | None] = [None] * len(observed)
        statistics = IMPORTANCES[self.config.importance].statistics
        if any("input_gram" in STATISTICS[name].needs for name in statistics):
            num_tokens = [adapter.observer.num_tokens(adapter.A.device) for adapter in observed.values()]
            distributed.all_reduce_(num_tokens)
            moments: list[Tensor] = []
            for (name, adapter), n in zip(observed.items(), num_tokens, strict=True):
                with in_module(name):
                    moments.append(adapter.observer.input_moments(distributed.gathered(adapter.A.detach()), n))
            distributed.all_reduce_(moments)
            inputs[:] = moments
        for index, (name, moments_of) in enumerate(zip(observed, inputs, strict=True)):
            with in_module(name):
                layers[name].observe_step(self.name, moments_of, mine=distributed.is_mine(index))

    def join_statistics(self) -> None:
        """Give every process the sums over all of them."""
        for adapter in self.adapters().values():
            adapter.observer.join(adapter.A.device)

    @property
    def has_joined_statistics(self) -> bool:
        """Whether what would be saved are the sums over all processes."""
        return all(adapter.observer.is_joined for adapter in self.adapters().values())

    @property
    def was_observed(self) -> bool:
        """Whether a layer has seen an optimizer step."""
        return any(adapter.observer.num_observed()["step"] for adapter in self.adapters().values())

    # -- loading -------------------------------------------------------------------------------------------------------

    def follow_loaded(self) -> None:
        """Say in the config what the tensors are that were loaded, of whatever phase, and go on observing if they are
        of the warm-up."""
        adapters = self.adapters()
        ranks = {name: adapter.kept_rank for name, adapter in adapters.items()}
        # Without factors the run is before its compression, unless that has left every layer dense.
        compressed = any(adapter.factors is not None for adapter in adapters.values()) or (
            self.config.compressed and self.config.compact_ranks == ranks
        )
        chosen = self.chosen_ranks
        self._trained, self._chosen = None, chosen
        state = {"compressed": compressed, "compact_ranks": ranks if compressed else chosen}
        if any(getattr(self.config, field) != value for field, value in state.items()):
            self._reconfigure(**state)
        for adapter in adapters.values():
            adapter.observer.collect(self.config)


def _weight_reader(name: str, layer: LoraSVDLinear, *, gather: bool, mine: bool) -> Callable[[], Tensor]:
    """Returns the weight, (out, in), on the CPU in float64. A sharded one is gathered at once, by all processes
    together, and kept where it is factorized."""
    if not distributed.is_sharded(layer.get_base_layer().weight):
        return lambda: layer.dense_weight().detach().cpu().double()
    if not gather:
        raise LoraSVDError(
            f"{name}: its weight is sharded over several processes. Save the adapter (trainer.save_model), and choose "
            "another size or merge in one process, after PeftModel.from_pretrained(model, folder)"
        )
    weight = distributed.gathered(layer.dense_weight().detach())
    return (weight.cpu() if mine else weight.new_empty(0)).double
