"""Statistics of all blocks, and the layers in them that share neurons; one block is in memory at a time.

Forwards, and where statistics look at gradients backwards again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..allocation import LayerShape
from ..groups import GroupSearch, failing, found_groups, surprising
from ..neurons import NeuronGroup
from ..statistics import COUNTS, STATISTICS, LayerStatistics, token_summand
from ..statistics.backward import Observe
from ..statistics.shared import SharedGram
from ..statistics.tokens import observe_tokens
from .blocks import BlockCall, embed, loss_gradient, record_calls
from .cache import Cache, save_whole
from .checkpoint import Checkpoint


@dataclass(frozen=True)
class Observation:
    """What to observe, and where it goes.

    Attributes:
        checkpoint: the model.
        ids: token ids, (samples, tokens).
        layers: shapes of the linear layers, by name.
        statistics: to collect of each.
        seeks_groups: whether to look for layers that share neurons.
        sketches: r by layer and statistic, of Gram matrices that are kept as sketches.
        folder: of the files.
    """

    checkpoint: Checkpoint
    ids: Tensor
    layers: Mapping[str, LayerShape]
    statistics: tuple[str, ...]
    seeks_groups: bool
    sketches: Mapping[str, Mapping[str, int]]
    folder: Path

    def read(self, layer: str) -> LayerStatistics:
        """What was observed of a layer."""
        index = self.checkpoint.block_of(layer)
        assert index is not None
        with safe_open(self._file(index), framework="pt") as file:
            keys = [key for key in file.keys() if key.rpartition(":")[0] == layer]  # noqa: SIM118 - no mapping
            found = {key.rpartition(":")[2]: file.get_tensor(key) for key in keys}
        counts = found.pop("counts", torch.zeros(2, dtype=torch.int64)).tolist()
        return LayerStatistics(found, dict(zip(COUNTS, (*counts, 0), strict=True)))

    def groups(self) -> tuple[dict[str, NeuronGroup], dict[str, str]]:
        """The groups that were found, by consumer, and those without which, in part, a block does not run, with the
        reason."""
        groups, failed = {}, {}
        for index in range(len(self.checkpoint.blocks)):
            with safe_open(self._file(index), framework="pt") as file:
                found, reasons = json.loads(file.metadata()["groups"])
            for of in found:
                groups[of["consumer"]] = NeuronGroup(of["consumer"], tuple(of["producers"]), of["heads"])
            failed |= reasons
        return groups, failed

    @property
    def needs_gradients(self) -> bool:
        """Whether a statistic looks at gradients."""
        return any(STATISTICS[name].reads_gradients for name in self.statistics)

    def run(self) -> None:
        """Observe all blocks, but for those whose statistics are in the folder already."""
        num_blocks = len(self.checkpoint.blocks)
        if all(self._file(index).exists() for index in range(num_blocks)):
            return
        hidden, gradients = Cache(self.folder, "hidden"), Cache(self.folder, "gradient")
        calls = self._embed(hidden)
        if not self.needs_gradients:
            self._forwards(calls, hidden)
        else:
            if not self._file(num_blocks - 1).exists():
                self._forwards(calls, hidden)
                self._differentiate_loss(hidden, gradients)
            self._backwards(calls, hidden, gradients)

    def _file(self, index: int) -> Path:
        return self.folder / f"statistics-{index}.safetensors"

    def _done(self, cache: Cache, index: int) -> bool:
        return cache.has(index, len(self.ids) - 1)

    def _samples(self) -> Iterator[tuple[int, Tensor]]:
        return ((index, self.ids[index : index + 1]) for index in range(len(self.ids)))

    def _embed(self, hidden: Cache) -> list[BlockCall]:
        """How the blocks are called; the hidden states of the first one go to the cache."""
        outer = self.checkpoint.outer_weights()
        calls = record_calls(self.checkpoint, outer, self.ids[:1])
        if not (self._file(0).exists() or self._done(hidden, 0)):
            for sample, ids in self._samples():
                hidden.put(0, sample, embed(self.checkpoint, outer, ids))
        return calls

    def _forwards(self, calls: list[BlockCall], hidden: Cache) -> None:
        """From block to block; observed on the way if no statistic needs gradients, or else all states are kept."""
        observes = not self.needs_gradients
        for index in _progress(range(len(calls)), "forwards"):
            if self._file(index).exists() if observes else self._done(hidden, index + 1):
                continue
            weights, sums = self.checkpoint.block_weights(index), _Sums(self, index)
            with sums.watching(gradients=False) if observes else nullcontext():
                for sample, _ in self._samples():
                    given = self._get(hidden, index, sample)
                    hidden.put(index + 1, sample, calls[index](self.checkpoint, index, weights, given))
            if observes:
                self._save(index, sums, partial(calls[index], self.checkpoint, index, weights), hidden)
                hidden.drop(index)

    def _differentiate_loss(self, hidden: Cache, gradients: Cache) -> None:
        last = len(self.checkpoint.blocks)
        if self._done(gradients, last):
            return
        outer = self.checkpoint.outer_weights()
        for sample, ids in self._samples():
            given = self._get(hidden, last, sample)
            gradients.put(last, sample, loss_gradient(self.checkpoint, outer, ids, given))

    def _backwards(self, calls: list[BlockCall], hidden: Cache, gradients: Cache) -> None:
        for index in _progress(range(len(calls))[::-1], "backwards"):
            if not self._file(index).exists():
                weights, sums = self.checkpoint.block_weights(index), _Sums(self, index)
                with torch.enable_grad(), sums.watching(gradients=True):
                    for sample, _ in self._samples():
                        given = self._get(hidden, index, sample).requires_grad_()
                        result = calls[index](self.checkpoint, index, weights, given)
                        upstream = self._get(gradients, index + 1, sample)
                        gradients.put(index, sample, torch.autograd.grad(result, given, upstream)[0])
                self._save(index, sums, partial(calls[index], self.checkpoint, index, weights), hidden)
            gradients.drop(index + 1)
            hidden.drop(index + 1)

    def _save(self, index: int, sums: _Sums, block: Callable[[Tensor], Tensor], hidden: Cache) -> None:
        """Save the statistics of a block and the groups in it, which one sample shows."""
        groups, failed = {}, {}
        if self.seeks_groups:
            given = self._get(hidden, index, 0).requires_grad_()
            groups, failed = seek_groups(sums.modules, self.layers, lambda: block(given.clone()))  # it may change them
        said = [[asdict(group) for group in groups.values()], failed]
        save_whole(sums.value(), self._file(index), groups=json.dumps(said))

    def _get(self, cache: Cache, index: int, sample: int) -> Tensor:
        return cache.get(index, sample).to(self.checkpoint.device)


class _Sums:
    """Sums of the statistics of one block's layers."""

    def __init__(self, observation: Observation, index: int) -> None:
        self._observation, self._shared = observation, SharedGram()
        checkpoint = observation.checkpoint
        self.modules = {
            name: checkpoint.model.get_submodule(name)
            for name in observation.layers
            if checkpoint.block_of(name) == index
        }
        self._sums: dict[str, Tensor] = {}

    def _see(self, name: str, x: Tensor, g: Tensor | None = None) -> None:
        """What a layer was called with, and the gradient of its output; without one every token counts."""
        x = x.detach()
        seen, counts = observe_tokens(x, x.new_ones(*x.shape[:-1], 1) if g is None else g.detach(), self._shared)
        for statistic in self._observation.statistics:
            rank = self._observation.sketches.get(name, {}).get(statistic)
            self._add(f"{name}:{statistic}", token_summand(statistic, seen, rank))
        self._add(f"{name}:counts", torch.stack([counts[unit] for unit in COUNTS if unit in counts]))

    def _add(self, key: str, value: Tensor) -> None:
        if key in self._sums:
            self._sums[key] += value
        else:
            self._sums[key] = value.clone()  # layers with one input share it

    @contextmanager
    def watching(self, *, gradients: bool) -> Iterator[None]:
        """Adds every call of a layer: at once, or when the gradient of its output comes."""

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
            def see(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
                if gradients:
                    output.register_hook(partial(self._see, name, inputs[0]))
                else:
                    self._see(name, inputs[0])

            return see

        handles = [module.register_forward_hook(hook(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def value(self) -> dict[str, Tensor]:
        """Sums and counts by layer and statistic, on the CPU."""
        return {key: value.cpu() for key, value in self._sums.items()}


def seek_groups(
    modules: Mapping[str, nn.Module], shapes: Mapping[str, LayerShape], run: Callable[[], object]
) -> tuple[dict[str, NeuronGroup], dict[str, str]]:
    """As :meth:`Observation.groups`, of linear layers by name.

    run: a forward pass from a tensor that needs gradients.
    """
    search = GroupSearch(shapes)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def see(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            search.look(name, inputs[0])
            return Observe.apply(inputs[0], output.clone(), lambda *_: None, name)

        return see

    with torch.enable_grad(), ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(module.register_forward_hook(hook(name)))
        run()
    groups = found_groups([search])
    failed = failing(groups, modules, shapes, run)
    return {name: group for name, group in groups.items() if name not in failed}, surprising(failed, groups)


def _progress(indices: range, label: str) -> Iterable[int]:
    return tqdm(indices, desc=label, leave=False, delay=2)
