"""Which layers share neurons or heads, found by what the model does, not by its names.

A layer looks at where its input comes from, in the graph of a forward pass: its producers are the layers at the near
ends, whose names stand there (:class:`.statistics.backward.Observe`). It may share neurons with them if feature j of
its input depends on their features j, j + n, ... alone, and heads if the i-th of m parts of its input depends on the
i-th of m parts of their features alone. What is found is then tried: the model has to run without some of these units,
and what is left has to be what it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from .allocation import LayerShape
from .config import LoraSVDConfig
from .errors import LoraSVDError
from .neurons import NeuronGroup

_MOST_PRODUCERS = 4
_MOST_NODES = 256  # between a layer and its producers
_FEW_TOKENS = 64  # that are compared
_TOLERANCE = 1e-2  # of what rounding may change where a matrix has other shapes


@dataclass
class GroupSearch:
    """What layers have seen of their neighbours.

    Attributes:
        shapes: of the layers that may share neurons, by name.
        heads: whether heads are looked for as well.
        found: groups by consumer.
        refuted: consumers that were called once in another way.
    """

    shapes: Mapping[str, LayerShape]
    heads: bool = True
    found: dict[str, NeuronGroup] = field(default_factory=dict)
    refuted: set[str] = field(default_factory=set)

    def look(self, consumer: str, x: Tensor) -> None:
        """See where the input of a layer, with its graph, comes from."""
        group = group_of(consumer, x, self.shapes, heads=self.heads)
        if group is None or self.found.setdefault(consumer, group) != group:
            self.refuted.add(consumer)


def found_groups(searches: Iterable[GroupSearch]) -> dict[str, NeuronGroup]:
    """The groups on which all searches agree, by consumer; of two with a layer in common the first."""
    found: dict[str, NeuronGroup] = {}
    refuted: set[str] = set()
    for search in searches:
        others = {name for name, group in search.found.items() if found.setdefault(name, group) != group}
        refuted |= search.refuted | others
    groups: dict[str, NeuronGroup] = {}
    taken: set[str] = set()
    for consumer, group in sorted(found.items()):
        if consumer not in refuted and taken.isdisjoint(group.layers):
            groups[consumer] = group
            taken |= set(group.layers)
    return groups


def fields_of(groups: Mapping[str, NeuronGroup]) -> dict[str, Any]:
    """What a config says of groups."""
    return {
        "neuron_groups": {name: list(group.producers) for name, group in groups.items()},
        "group_heads": {name: group.heads for name, group in groups.items() if group.heads} or None,
    }


def groups_of(config: LoraSVDConfig) -> dict[str, NeuronGroup]:
    """What :func:`fields_of` has put there, by consumer."""
    heads = config.group_heads or {}
    return {name: NeuronGroup(name, tuple(of), heads.get(name)) for name, of in (config.neuron_groups or {}).items()}


def usable_groups(
    config: LoraSVDConfig, layers: Collection[str], found: Mapping[str, NeuronGroup] | None = None
) -> dict[str, NeuronGroup]:
    """The same, or those that were found, but for groups of which a layer is not among these, and heads that stay."""
    groups = (groups_of(config) if found is None else found) if config.prices_neurons else {}
    layers = set(layers)
    return {
        name: group
        for name, group in groups.items()
        if layers.issuperset(group.layers) and (config.heads or not group.heads)
    }


def group_of(consumer: str, x: Tensor, shapes: Mapping[str, LayerShape], *, heads: bool = True) -> NeuronGroup | None:
    """The layers whose output features make those of x one by one, or in equal parts; None if x is made in another way.

    Args:
        x: the input of the consumer with its graph.
        shapes: of the layers that may be among them.
        heads: whether equal parts are looked for.
    """
    nodes, width = _ends(x), x.shape[-1]
    names = [node.layer for node in nodes]
    if len(nodes) > 1 and _follow_each_other(nodes):  # a gradient would run through one of them
        return None
    if not nodes or consumer in names or not shapes.keys() >= {consumer, *names}:
        return None
    widths, producers = [shapes[name].out_features for name in names], tuple(sorted(names))
    if all(of % width == 0 for of in widths) and _are_apart(x, nodes, widths, NeuronGroup(consumer, producers)):
        return NeuronGroup(consumer, producers)
    for number in _possible_heads(x, nodes, widths) if heads else ():
        group = NeuronGroup(consumer, producers, number)
        if _are_apart(x, nodes, widths, group):
            return group
    return None


def _are_apart(x: Tensor, nodes: list[Any], widths: list[int], group: NeuronGroup) -> bool:
    """Whether units of x depend on the features of the same units of the producers alone: each two of them are on
    different sides of one of the splits by the digits of their numbers.

    widths: output features of the producers, in the order of their nodes.
    """
    units = group.units(x.shape[-1])
    for digit in range((units - 1).bit_length()):
        is_set = (torch.arange(units) >> digit & 1).bool()
        for chosen in (is_set, ~is_set):
            kept, others = chosen.nonzero().flatten(), (~chosen).nonzero().flatten()
            gradients = _gradients(x, nodes, group.features(kept, x.shape[-1], units))
            for width, gradient in zip(widths, gradients, strict=True):
                index = group.features(others, width, units)
                if gradient is not None and bool(gradient[..., index.to(x.device)].any()):
                    return False
    return True


def _gradients(x: Tensor, nodes: list[Any], features: Tensor) -> tuple[Tensor | None, ...]:
    """Of the sum of some features of x, with respect to the output at every node."""
    upstream = torch.zeros(x.shape[-1], dtype=x.dtype, device=x.device)
    upstream[features.to(x.device)] = 1
    edges = [GradientEdge(node, 0) for node in nodes]
    return torch.autograd.grad(x, edges, upstream.expand_as(x), retain_graph=True, allow_unused=True)


def _possible_heads(x: Tensor, nodes: list[Any], widths: list[int]) -> list[int]:
    """Numbers of heads, the largest first, that divide all widths and that what the first feature depends on allows."""
    most = x.shape[-1]
    for width, gradient in zip(widths, _gradients(x, nodes, torch.tensor([0])), strict=True):
        needed = 0 if gradient is None else int(gradient.flatten(0, -2).any(0).sum())
        most = min(most, width // max(needed, 1))
    common = math.gcd(x.shape[-1], *widths)
    return [number for number in range(most, 1, -1) if common % number == 0]


def _ends(x: Tensor) -> list[Any]:
    """The nodes of layers from which x is computed; none if there are others, or if they are far away."""
    ends, seen, waiting = [], set(), [x.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "layer", None), str):
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


def failing(
    groups: Mapping[str, NeuronGroup],
    modules: Mapping[str, nn.Module],
    shapes: Mapping[str, LayerShape],
    run: Callable[[], object],
) -> dict[str, str]:
    """The groups without which, in part, a model does not run, or not as with zeros in their place; with the reason.

    Args:
        modules, shapes: of their layers, by name.
        run: a forward pass, in evaluation mode.
    """
    failed = _failing(groups, modules, shapes, run)
    if failed and len(groups) > 1:  # one may make others fail: each kind on its own
        failed = {}
        for names in _kinds(groups):
            failed |= _failing({name: groups[name] for name in names}, modules, shapes, run)
    return failed


def surprising(failed: Mapping[str, str], groups: Mapping[str, NeuronGroup]) -> dict[str, str]:
    """What a user should hear of :func:`failing`: neurons, but not that a model has a fixed number of heads."""
    return {name: why for name, why in failed.items() if not groups[name].heads}


def describe_failing(failed: Mapping[str, str]) -> str:
    """A warning about :func:`failing`."""
    name, why = next(iter(failed.items()))
    more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    return (
        f"{name}{more}: takes neurons one by one, but the model does not run without some of them ({why}); they are "
        "left to ranks alone"
    )


def _kinds(groups: Iterable[str]) -> Iterator[list[str]]:
    """Names that differ in their indices alone."""
    kinds: dict[str, list[str]] = {}
    for name in groups:
        kinds.setdefault(".".join("*" if part.isdigit() else part for part in name.split(".")), []).append(name)
    yield from kinds.values()


def _failing(
    groups: Mapping[str, NeuronGroup],
    modules: Mapping[str, nn.Module],
    shapes: Mapping[str, LayerShape],
    run: Callable[[], object],
) -> dict[str, str]:
    units = {name: group.units(shapes[name].in_features) for name, group in groups.items()}
    kept = {name: torch.arange(1, number, 2) if number > 1 else torch.arange(1) for name, number in units.items()}
    try:
        expected = _inputs_without(groups, modules, shapes, run, kept, narrow=False)
        found = _inputs_without(groups, modules, shapes, run, kept, narrow=True)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return dict.fromkeys(groups, str(error).splitlines()[0] if str(error) else type(error).__name__)
    failed = {}
    for name in groups:
        for with_zeros, without in zip(expected[name], found[name], strict=True):
            if without.shape != with_zeros.shape:
                failed[name] = f"its input has {without.shape[-1]} features, expected {with_zeros.shape[-1]}"
            elif float((without - with_zeros).norm()) > _TOLERANCE * float(with_zeros.norm()):
                failed[name] = "others change with them"
    return failed


@torch.no_grad()
def _inputs_without(
    groups: Mapping[str, NeuronGroup],
    modules: Mapping[str, nn.Module],
    shapes: Mapping[str, LayerShape],
    run: Callable[[], object],
    kept: Mapping[str, Tensor],
    *,
    narrow: bool,
) -> dict[str, list[Tensor]]:
    """What the consumers are given of the units that are kept, call by call, where they count the others as zero.

    narrow: whether the others are not made at all.
    """
    inputs: dict[str, list[Tensor]] = {name: [] for name in groups}
    with ExitStack() as stack:
        for name, group in groups.items():
            width = shapes[name].in_features
            units = group.units(width)
            for producer in group.producers if narrow else ():
                index = group.features(kept[name], shapes[producer].out_features, units)
                stack.enter_context(modules[producer].register_forward_hook(_Selected(index)))
            hook = _Filled(group.features(kept[name], width, units), width, inputs[name], narrow=narrow)
            stack.enter_context(modules[name].register_forward_pre_hook(hook))
        run()
    return inputs


@dataclass
class _Selected:
    """Lets a layer give some features only."""

    index: Tensor

    def __call__(self, _module: nn.Module, _given: object, output: Tensor) -> Tensor:
        return output.index_select(-1, self.index.to(output.device))


@dataclass
class _Filled:
    """Gives a layer zeros for the features that are not kept, and notes the others."""

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
