"""Which layers share neurons, found in the first step by what the model does, not by its names.

In the backward pass of the first step every layer looks at where its input comes from. Its producers are the adapted
layers at the near ends of that part of the graph; it may share neurons with them if feature j of its input depends on
their features j, j + n, ... alone. What is found is then tried: the model has to run without some of these neurons, and
what is left has to be what it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from ..compact.layers import layer_features
from ..config import LoraSVDConfig
from ..errors import LoraSVDError
from ..evaluation import evaluation_mode
from ..neurons import NeuronGroup
from . import distributed
from .adapter import LayerAdapter
from .layer import LoraSVDLinear

_MOST_PRODUCERS = 4
_MOST_NODES = 64  # between a layer and its producers
_FEW_TOKENS = 64  # that are compared
_TOLERANCE = 1e-2  # of what rounding may change where a matrix has other shapes


@dataclass
class GroupSearch:
    """What the layers of an adapter have seen of their neighbours in one step.

    Attributes:
        producers: by consumer, the names of the layers that make its neurons.
        refuted: consumers that were called once in another way.
    """

    producers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refuted: set[str] = field(default_factory=set)

    def look(self, layer: LoraSVDLinear, x: Tensor) -> None:
        """See where the input of a layer comes from, in its backward pass."""
        found = tuple(sorted(producer.key for producer in producers_of(layer, x)))
        if found and self.producers.setdefault(layer.key, found) == found:
            return
        self.refuted.add(layer.key)

    def groups(self) -> dict[str, NeuronGroup]:
        """The groups that were found in all processes, by consumer; of two with a layer in common the first."""
        seen = distributed.gathered_objects((self.producers, self.refuted))
        refuted = set().union(*(no for _, no in seen))
        groups: dict[str, NeuronGroup] = {}
        taken: set[str] = set()
        for consumer, producers in sorted({item for found, _ in seen for item in found.items()}):
            if consumer not in refuted and taken.isdisjoint({consumer, *producers}):
                groups[consumer] = NeuronGroup(consumer, producers)
                taken |= {consumer, *producers}
        return groups


def producers_of(layer: LoraSVDLinear, x: Tensor) -> list[LoraSVDLinear]:
    """The layers whose output features make those of x one by one; none if x is made in another way.

    Args:
        x: the input of ``layer`` with its graph.
    """
    width = x.shape[-1]
    nodes = _ends(x)
    layers = [node.layer for node in nodes]
    if len(nodes) > 1 and _follow_each_other(nodes):  # a gradient would run through one of them
        return []
    if not nodes or any(type(of) is not LoraSVDLinear or of is layer or of.out_features % width for of in layers):
        return []
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(0)) < 0.5
    for chosen in (drawn, ~drawn):
        mask = chosen.to(x.device)
        edges = [GradientEdge(node, 0) for node in nodes]
        gradients = torch.autograd.grad(x, edges, mask.to(x.dtype).expand_as(x), retain_graph=True, allow_unused=True)
        for gradient in gradients:
            if gradient is not None and bool(gradient.unflatten(-1, (-1, width))[..., ~mask].any()):
                return []
    return layers


def _ends(x: Tensor) -> list[Any]:
    """The nodes of adapted layers from which x is computed; none if there are others, or if they are far away."""
    ends, seen, waiting = [], set(), [x.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "layer", None), LoraSVDLinear):
            ends.append(node)
        elif not node.next_functions:  # a parameter that is trained
            return []
        waiting += () if node in ends else [following for following, _ in node.next_functions]
        if len(ends) > _MOST_PRODUCERS or len(seen) > _MOST_NODES:
            return []
    return ends


def _follow_each_other(nodes: list[Any]) -> bool:
    """Whether one of these nodes is computed from another one."""
    seen, waiting = set(), [following for node in nodes for following, _ in node.next_functions]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        if node in nodes:
            return True
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return False


def tried(
    groups: Mapping[str, NeuronGroup], model: nn.Module, layers: Mapping[str, LoraSVDLinear], given: Any
) -> dict[str, NeuronGroup]:
    """The groups without which, in part, the model runs and gives what it gives with zeros; others are named.

    Args:
        given: (arguments, keywords) of a forward pass.
    """
    failed = _failing(groups, model, layers, given)
    if failed and len(groups) > 1:  # one may make others fail: each kind on its own
        failed = {}
        for names in _kinds(groups):
            failed |= _failing({name: groups[name] for name in names}, model, layers, given)
    if failed:
        name, why = next(iter(failed.items()))
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        warnings.warn(
            f"{name}{more}: takes neurons one by one, but the model does not run without some of them ({why}); they "
            "are left to ranks alone",
            stacklevel=5,
        )
    return {name: group for name, group in groups.items() if name not in failed}


def _kinds(groups: Iterable[str]) -> Iterator[list[str]]:
    """Names that differ in their indices alone."""
    kinds: dict[str, list[str]] = {}
    for name in groups:
        kinds.setdefault(".".join("*" if part.isdigit() else part for part in name.split(".")), []).append(name)
    yield from kinds.values()


def _failing(
    groups: Mapping[str, NeuronGroup], model: nn.Module, layers: Mapping[str, LoraSVDLinear], given: Any
) -> dict[str, str]:
    """The groups that do not stand the trial, with the reason."""
    widths = {name: layers[name].in_features for name in groups}
    kept = {name: torch.arange(1, width, 2) if width > 1 else torch.arange(1) for name, width in widths.items()}
    try:
        expected = _inputs_without(groups, model, layers, given, kept, narrow=False)
        found = _inputs_without(groups, model, layers, given, kept, narrow=True)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return dict.fromkeys(groups, str(error).splitlines()[0] if str(error) else type(error).__name__)
    failing = {}
    for name in groups:
        for with_zeros, without in zip(expected[name], found[name], strict=True):
            if without.shape != with_zeros.shape:
                failing[name] = f"its input has {without.shape[-1]} features, expected {with_zeros.shape[-1]}"
            elif float((without - with_zeros).norm()) > _TOLERANCE * float(with_zeros.norm()):
                failing[name] = "others change with them"
    return failing


@torch.no_grad()
def _inputs_without(
    groups: Mapping[str, NeuronGroup],
    model: nn.Module,
    layers: Mapping[str, LoraSVDLinear],
    given: Any,
    kept: Mapping[str, Tensor],
    *,
    narrow: bool,
) -> dict[str, list[Tensor]]:
    """What the consumers are given of the neurons that are kept, call by call, where they count the others as zero.

    narrow: whether the others are not made at all.
    """
    inputs: dict[str, list[Tensor]] = {name: [] for name in groups}
    arguments, keywords = given
    with ExitStack() as stack:
        for name, group in groups.items():
            neurons, width = kept[name], layers[name].in_features
            for producer in group.producers if narrow else ():
                index = group.kept(neurons, layers[producer].out_features, width)
                stack.enter_context(_hooked(layers[producer].register_forward_hook(_Selected(index))))
            hook = _Filled(neurons, width, inputs[name], narrow=narrow)
            stack.enter_context(_hooked(layers[name].register_forward_pre_hook(hook)))
        stack.enter_context(evaluation_mode(model))
        model(*arguments, **keywords)
    return inputs


@contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@dataclass
class _Selected:
    """Lets a layer give some features only."""

    index: Tensor

    def __call__(self, _module: nn.Module, _given: object, output: Tensor) -> Tensor:
        return output.index_select(-1, self.index.to(output.device))


@dataclass
class _Filled:
    """Gives a layer zeros for the neurons that are not kept, and notes the others."""

    kept: Tensor
    width: int
    seen: list[Tensor]
    narrow: bool

    def __call__(self, _module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = given
        kept = self.kept.to(x.device)
        part = x if self.narrow else x.index_select(-1, kept)
        self.seen.append(part.flatten(0, -2)[:_FEW_TOKENS].float())
        if part.shape[-1] != len(kept):
            raise LoraSVDError(f"its input has {part.shape[-1]} features, expected {len(kept)}")
        return (part.new_zeros(*part.shape[:-1], self.width).index_copy(-1, kept, part), *others)


def mark(groups: Mapping[str, NeuronGroup], adapters: Mapping[str, LayerAdapter]) -> None:
    """Note in every layer's adapter, with which it is saved, the place of the layer that takes its neurons."""
    places = {name: place for place, name in enumerate(adapters)}
    consumers = {layer: consumer for consumer, group in groups.items() for layer in group.layers}
    for name, adapter in adapters.items():
        place = places.get(consumers.get(name, ""))
        adapter.group = None if place is None else torch.tensor([place], device=adapter.A.device)


def marked(adapters: Mapping[str, LayerAdapter]) -> dict[str, list[str]]:
    """Producers by consumer, as :func:`mark` has noted them."""
    names = list(adapters)
    consumers = {name: names[int(of.group)] for name, of in adapters.items() if of.group is not None}
    groups: dict[str, list[str]] = {consumer: [] for consumer in dict.fromkeys(consumers.values())}
    for name, consumer in consumers.items():
        if name != consumer:
            groups[consumer].append(name)
    return groups


def kept_features(model: nn.Module, config: LoraSVDConfig, name: str) -> tuple[int, int] | None:
    """(out, in) features of a layer of a compressed adapter that is without some neurons; None for another layer."""
    in_features, out_features = layer_features(_base(model, name))
    for consumer, producers in (config.neuron_groups or {}).items():
        width = (config.compact_widths or {}).get(consumer)
        if width is None or name not in (consumer, *producers):
            continue
        total = layer_features(_base(model, consumer))[0]
        if width > total:
            raise LoraSVDError(f"compact_widths: got {width} for {consumer}, expected at most its {total} neurons")
        return (out_features, width) if name == consumer else (out_features // total * width, in_features)
    return None


def _base(model: nn.Module, name: str) -> Any:
    module: Any = model.get_submodule(name)
    return getattr(module, "base_layer", module)
