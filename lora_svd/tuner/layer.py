"""``LoraSVDLinear``: a linear layer with a LoRA bypass, observed while whole, later with factors for its weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..allocation import LayerShape
from ..compact.bnb import num_bytes
from ..compact.layers import layer_features
from ..decompositions import Factors, balance, scattered
from ..errors import LoraSVDError, NumericalError
from ..statistics import STATISTICS, LayerStatistics, StepObservation
from ..statistics.backward import Observe
from ..statistics.shared import SharedGram
from ..statistics.tokens import observe_tokens
from . import distributed
from .adapter import ADAPTERS, WIDEST_BYPASS, LayerAdapter, LayerFactors
from .reading import noticed, refused

if TYPE_CHECKING:
    from ..config import LoraSVDConfig


class LoraSVDLinear(nn.Module, BaseTunerLayer):
    """``y = W x + s B A x``, later ``y = left (right x) + s B A x``; bias as in the base layer.

    All that belongs to an adapter is in its :class:`LayerAdapter`. With several active adapters their changes of the
    output add up; that of a compressed one is ``left right x - W x + s B A x``.

    Args:
        shared: what the layers of a model have in common while they are observed.
    """

    adapter_layer_names = (ADAPTERS,)
    other_param_names = ()
    base_layer: nn.Module
    is_output = False  # whether losses may read its weight
    num_ids: int | None = None  # of an embedding, whose inputs are ids

    def __init__(self, base_layer: nn.Module, shared: SharedGram, **kwargs: Any) -> None:
        super().__init__()
        self.key = ""  # the module's name
        self.weight_was_used = False
        self.was_fed = False  # while training
        self.base_layer = base_layer
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base, **kwargs)
        self.fan_in_fan_out = isinstance(base, Conv1D | nn.Embedding)
        self.in_features, self.out_features = layer_features(base)
        self.lora_svd_adapters = nn.ModuleDict()
        self.shared = shared
        self._unmerged: tuple[Tensor] | None = None  # in a tuple, or it would be a parameter of this layer
        self._disable_adapters = False
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True

    # -- adapters ------------------------------------------------------------------------------------------------------

    def adapter(self, name: str) -> LayerAdapter:
        """What the adapter of that name has in this layer."""
        adapter = self.lora_svd_adapters[name]
        assert isinstance(adapter, LayerAdapter)
        return adapter

    def has_adapter(self, name: str) -> bool:
        return name in self.lora_svd_adapters

    def statistics(self, adapter_name: str) -> LayerStatistics:
        """What was observed for an adapter, on the CPU."""
        return self.adapter(adapter_name).observer.statistics()

    def factors(self, adapter_name: str) -> Factors | None:
        """The factors that stand for the weight, or None while it is whole or stays dense."""
        factors = self.adapter(adapter_name).factors
        return None if factors is None else factors.value()

    def _active(self) -> list[LayerAdapter]:
        return [self.adapter(name) for name in self.active_adapters if self.has_adapter(name)]

    def update_layer(
        self,
        adapter_name: str,
        config: LoraSVDConfig,
        *,
        key: str,
        r: int | None = None,
        lora_alpha: float | None = None,
        kept: tuple[int, int] | None = None,
    ) -> None:
        """Add an adapter. ``key`` is the module's name in ``config.compact_ranks``; ``kept``: (out, in) features, if
        the adapter is without some neurons."""
        self.key = key
        r = config.r if r is None else r
        most = max(self.in_features, self.out_features, WIDEST_BYPASS)
        if not 1 <= r <= most:
            raise LoraSVDError(f"r: got {r} for module {key}, expected an integer in [1, {most}]; see rank_pattern")
        alpha = config.lora_alpha if lora_alpha is None else lora_alpha
        shape = self.out_features, self.in_features
        adapter = LayerAdapter(shape, config, r=r, alpha=alpha, diagonals=self.diagonals)
        self.lora_svd_adapters[adapter_name] = adapter
        self._init_bypass(adapter, zero=config.init_weights)
        rank = (config.compact_ranks or {}).get(key)
        rows, columns = kept or adapter.split.shape
        if config.compressed and rank is not None and (rank < min(rows, columns) or kept):
            index = [None if n == of else torch.arange(n) for n, of in zip((rows, columns), shape, strict=True)]
            split = None if kept else adapter.split
            rank = min(rank, rows, columns)
            zeros = Factors(torch.zeros(rows, rank), torch.zeros(rank, columns), split, *index)
            adapter.set_factors(self.rounded_factors(zeros, trainable=config.trains_factors), filled=False)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        adapter.observer.collect(config)

    def _init_bypass(self, adapter: LayerAdapter, *, zero: bool) -> None:
        nn.init.kaiming_uniform_(adapter.A, a=math.sqrt(5))
        if zero:
            nn.init.zeros_(adapter.B)
        else:
            nn.init.kaiming_uniform_(adapter.B, a=math.sqrt(5))

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT does, but factors that are not trained stay frozen."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in self.lora_svd_adapters:
            self.adapter(name).set_requires_grad(name in names and not inference_mode)
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As PEFT does, but factors that are not trained stay frozen."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if self.has_adapter(name):
                self.adapter(name).set_requires_grad(requires_grad)

    def layer_shape(self, adapter_name: str, *, keep: bool) -> LayerShape:
        """Shape of what is factorized; with ``keep`` the bypass is stored on top of the kept rank."""
        adapter = self.adapter(adapter_name)
        return LayerShape(*adapter.split.shape, adapter.r if keep else 0)

    @property
    def diagonals(self) -> dict[str, int]:
        """Gram matrices of which a sketch, of this r = 0, is all there is: those of ids, which are unit vectors."""
        return {} if self.num_ids is None else {n: 0 for n, s in STATISTICS.items() if s.gram and s.side == "columns"}

    @property
    def weight(self) -> Tensor:
        """The base layer's; of an output layer, the one that it computes with, for losses that read it.

        What computes with the first while training goes round this layer, and ``weight_was_used`` remembers it.
        """
        weight = super().weight
        if self.disable_adapters or self.merged:
            return weight
        if self.is_output:
            return self._read_by_loss(self._weight_in_force())
        is_seen = torch.is_grad_enabled() and weight.is_floating_point()
        return noticed(weight, self._remember_use) if is_seen else weight

    def _remember_use(self) -> None:
        self.weight_was_used = True

    def _weight_in_force(self) -> Tensor:
        """``W + s B A``, or ``left right + s B A``, (out, in), with gradients; of several adapters with all changes."""
        adapters = self._active()
        compressed = [adapter.factors for adapter in adapters if adapter.factors is not None]
        with torch.autocast(self.get_base_weight().device.type, enabled=False):
            parts = [] if len(compressed) == 1 else [(1 - len(compressed)) * self.dense_weight()]
            parts += [self._kept_or_whole(factors, factors.product()) for factors in compressed]
            for adapter in adapters:
                B, A = adapter.sides()
                parts.append(self._kept_or_whole(adapter.factors, adapter.scaling * B @ A))
            return reduce(torch.add, parts).to(self._float_dtype())

    @property
    def _is_alone(self) -> bool:
        """Whether one adapter is active, so that layers give and take the features that it keeps and no others."""
        return len(self.active_adapters) == 1

    def _kept_or_whole(self, factors: LayerFactors | None, weight: Tensor) -> Tensor:
        """The rows and columns that are kept of a weight; beside other adapters with zeros for the others."""
        if factors is None or self._is_alone:
            return weight
        return scattered(weight, (self.out_features, self.in_features), factors.rows, factors.columns)

    def _is_hidden(self, statistic: str) -> bool:
        """Whether the gradient of the weight does not show a statistic."""
        return STATISTICS[statistic].per != "step"

    def _read_by_loss(self, weight: Tensor) -> Tensor:
        """The weight, refused in the backward pass while an importance looks at tokens, which its gradient hides."""
        wanted = {name for adapter in self._active() for name in adapter.observer.wanted}
        return refused(weight, self.key, wanted, self._is_hidden)

    def dense_weight(self) -> Tensor:
        """The frozen weight, (out, in), dequantized if need be; the one before any merge."""
        weight = self.get_base_weight() if self._unmerged is None else self._unmerged[0]
        return weight.T if self.fan_in_fan_out else weight

    def weight_bytes(self) -> int:
        """Bytes of the base layer's weight as it is stored."""
        weight: Any = self.get_base_layer().weight
        return num_bytes(weight)

    def _float_dtype(self) -> torch.dtype:
        """Type of the base weight; bfloat16 for integers."""
        dtype: Any = self.get_base_layer().weight.dtype
        return dtype if dtype.is_floating_point else torch.bfloat16

    def rounded_factors(self, factors: Factors, *, trainable: bool) -> Factors:
        """Factors in the type that they are kept in, balanced, on the CPU: float32 if they are trained, else that of
        the base weight, bfloat16 if that is quantized, until PEFT makes them float32 when it loads them."""
        dtype = torch.float32 if trainable else self._float_dtype()
        # An identity is exact as it stands.
        is_narrowed = factors.rows is not None or factors.columns is not None
        balanced = factors if is_narrowed and factors.is_full else balance(factors)
        left, right = (side.cpu().to(dtype).contiguous() for side in (balanced.left, balanced.right))
        return replace(factors, left=left, right=right)

    # -- observation ---------------------------------------------------------------------------------------------------

    def observe_step(self, adapter_name: str, inputs: Tensor | None, *, mine: bool) -> None:
        """Show the observer the gradients that the optimizer is about to use, which all processes gather.

        Args:
            inputs: :meth:`.observer.Observer.input_moments` over all processes, if a statistic needs them.
            mine: whether this process adds them up; they are the same in every one.
        """
        adapter = self.adapter(adapter_name)
        observer, device = adapter.observer, adapter.A.device
        names = [name for name in observer.wanted if STATISTICS[name].per == "step"]
        if names:
            weight = self.dense_weight() if any("weight" in STATISTICS[name].needs for name in names) else None
            parts = (weight, adapter.A, adapter.B, adapter.A.grad, adapter.B.grad)
            gathered: list[Any] = [t if t is None else distributed.gathered(t.detach()).float() for t in parts]
            moments = {} if inputs is None else {"input_sketch": inputs[:, :-1], "input_mean": inputs[:, -1]}
            step = StepObservation(*gathered, scaling=adapter.scaling, **moments)
            with torch.autocast(device_type=device.type, enabled=False):
                for name in names if mine else ():
                    observer.add(name, STATISTICS[name].summand(step), self.shared)
        if mine:
            observer.count("step", 1, device)

    @property
    def _divisor(self) -> float:
        """Factor by which gradients are too large: loss scale times world size, since the loss is a mean over them."""
        return self.shared.loss_scale * distributed.world_size()

    def _observed_output(self, x: Tensor, y: Tensor, mark: object) -> Tensor:
        """y, whose gradient will be observed if a statistic of the adapters looks at tokens. mark: of the input."""
        adapters = self._active()
        watched = {name for adapter in adapters for name in adapter.observer.wanted}
        is_watched = any(STATISTICS[name].per != "step" for name in watched) or any(of.search for of in adapters)
        if y.requires_grad and is_watched:
            return Observe.apply(x, y, partial(self._observe_tokens, mark), self.key)
        return y

    def _observe_tokens(self, mark: object, x: Tensor, g: Tensor) -> None:
        if not g.numel():  # an expert that is called without tokens
            return
        for adapter in self._active():
            if adapter.search is not None and x.requires_grad:
                adapter.search.look(self.key, x)
        x = x.detach()
        if g.dim() == 1:
            x, g = x[None], g[None]
        if self._divisor != 1:
            g = g.float() / self._divisor
        observing = [adapter for adapter in self._active() if adapter.observer.collects]
        if not observing:
            return
        wanted = {name for adapter in observing for name in adapter.observer.wanted}
        # An id that is passed over would count as never seen, and counting costs nothing.
        whole = self.num_ids is not None or any(STATISTICS[name].per == "sample" for name in wanted)
        share = 1.0 if whole else max(adapter.observer.token_share for adapter in observing)
        tokens, counts = observe_tokens(x, g, self.shared, share, mark, self.num_ids)
        for adapter in observing:
            adapter.observer.see(tokens, counts, self.shared)

    # -- merge ---------------------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What the adapter changes in the weight, oriented like the base weight: ``s B A (+ left right - W)``."""
        adapter = self.adapter(adapter_name)
        change = adapter.bypass.product()
        if adapter.factors is not None:
            kept = adapter.kept_bypass.product() + adapter.factors.value().product()
            shape = self.out_features, self.in_features
            whole = scattered(kept, shape, adapter.factors.rows, adapter.factors.columns)
            change = whole - self.dense_weight().to(change.dtype)
        return change.T if self.fan_in_fan_out else change

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' changes to the base weight. ``safe_merge`` refuses a non-finite result."""
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if not self.has_adapter(adapter_name):
                continue
            weight = self.get_base_weight()
            change = self.get_delta_weight(adapter_name)
            merged = (weight.to(change.dtype) + change).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise NumericalError(
                    f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken"
                )
            if self._unmerged is None:
                plain: Any = self.get_base_layer()
                self._unmerged = (plain.weight if self.quantization_backend is None else weight.detach().clone(),)
            self.set_base_weight(merged)
            self.merged_adapters.append(adapter_name)

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Store the weight in a new parameter, so that tied layers keep the old one."""
        if self.quantization_backend is not None:
            super().set_base_weight(weight_data)
            return
        base: Any = self.get_base_layer()
        is_parameter = isinstance(weight_data, nn.Parameter)
        base.weight = weight_data if is_parameter else nn.Parameter(weight_data, base.weight.requires_grad)

    def unmerge(self) -> None:
        """Take back every merged change: the weight is what it was, to the bit, and tied to what it was."""
        self.merged_adapters.clear()
        if self._unmerged is not None:
            self.set_base_weight(self._unmerged[0].to(self.get_base_weight()))
            self._unmerged = None

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with the adapters merged into it or as it was before."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.merged:
            self.unmerge()
        return self.base_layer

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        self.was_fed |= self.training and x.numel() > 0
        adapters = self._active()
        collects = torch.is_grad_enabled() and any(adapter.observer.collects for adapter in adapters)
        mark = self.shared.recognize(x) if collects else None
        x = self._autocast_input(x)
        result = self._weight_output(x, adapters, *args, **kwargs)
        dtype = result.dtype
        for adapter in adapters:
            B, A = adapter.sides()
            change = F.linear(self._bypass_hidden(self._taken(x, adapter.factors), adapter, A), B) * adapter.scaling
            result = result + self._given(change, adapter.factors)
        return self._observed_output(x, result.to(dtype), mark)

    def _autocast_input(self, x: Tensor) -> Tensor:
        """Under autocast one copy for the weight, the bypass and the observer."""
        device = x.device.type
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x

    def _taken(self, x: Tensor, factors: LayerFactors | None) -> Tensor:
        """The features of x that factors take, of all features or of no others."""
        if factors is None or factors.columns is None or x.shape[-1] == len(factors.columns):
            return x
        return x[..., factors.columns]

    def _given(self, y: Tensor, factors: LayerFactors | None) -> Tensor:
        """The features that factors give; beside other adapters with zeros for those that they do not."""
        if factors is None or factors.rows is None or self._is_alone:
            return y
        return y.new_zeros(*y.shape[:-1], self.out_features).index_copy(-1, factors.rows, y)

    def _bypass_hidden(self, x: Tensor, adapter: LayerAdapter, A: Tensor) -> Tensor:
        """``A x``, (..., r)."""
        given = x if torch.is_autocast_enabled(x.device.type) else self._cast_input_dtype(x, A.dtype)
        return F.linear(adapter.dropout(given), A)

    def _weight_output(self, x: Tensor, adapters: Iterable[LayerAdapter], *args: Any, **kwargs: Any) -> Tensor:
        """``W x + b`` with W replaced by the factors of the compressed adapters."""
        compressed = [adapter.factors for adapter in adapters if adapter.factors is not None]
        if len(compressed) == 1:  # the usual case: the base weight is not needed at all
            (factors,), bias = compressed, getattr(self.get_base_layer(), "bias", None)
            if factors.rows is None or self._is_alone:
                return self._factored_output(
                    self._taken(x, factors), factors, bias if isinstance(bias, Tensor) else None
                )
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if compressed:
            result = result - len(compressed) * self._dense_output(x)
        for factors in compressed:
            result = result + self._given(self._factored_output(self._taken(x, factors), factors), factors)
        return result

    def _dense_output(self, x: Tensor) -> Tensor:
        """``W x``."""
        return F.linear(x, self.dense_weight().to(x.dtype))

    def _factored_output(self, x: Tensor, factors: LayerFactors, bias: Tensor | None = None) -> Tensor:
        """``left (right x) + bias``."""
        return factors.applied(x, bias)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is a plain LoRA, that is, not yet compressed."""
        return self.adapter(adapter_name).factors is None

    def __repr__(self) -> str:
        return "lora_svd." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
