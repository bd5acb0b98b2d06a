"""``Observer``: what one adapter has seen of one layer, in one process or in its part of several."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ..importance import IMPORTANCES
from ..statistics import (
    COUNTS,
    STATISTICS,
    LayerStatistics,
    input_sketch,
    is_gram,
    pack,
    stored_shape,
    token_summand,
)
from ..statistics.limit import choose_sketches, describe_sketches
from ..statistics.shared import SharedGram
from ..statistics.sketch import between
from ..statistics.tokens import TokenObservation
from . import distributed

if TYPE_CHECKING:
    from ..config import LoraSVDConfig


class Observer(BufferDict):
    """The sums of one adapter in one layer, by statistic, and ``counts`` of what they ran over: buffers, saved with it.

    While several processes train, each keeps its part of the sums to itself, outside of the buffers, which DDP would
    overwrite. :meth:`join` adds the parts up and puts the totals into the buffers of every process; from the next
    observation on, process 0 continues with the totals and the others from nothing, so nothing counts twice.

    Args:
        shape: (out, in) of the layer.
        sketches: r by Gram matrix of which a sketch is kept; r = 0 of one that is diagonal.
    """

    def __init__(self, shape: tuple[int, int], sketches: Mapping[str, int]) -> None:
        super().__init__(persistent=True)
        self.shape, self.diagonals, self.sketches = shape, dict(sketches), dict(sketches)
        self.collects = False
        self.wanted: tuple[str, ...] = ()  # statistics, of which an importance may need none
        self.token_share = 1.0
        self._kept_on: str | None = None
        self._parts: dict[str, Tensor] = {}
        self.register_state_dict_post_hook(_clone_common_sums)

    def __getitem__(self, name: str) -> Tensor:
        total = super().__getitem__(name)
        assert total is not None
        return total

    def collect(self, config: LoraSVDConfig) -> None:
        """Collect the statistics of an adapter that trains and whose weight is whole; keep what there is otherwise."""
        self.collects = not (config.compressed or config.inference_mode or config.param_ratio == 1)
        self.wanted = IMPORTANCES[config.importance].observed if self.collects else ()
        self.token_share, self._kept_on = config.observed_tokens, config.statistics_device

    def keep_sketches(self, ranks: Mapping[str, int]) -> None:
        """Keep sketches of these Gram matrices, with these r; before anything is observed."""
        self.sketches = {**ranks, **self.diagonals}

    @property
    def is_sketched(self) -> bool:
        """Whether a Gram matrix is kept as a sketch that is not all of it."""
        return self.sketches != self.diagonals

    def sum_shape(self, name: str, *, packed: bool = False) -> tuple[int, ...]:
        """Shape of the sum that is kept; of its upper triangle if a whole Gram matrix is packed."""
        rank = self.sketches.get(name)
        shape = stored_shape(name, *self.shape, rank)
        return (shape[0] * (shape[0] + 1) // 2,) if packed and rank is None and STATISTICS[name].gram else shape

    def num_observed(self) -> dict[str, int]:
        """Tokens, samples and steps that were observed."""
        counts = self["counts"].tolist() if "counts" in self else [0] * len(COUNTS)
        return dict(zip(COUNTS, counts, strict=True))

    def statistics(self) -> LayerStatistics:
        """What was observed, on the CPU."""
        return LayerStatistics({name: self[name].cpu() for name in STATISTICS if name in self}, self.num_observed())

    # -- adding up -----------------------------------------------------------------------------------------------------

    def see(self, tokens: TokenObservation, counts: Mapping[str, Tensor], shared: SharedGram) -> None:
        """Add one backward pass of the layer."""
        for name in self.wanted:
            if STATISTICS[name].per != "step":
                self.add(name, token_summand(name, tokens, self.sketches.get(name)), shared)
        for unit, count in counts.items():
            self.count(unit, count, count.device)

    def add(self, name: str, value: Tensor, shared: SharedGram) -> None:
        """Add one summand to a sum."""
        sums = self._sums(name)
        total = sums[name] if name in sums else None  # noqa: SIM401 - a BufferDict has no get
        sums[name] = shared.add(total, value, self._device_of(name, value.device))

    def count(self, unit: str, count: Tensor | int, device: torch.device) -> None:
        """Say that sums ran over more tokens, samples or steps, of a layer on that device."""
        counts = self._sums("counts")
        if "counts" not in counts:
            counts["counts"] = self._zeros("counts", device)
        counts["counts"][COUNTS.index(unit)] += count

    def num_tokens(self, device: torch.device) -> Tensor:
        """Tokens that this process has observed."""
        return self._total("counts", device)[COUNTS.index("token")].clone()

    def input_moments(self, A: Tensor, num_tokens: Tensor) -> Tensor:
        """``[A E[x x^T] A^T, A E[x]]``, (r, r + 1), of the tokens that this process has observed, of ``num_tokens`` in
        all processes. A: (r, in)."""
        gram, total = (self._total(name, A.device) for name in ("input_gram", "input_sum"))
        through = input_sketch if "input_gram" not in self.sketches else between
        with torch.autocast(device_type=A.device.type, enabled=False):
            on_device = A.float().to(gram.device)
            moments = torch.cat([through(on_device, gram), (on_device.double() @ total.double())[:, None]], dim=1)
        # of 0 tokens while all output gradients are zero
        return moments.to(A.device) / num_tokens.clamp_min(1).to(A.device)

    def _total(self, name: str, device: torch.device) -> Tensor:
        """The sum of this process so far."""
        sums = self._sums(name)
        return sums[name] if name in sums else self._zeros(name, device)

    # -- several processes ---------------------------------------------------------------------------------------------

    def join(self, device: torch.device) -> None:
        """Give every process the sums over all of them; what is added afterwards is its own part again.

        Args:
            device: of the layer, on which processes can communicate.
        """
        if distributed.world_size() == 1 or not self.collects:
            return
        for name in (*self.wanted, "counts"):
            sums = self._sums(name)
            total = sums.pop(name) if name in sums else self._zeros(name, device)
            on_device = total.to(device, copy=True)  # other layers may share it
            distributed.all_reduce_([on_device])
            self[name] = on_device.to(total.device)

    @property
    def is_joined(self) -> bool:
        """Whether the saved sums are those over all processes."""
        return not self._parts

    def _sums(self, name: str) -> MutableMapping[str, Tensor]:
        """Where a sum is added up. Of several processes each has its part; one of them goes on with what is saved."""
        if distributed.world_size() == 1:
            return self  # pyright: ignore[reportReturnType] - all of a mapping that is used here
        if name in self:
            total = self[name]
            del self[name]
            if distributed.is_mine(0):
                self._parts[name] = total
        return self._parts

    def _zeros(self, name: str, device: torch.device) -> Tensor:
        if name == "counts":
            return torch.zeros(len(COUNTS), dtype=torch.int64, device=device)
        return torch.zeros(self.sum_shape(name), device=self._device_of(name, device))

    def _device_of(self, name: str, device: torch.device) -> torch.device:
        """Where a sum is kept; counts stay with the layer."""
        return device if name == "counts" or self._kept_on is None else torch.device(self._kept_on)

    # -- storage -------------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Drop every sum."""
        self.clear()
        self._parts.clear()

    def make_room(self, saved: Mapping[str, Tensor], device: torch.device) -> None:
        """Hold the sums that are about to be loaded, of their shapes, and no other."""
        self.forget()
        for name in (*STATISTICS, "counts"):
            if name in saved:
                self[name] = torch.empty_like(saved[name], device=self._device_of(name, device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Observer:
        """Move the sums with the model, but keep their dtype: in half precision they would be of no use."""
        before: dict[str, Any] = dict(self.items())
        super()._apply(fn, recurse)
        after: dict[str, Any] = dict(self.items())
        for name, moved in after.items():
            if moved.dtype != before[name].dtype:
                self[name] = before[name].to(moved.device)
        return self


def pack_statistics(observers: Iterable[Observer]) -> None:
    """Keep half of each Gram matrix from now on, since nothing is added any more; equal ones still once."""
    packed: dict[int, tuple[Tensor, Tensor]] = {}  # by id, which the first of the two keeps valid
    for observer in observers:
        for name in STATISTICS:
            if name in observer and is_gram(name, total := observer[name]):
                if id(total) not in packed:
                    packed[id(total)] = (total, pack(total))
                observer[name] = packed[id(total)][1]


def _clone_common_sums(_observer: nn.Module, state: MutableMapping[str, Any], prefix: str, _metadata: Any) -> None:
    """Copy the sums that layers with one input have in common: what saves tensors may leave out such doubles."""
    for name, statistic in STATISTICS.items():
        if statistic.gram and statistic.side == "columns" and (key := prefix + name) in state:
            state[key] = state[key].clone()


def keep_to_limit(observers: Mapping[str, Observer], config: LoraSVDConfig) -> None:
    """Let observers keep sketches of Gram matrices where ``statistics_limit`` asks for it, and say which in a warning.

    Args:
        observers: by layer, in the order of the model.
    """
    shapes = {name: observer.shape for name, observer in observers.items()}
    diagonals = {name: observer.diagonals for name, observer in observers.items()}
    statistics = IMPORTANCES[config.importance].observed
    sketches = choose_sketches(shapes, statistics, config.statistics_limit, diagonals)
    for name, observer in observers.items():
        observer.keep_sketches(sketches.get(name, {}))
    if sketches and any(observer.collects for observer in observers.values()):
        warnings.warn(describe_sketches(shapes, sketches, config.statistics_limit), stacklevel=3)
