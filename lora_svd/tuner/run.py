"""``AdapterRun``: all that one adapter's run has led to, from its first observed step to the size it ends at."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..allocation import Choice, LayerShape, budget_of, check_size, kept_parameters
from ..compression import choose_size, factorize, given_size, size_choices
from ..config import LoraSVDConfig
from ..decompositions import Factors
from ..errors import LoraSVDError, in_module
from ..evaluation import evaluation_mode
from ..groups import GroupSearch, describe_failing, failing, fields_of, found_groups, surprising, usable_groups
from ..importance import IMPORTANCES
from ..inputs import CompressionSettings, LayerInput, narrow_units, units_of
from ..neurons import NeuronGroup
from ..schedule import Schedule, build_schedule
from ..statistics import STATISTICS
from . import distributed
from .adapter import LayerAdapter
from .groups import mark, marked
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
class ChosenSize:
    """Ranks by layer and kept neurons by group that a user gave."""

    ranks: dict[str, int]
    widths: dict[str, int]


@dataclass(frozen=True)
class Compression:
    """What the layers of an adapter become at one size. A value: nothing has changed yet.

    Attributes:
        ranks: kept rank by layer; the full one means dense.
        factors: by layer; None where the weight stays.
        trained: factors as training has left them, by layer, from which other sizes start as well.
        chosen: the ranks and widths that the user gave, if these are they.
        widths: kept neurons by group, of those that lose some.
    """

    ranks: dict[str, int]
    factors: dict[str, Factors | None]
    trained: dict[str, Factors]
    chosen: ChosenSize | None
    widths: dict[str, int]


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
        self._chosen: ChosenSize | None = None  # of the user, once what is in force stands in the config
        self._trained: dict[str, Factors] | None = None
        self._choices: tuple[object, dict[str, list[Choice]]] | None = None  # and what they depend on
        self._is_stepped = False
        self._before: list[float] | None = None
        self.missed_steps = 0
        self.search: GroupSearch | None = None  # until groups are found
        self.batch: Any = None  # of the first forward pass, while they are sought

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
    def kept_shapes(self) -> dict[str, LayerShape]:
        """As they stand: without the features of neurons that are gone."""
        factors = {name: layer.adapter(self.name).factors for name, layer in self.layers.items()}
        return {
            name: shape if (of := factors[name]) is None else shape.narrowed(of.rows, of.columns)
            for name, shape in self.shapes.items()
        }

    @property
    def groups(self) -> dict[str, NeuronGroup]:
        """Layers that share neurons, by the name of the one that takes them."""
        return usable_groups(self.config, self.layers)

    @property
    def chosen_size(self) -> ChosenSize | None:
        """``compact_ranks`` and ``compact_widths`` as the user gave them; None: the allocation chooses."""
        if self.config.compressed:
            return self._chosen
        ranks = self.config.compact_ranks
        return None if ranks is None else ChosenSize(ranks, self.config.compact_widths or {})

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
        config, shapes = self.config, self.kept_shapes
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
        config = self.config
        given = None if config.compressed else config.compact_ranks
        check_size(self.shapes, config.param_ratio, config.factor_format, given, config.compact_widths)

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
            for name, layer, index in self._owned()
        }

    def _owned(self) -> Iterator[tuple[str, LoraSVDLinear, int]]:
        """Every layer with the index of its unit, which says whose work it is: a group is one process's."""
        layers = self.layers
        index = {name: i for i, unit in enumerate(units_of(layers, self.groups).values()) for name in unit}
        for name, layer in layers.items():
            yield name, layer, index[name]

    def kept_inputs(self, inputs: Mapping[str, LayerInput]) -> dict[str, LayerInput]:
        """The same of what is kept of every layer as it stands."""
        factors = {name: layer.adapter(self.name).factors for name, layer in self.layers.items()}
        return {
            name: given if (of := factors[name]) is None else given.narrowed(of.rows, of.columns)
            for name, given in inputs.items()
        }

    @torch.no_grad()
    def compressed_to(
        self,
        param_ratio: float,
        inputs: dict[str, LayerInput] | None = None,
        *,
        chosen: ChosenSize | None = None,
        together: bool = False,
    ) -> Compression:
        """Ranks and factors at a size. Changes nothing.

        Args:
            param_ratio: the budget.
            inputs: :meth:`inputs`, if they are at hand.
            chosen: ranks and widths to keep instead of those that the allocation would choose.
            together: whether all processes call it; each then computes its share of the layers.

        Raises:
            LoraSVDError: nothing was observed, or the size is out of reach.
        """
        divide = distributed.run_divided if together else distributed.run_alone
        config, settings, layers, groups = self.config, self.settings, self.layers, self.groups
        inputs = self.inputs(gather=together) if inputs is None else inputs
        units = units_of(inputs, groups)
        neurons: dict[str, Tensor] = {}
        if param_ratio == 1:
            ranks = {name: layer.shape.full_rank for name, layer in inputs.items()}
        elif chosen:
            ranks, neurons = given_size(units, groups, chosen.ranks, chosen.widths, config.param_ratio, settings)
        else:
            allocation = choose_size(self.choices(units, groups, settings, divide), param_ratio, settings)
            ranks, neurons = allocation.ranks, allocation.neurons
        kept = narrow_units(units, groups, neurons)

        def factors_of(share: Mapping[str, dict[str, LayerInput]]) -> Iterator[tuple[str, dict[str, Factors | None]]]:
            for unit, of in share.items():
                yield (
                    unit,
                    {
                        name: found and layers[name].rounded_factors(found, trainable=config.trains_factors)
                        for name, found in factorize(of, ranks, settings)
                    },
                )

        found = divide(kept, factors_of)
        factors = {name: of for by_layer in found.values() for name, of in by_layer.items()}
        widths = {name: len(index) for name, index in neurons.items()}
        return Compression(
            {name: ranks[name] for name in inputs},
            {name: factors[name] for name in inputs},
            self.trained_factors(),
            chosen,
            widths,
        )

    def choices(
        self,
        units: Mapping[str, Mapping[str, LayerInput]],
        groups: Mapping[str, NeuronGroup],
        settings: CompressionSettings,
        divide: Callable[..., dict[str, list[Choice]]] = distributed.run_alone,
    ) -> dict[str, list[Choice]]:
        """What every unit can keep, computed once for all sizes until more is observed."""
        shapes = {name: layer.shape for layers in units.values() for name, layer in layers.items()}
        known = (settings, groups, shapes)
        if self._choices is None or self._choices[0] != known:
            self._choices = known, divide(units, lambda share: size_choices(share, groups, settings))
        return self._choices[1]

    def apply(self, result: Compression, *, param_ratio: float | None = None) -> None:
        """Let factors stand for the weights, and observe no more. ``param_ratio``: a new target."""
        self._trained, self._chosen = result.trained, result.chosen
        target = {} if param_ratio is None else {"param_ratio": param_ratio}
        self._reconfigure(compact_ranks=result.ranks, compact_widths=result.widths or None, compressed=True, **target)
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
        if self.search is not None:
            self._find_groups(self.search)
        budget = schedule.budget(global_step)
        self._trained = None
        if budget is not None and not self.fits(budget):
            self.join_statistics()
            before = trained_parameters(self.model)
            self.apply(self.compressed_to(budget, chosen=self.chosen_size, together=True))
            if self.config.trains_factors:
                hand_over(optimizer, self.model, before)
        elif optimizer is not None and self.config.trains_factors and not has_all_factors(optimizer, self.model):
            hand_over(optimizer, self.model, set())  # they were loaded after it was made
        self._trained = None  # the optimizer is about to change the factors

    def seek_groups(self) -> None:
        """Let the layers look, in the next step, for those that share neurons."""
        config = self.config
        adapters = self.adapters().values()
        if config.prices_neurons and config.neuron_groups is None and any(of.observer.collects for of in adapters):
            shapes, layers = self.shapes, self.layers.items()
            shapes = {name: shapes[name] for name, layer in layers if layer.num_ids is None}
            self._set_search(GroupSearch(shapes, heads=config.heads))

    def _set_search(self, search: GroupSearch | None) -> None:
        self.search, self.batch = search, None
        for adapter in self.adapters().values():
            adapter.search = search

    def _find_groups(self, search: GroupSearch) -> None:
        """Take up the groups that a step has shown and that the model runs without."""
        groups, batch, failed = found_groups(distributed.gathered_objects(search)), self.batch, {}
        self._set_search(None)
        if batch is None or any(distributed.is_sharded(p) for p in self.model.parameters()):
            groups = {name: group for name, group in groups.items() if not group.heads}  # which have to be tried
        elif groups:
            args, kwargs = batch
            with evaluation_mode(self.model):
                failed = failing(groups, self.layers, search.shapes, lambda: self.model(*args, **kwargs))
        if named := surprising(failed, groups):
            warnings.warn(describe_failing(named), stacklevel=4)
        refused = set().union(*distributed.gathered_objects(set(failed)))
        groups = {name: group for name, group in groups.items() if name not in refused}
        mark(groups, self.adapters())
        self._reconfigure(**fields_of(groups))

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
        self._choices = None if observed else self._choices
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
        chosen = self.chosen_size
        self._trained, self._chosen, self._choices = None, chosen, None
        groups = marked(adapters)
        if compressed or groups:
            self._set_search(None)
        widths = {
            name: len(of.columns) * group.units(whole := self.layers[name].in_features) // whole
            for name, group in groups.items()
            if (of := adapters[name].factors) and of.columns is not None
        }
        given = (chosen and chosen.widths) or None
        state = {
            "compressed": compressed,
            "compact_ranks": ranks if compressed else chosen and chosen.ranks,
            "compact_widths": (widths or None) if compressed else given,
            **(fields_of(groups) if groups else {}),
        }
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
