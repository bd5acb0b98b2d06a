"""``ObservedLayer``: how a layer adds up its statistics, in one process or in its part of several."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from . import distributed
from .importance import IMPORTANCES
from .peft_type import PREFIX
from .sketch import between
from .statistics import (
    COUNTS,
    STATISTICS,
    LayerStatistics,
    StepObservation,
    input_sketch,
    is_gram,
    pack,
    stored_shape,
    token_summand,
)
from .statistics_limit import choose_sketches, describe_sketches
from .tokens import Observe, SharedGram, TokenObservation, observe_tokens

if TYPE_CHECKING:
    from .config import LoraSVDConfig

STATE = (*STATISTICS, "counts")


class Sums(BufferDict):
    """Sums by adapter, which move with the model and keep their dtype: in half precision they would be of no use."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Sums:
        before: dict[str, Any] = dict(self.items())
        super()._apply(fn, recurse)
        after: dict[str, Any] = dict(self.items())
        for name, moved in after.items():
            if moved.dtype != before[name].dtype:
                self[name] = before[name].to(moved.device)
        return self


class ObservedLayer(nn.Module, BaseTunerLayer):
    """Sums over tokens and steps, by adapter, in buffers that are saved with it.

    While several processes train, each keeps its part of the sums to itself, outside of the buffers, which DDP would
    overwrite. :meth:`join_statistics` adds the parts up and puts the totals into the buffers of every process; from the
    next observation on, process 0 continues with the totals and the others from nothing, so nothing counts twice.
    """

    lora_svd_A: nn.ParameterDict
    lora_svd_B: nn.ParameterDict
    scaling: dict[str, float]
    in_features: int
    out_features: int
    num_ids: int | None = None  # of an embedding, whose inputs are ids
    diagonals: ClassVar[Mapping[str, int]] = {}  # Gram matrices of which a sketch with r = 0 is all there is

    def dense_weight(self) -> Tensor:
        """The frozen weight, (out, in)."""
        raise NotImplementedError

    def _init_observation(self, shared: SharedGram) -> None:
        for name in STATE:
            setattr(self, PREFIX + name, Sums(persistent=True))
        self._parts: dict[str, dict[str, Tensor]] = {name: {} for name in STATE}
        self._observed: dict[str, tuple[str, ...]] = {}
        self._token_shares: dict[str, float] = {}
        self._sketches: dict[str, Mapping[str, int]] = {}  # r by statistic, by adapter
        self._statistics_device: dict[str, str | None] = {}
        self._shared = shared
        self.register_state_dict_post_hook(_apart)

    def _state(self, name: str) -> MutableMapping[str, Tensor]:
        """The saved tensors of that name, by adapter."""
        return getattr(self, PREFIX + name)

    def observe(self, adapter_name: str, config: LoraSVDConfig) -> None:
        """Collect statistics for this adapter while it trains and its weight is whole; keep what there is otherwise."""
        self._observed.pop(adapter_name, None)
        self._statistics_device[adapter_name] = config.statistics_device
        if not (config.compressed or config.inference_mode or config.param_ratio == 1):
            self._observed[adapter_name] = IMPORTANCES[config.importance].statistics
            self._token_shares[adapter_name] = config.observed_tokens

    def keep_sketches(self, adapter_name: str, ranks: Mapping[str, int]) -> None:
        """Keep sketches of these Gram matrices, with these r; before anything is observed."""
        self._sketches[adapter_name] = ranks

    def is_sketched(self, adapter_name: str) -> bool:
        """Whether a Gram matrix is kept as a sketch that is not all of it."""
        return bool(self._sketches.get(adapter_name))

    def statistic_shape(self, adapter_name: str, name: str, *, packed: bool = False) -> tuple[int, ...]:
        """Of the sum that is kept for this adapter; of the upper triangle if a whole Gram matrix is packed."""
        rank = self._sketch_rank(adapter_name, name)
        shape = stored_shape(name, self.out_features, self.in_features, rank)
        return (shape[0] * (shape[0] + 1) // 2,) if packed and rank is None and STATISTICS[name].gram else shape

    def _sketch_rank(self, adapter_name: str, name: str) -> int | None:
        """r of the sketch that is kept of this sum; None: it is kept whole."""
        return {**self._sketches.get(adapter_name, {}), **self.diagonals}.get(name)

    def statistics(self, adapter_name: str) -> LayerStatistics:
        """What was observed for this adapter, on the CPU."""
        sums = {n: self._state(n)[adapter_name].cpu() for n in STATISTICS if adapter_name in self._state(n)}
        counts = self._state("counts")
        seen = counts[adapter_name].tolist() if adapter_name in counts else [0] * len(COUNTS)
        return LayerStatistics(sums, dict(zip(COUNTS, seen, strict=True)))

    def observes_step(self, adapter_name: str) -> bool:
        """Whether this adapter is observed and has gradients."""
        A, B = self.lora_svd_A[adapter_name], self.lora_svd_B[adapter_name]
        return adapter_name in self._observed and A.grad is not None and B.grad is not None

    def observe_step(self, adapter_name: str, sketch: Tensor | None, *, mine: bool) -> None:
        """Add the gradients that the optimizer is about to use to the statistics of this adapter.

        They are the same in every process: the one for which ``mine`` is True adds them. sketch: :meth:`input_sketch`.
        """
        names = [name for name in self._observed[adapter_name] if STATISTICS[name].per == "step"]
        if names:
            A, B = self.lora_svd_A[adapter_name], self.lora_svd_B[adapter_name]
            parts = (self.dense_weight() if any(STATISTICS[name].of_weight for name in names) else None, A, B)
            tensors = [None if t is None else distributed.whole(t.detach()).float() for t in (*parts, A.grad, B.grad)]
            step = StepObservation(*tensors, scaling=self.scaling[adapter_name], input_sketch=sketch)  # pyright: ignore[reportArgumentType]
            with torch.autocast(device_type=A.device.type, enabled=False):
                for name in names if mine else ():
                    self._accumulate(adapter_name, name, STATISTICS[name].of(step))
        if mine:
            self._count(adapter_name, "step", 1)

    def num_tokens(self, adapter_name: str) -> Tensor:
        """Tokens that this process has observed."""
        counts = self._sums("counts", adapter_name)
        seen = counts[adapter_name] if adapter_name in counts else self._zeros(adapter_name, "counts")
        return seen[COUNTS.index("token")].clone()

    def input_sketch(self, adapter_name: str, num_tokens: Tensor) -> Tensor:
        """``A X A^T`` with X of the tokens that this process has observed, of ``num_tokens`` in all."""
        grams, A = self._sums("input_gram", adapter_name), distributed.whole(self.lora_svd_A[adapter_name].detach())
        gram = grams[adapter_name] if adapter_name in grams else self._zeros(adapter_name, "input_gram")
        through = input_sketch if self._sketch_rank(adapter_name, "input_gram") is None else between
        with torch.autocast(device_type=A.device.type, enabled=False):
            found = through(A.float().to(gram.device), gram)
        # of 0 tokens while all output gradients are zero
        return found.to(A.device) / num_tokens.clamp_min(1).to(A.device)

    def join_statistics(self, adapter_name: str) -> None:
        """Give every process the sums over all of them; what is added afterwards is its own part again."""
        if distributed.world_size() == 1 or adapter_name not in self._observed:
            return
        for name in (*self._observed[adapter_name], "counts"):
            total = self._sums(name, adapter_name).pop(adapter_name, None)
            total = self._zeros(adapter_name, name) if total is None else total
            on_device = total.to(self.lora_svd_A[adapter_name].device, copy=True)  # other layers may share it
            distributed.add_up([on_device])
            self._state(name)[adapter_name] = on_device.to(total.device)

    def is_joined(self, adapter_name: str) -> bool:
        """Whether the saved sums are those over all processes."""
        return not any(adapter_name in parts for parts in self._parts.values())

    def _observed_output(self, x: Tensor, y: Tensor, adapters: Iterable[str], mark: object) -> Tensor:
        """y, whose gradient will be observed if a statistic of the adapters looks at tokens. mark: of the input."""
        watched = {name for adapter in adapters for name in self._observed.get(adapter, ())}
        if y.requires_grad and any(STATISTICS[name].per != "step" for name in watched):
            return Observe.apply(x, y, partial(self._observe_tokens, mark))
        return y

    def _observe_tokens(self, mark: object, x: Tensor, g: Tensor) -> None:
        if not g.numel():  # an expert that is called without tokens
            return
        if g.dim() == 1:
            x, g = x[None], g[None]
        if self._shared.divisor != 1:
            g = g.float() / self._shared.divisor
        of_samples = any(STATISTICS[name].per == "sample" for names in self._observed.values() for name in names)
        # An id that is passed over would count as never seen, and counting costs nothing.
        whole = of_samples or self.num_ids is not None
        share = 1.0 if whole else max(self._token_shares[name] for name in self._observed)
        seen, counts = observe_tokens(x, g, self._shared, share, mark, self.num_ids)
        for adapter_name, names in self._observed.items():
            if adapter_name not in self.active_adapters:
                continue
            through = self._with_bypass(adapter_name, seen)
            for name in names:
                if STATISTICS[name].per != "step":
                    value = token_summand(name, through, self._sketch_rank(adapter_name, name))
                    self._accumulate(adapter_name, name, value)
            for unit, count in counts.items():
                self._count(adapter_name, unit, count)

    def _with_bypass(self, adapter_name: str, seen: TokenObservation) -> TokenObservation:
        """The same with A, where a statistic asks for it. That of an embedding is zero at first and shows nothing."""
        if self.num_ids is not None or not any(STATISTICS[name].of_bypass for name in self._observed[adapter_name]):
            return seen
        return replace(seen, lora_A=distributed.whole(self.lora_svd_A[adapter_name].detach()).float())

    def _accumulate(self, adapter_name: str, name: str, value: Tensor) -> None:
        sums = self._sums(name, adapter_name)
        total = sums[adapter_name] if adapter_name in sums else None  # noqa: SIM401 - a BufferDict has no get
        sums[adapter_name] = self._shared.add(total, value, self._device_of(adapter_name, name))

    def _count(self, adapter_name: str, unit: str, count: Tensor | int) -> None:
        counts = self._sums("counts", adapter_name)
        if adapter_name not in counts:
            counts[adapter_name] = self._zeros(adapter_name, "counts")
        counts[adapter_name][COUNTS.index(unit)] += count

    def _sums(self, name: str, adapter_name: str) -> MutableMapping[str, Tensor]:
        """Where sums are added up. Of several processes each has its part; one of them goes on with what is saved."""
        saved = self._state(name)
        if distributed.world_size() == 1:
            return saved
        if adapter_name in saved:
            total = saved[adapter_name]
            del saved[adapter_name]
            if distributed.owns(0):
                self._parts[name][adapter_name] = total
        return self._parts[name]

    def _zeros(self, adapter_name: str, name: str) -> Tensor:
        device = self._device_of(adapter_name, name)
        if name == "counts":
            return torch.zeros(len(COUNTS), dtype=torch.int64, device=device)
        return torch.zeros(self.statistic_shape(adapter_name, name), device=device)

    def _device_of(self, adapter_name: str, name: str) -> torch.device:
        """Where a sum is kept; counts stay with the layer."""
        chosen = None if name == "counts" else self._statistics_device[adapter_name]
        return self.lora_svd_A[adapter_name].device if chosen is None else torch.device(chosen)


def pack_statistics(layers: Iterable[ObservedLayer], adapter_name: str) -> None:
    """Keep half of each Gram matrix from now on, since nothing is added any more; equal ones still once."""
    packed: dict[int, tuple[Tensor, Tensor]] = {}  # by id, which the first of the two keeps valid
    for layer in layers:
        for name in STATISTICS:
            sums = layer._state(name)
            if adapter_name in sums and is_gram(name, total := sums[adapter_name]):
                if id(total) not in packed:
                    packed[id(total)] = (total, pack(total))
                sums[adapter_name] = packed[id(total)][1]


def _apart(_layer: nn.Module, state: MutableMapping[str, Any], prefix: str, _metadata: Any) -> None:
    """Copy the sums that layers with one input have in common: what saves tensors may leave out such doubles."""
    common = f"{prefix}{PREFIX}input_gram."
    state.update({key: value.clone() for key, value in state.items() if key.startswith(common)})


def keep_to_limit(layers: Mapping[str, ObservedLayer], adapter_name: str, config: LoraSVDConfig) -> None:
    """Let layers keep sketches of Gram matrices where ``statistics_limit`` asks for it, and say which in a warning."""
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    diagonals = {name: layer.diagonals for name, layer in layers.items()}
    statistics = IMPORTANCES[config.importance].statistics
    sketches = choose_sketches(shapes, statistics, config.statistics_limit, diagonals)
    for name, layer in layers.items():
        layer.keep_sketches(adapter_name, sketches.get(name, {}))
    if sketches and any(adapter_name in layer._observed for layer in layers.values()):
        warnings.warn(describe_sketches(shapes, sketches, config.statistics_limit), stacklevel=3)
