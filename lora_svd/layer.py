"""``LoraSVDLinear``: a linear layer with a LoRA bypass, observed while whole, later with factors for its weight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import distributed
from .allocation import LayerShape
from .compact import factored_output, layer_features, num_bytes
from .decompositions import DECOMPOSITIONS, Factors, Split, balance
from .errors import LoraSVDError, NumericalError
from .observation import STATE, ObservedLayer
from .peft_type import PREFIX
from .tokens import SharedGram

if TYPE_CHECKING:
    from .config import LoraSVDConfig

_FACTORS = ("left", "right")
SAVED = (*STATE, *_FACTORS)
# Factors are stored this much larger, so that a step of an optimizer like Adam, whose length does not depend on the
# gradient's, moves them less than it moves the bypass: 2.5e-4 of their unit at a learning rate of 1e-3. A power of 2,
# so that scaling rounds nothing.
FACTOR_SCALE = 4.0
# The config of an adapter may come from anywhere; it cannot have more memory than the model gives reason for.
_WIDEST_BYPASS = 1024


class LoraSVDLinear(ObservedLayer):
    """``y = W x + s B A x``, later ``y = left (right x) + s B A x``; bias as in the base layer.

    Per adapter: trainable A (r, in) and B (out, r); buffers for the statistics while the weight is whole, and for the
    factors left (out, k) and right (k, in) once it is not, or of the shape that ``split`` makes of it. All of it is
    saved with the adapter. With several active adapters their changes of the output add up; that of a compressed one is
    ``left right x - W x + s B A x``.
    """

    adapter_layer_names = ("lora_svd_A", "lora_svd_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_svd_dropout", "split", *(PREFIX + name for name in SAVED))
    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, shared: SharedGram, **kwargs: Any) -> None:
        super().__init__()
        self.weight_was_read = False
        self.base_layer = base_layer
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base, **kwargs)
        self.fan_in_fan_out = isinstance(base, Conv1D | nn.Embedding)
        self.in_features, self.out_features = layer_features(base)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.split: dict[str, Split] = {}
        self.lora_svd_dropout = nn.ModuleDict()
        self.lora_svd_A = nn.ParameterDict()
        self.lora_svd_B = nn.ParameterDict()
        self._init_observation(shared)
        for name in _FACTORS:
            setattr(self, PREFIX + name, nn.ParameterDict())
        self._unmerged: tuple[Tensor] | None = None  # in a tuple, or it would be a parameter of this layer
        self._disable_adapters = False
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True

    # -- adapters ------------------------------------------------------------------------------------------------------

    def update_layer(
        self,
        adapter_name: str,
        config: LoraSVDConfig,
        *,
        key: str,
        r: int | None = None,
        lora_alpha: float | None = None,
    ) -> None:
        """Add an adapter. ``key`` is the module's name in ``config.compact_ranks``."""
        r = config.r if r is None else r
        most = max(self.in_features, self.out_features, _WIDEST_BYPASS)
        if not 1 <= r <= most:
            raise LoraSVDError(f"r: got {r} for module {key}, expected an integer in [1, {most}]; see rank_pattern")
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = config.lora_alpha if lora_alpha is None else lora_alpha
        self.scaling[adapter_name] = self.lora_alpha[adapter_name] / r
        self.split[adapter_name] = DECOMPOSITIONS[config.decomposition].split(self.out_features, self.in_features)
        self.lora_svd_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_svd_A[adapter_name] = nn.Parameter(torch.empty(r, self.in_features))
        self.lora_svd_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, r))
        self._init_bypass(adapter_name, config.init_weights)
        rank = (config.compact_ranks or {}).get(key)
        rows, columns = self.split[adapter_name].shape
        if config.compressed and rank is not None and rank < min(rows, columns):
            zeros = Factors(torch.zeros(rows, rank), torch.zeros(rank, columns))
            rounded = self.rounded_factors(zeros, trainable=config.trains_factors)
            self.set_factors(adapter_name, rounded, trainable=config.trains_factors)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self.observe(adapter_name, config)

    def _init_bypass(self, adapter_name: str, zero: bool) -> None:
        A, B = self.lora_svd_A[adapter_name], self.lora_svd_B[adapter_name]
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if zero:
            nn.init.zeros_(B)
        else:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))

    def delete_adapter(self, adapter_name: str) -> None:
        for state in (self._observed, self._token_shares, self._sketches, self._statistics_device):
            state.pop(adapter_name, None)
        self.reset_state(adapter_name)
        super().delete_adapter(adapter_name)

    def layer_shape(self, adapter_name: str, *, keep: bool) -> LayerShape:
        """Shape of what is factorized; with ``keep`` the bypass is stored on top of the kept rank."""
        return LayerShape(*self.split[adapter_name].shape, self.r[adapter_name] if keep else 0)

    @property
    def weight(self) -> Tensor:
        """The base layer's; remembers that training reads it, and may so go round this layer."""
        self.weight_was_read |= torch.is_grad_enabled()
        return super().weight

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

    def bypass_factors(self, adapter_name: str) -> Factors:
        """s B (out, r) and A (r, in), float32."""
        B, A = self.lora_svd_B[adapter_name].detach(), self.lora_svd_A[adapter_name].detach()
        return Factors(self.scaling[adapter_name] * B.float(), A.float())

    def factors(self, adapter_name: str) -> Factors | None:
        """The factors that stand for the weight, or None while it is whole or stays dense."""
        if adapter_name not in self._state("left"):
            return None
        left, right = (self._state(name)[adapter_name] / FACTOR_SCALE for name in _FACTORS)
        return Factors(left, right, self.split[adapter_name])

    def kept_rank(self, adapter_name: str) -> int:
        """Rank of the factors; the full one where the weight is whole."""
        factors = self.factors(adapter_name)
        return self.split[adapter_name].full_rank if factors is None else factors.rank

    def trainable_factors(self) -> Iterator[nn.Parameter]:
        """The factors that are trained."""
        for name in _FACTORS:
            yield from (p for p in getattr(self, PREFIX + name).parameters() if p.requires_grad)

    def rounded_factors(self, factors: Factors, *, trainable: bool) -> Factors:
        """Factors as :meth:`set_factors` stores them, balanced, on the CPU.

        They are float32 if they are trained, else of the base weight's type, bfloat16 if that is quantized, until PEFT
        makes them float32 when it loads them.
        """
        dtype, balanced = torch.float32 if trainable else self._float_dtype(), balance(factors)
        left, right = (FACTOR_SCALE * side.cpu().to(dtype).contiguous() for side in (balanced.left, balanced.right))
        return Factors(left, right)

    def set_factors(self, adapter_name: str, factors: Factors | None, *, trainable: bool = False) -> None:
        """Let :meth:`rounded_factors` stand for the weight from now on; None restores the whole weight."""
        # With low_cpu_mem_usage A is empty at first, on the meta device.
        A = self.lora_svd_A[adapter_name]
        device = torch.device("cpu") if A.is_meta else A.device
        for name in _FACTORS:
            stored = self._state(name)
            if factors is not None:
                tensor = nn.Parameter(getattr(factors, name).to(device), requires_grad=trainable)
                stored[adapter_name] = distributed.averaged(tensor)
            elif adapter_name in stored:
                del stored[adapter_name]

    def reset_state(self, adapter_name: str) -> None:
        """Forget the statistics and factors of this adapter."""
        for name in SAVED:
            if adapter_name in self._state(name):
                del self._state(name)[adapter_name]
        for parts in self._parts.values():
            parts.pop(adapter_name, None)

    def allocate_state(self, adapter_name: str, attribute: str, like: Tensor, *, trainable: bool) -> None:
        """Make room for a saved statistic or factor; other attributes are passed over."""
        name, device = attribute.removeprefix(PREFIX), self.lora_svd_A[adapter_name].device
        if name in STATE:
            self._state(name)[adapter_name] = torch.empty_like(like, device=self._device_of(adapter_name, name))
        elif name in _FACTORS:
            room = torch.empty_like(like, device=device)
            self._state(name)[adapter_name] = distributed.averaged(nn.Parameter(room, requires_grad=trainable))

    # -- merge ---------------------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What the adapter changes in the weight, oriented like the base weight: ``s B A (+ left right - W)``."""
        change = self.bypass_factors(adapter_name).product()
        factors = self.factors(adapter_name)
        if factors is not None:
            change = change + factors.product() - self.dense_weight().to(change.dtype)
        return change.T if self.fan_in_fan_out else change

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' changes to the base weight. ``safe_merge`` refuses a non-finite result."""
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.lora_svd_A:
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
        """In a parameter of its own, so that a layer that is tied to this one keeps its weight."""
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
        mark = self._shared.recognize(x) if self._observed and torch.is_grad_enabled() else None
        x = self._autocast_input(x)
        adapters = [name for name in self.active_adapters if name in self.lora_svd_A]
        result = self._weight_output(x, adapters, *args, **kwargs)
        dtype = result.dtype
        for adapter_name in adapters:
            hidden = self._bypass_hidden(x, adapter_name)
            result = result + F.linear(hidden, self.lora_svd_B[adapter_name]) * self.scaling[adapter_name]
        return self._observed_output(x, result.to(dtype), adapters, mark)

    def _autocast_input(self, x: Tensor) -> Tensor:
        """Under autocast one copy for the weight, the bypass and the observer."""
        device = x.device.type
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x

    def _bypass_hidden(self, x: Tensor, adapter_name: str) -> Tensor:
        """``A x``, (..., r)."""
        A = self.lora_svd_A[adapter_name]
        given = x if torch.is_autocast_enabled(x.device.type) else self._cast_input_dtype(x, A.dtype)
        return F.linear(self.lora_svd_dropout[adapter_name](given), A)

    def _weight_output(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """``W x + b`` with W replaced by the factors of the compressed adapters."""
        compressed = [name for name in adapters if name in self._state("left")]
        if len(compressed) == 1:  # the usual case: the base weight is not needed at all
            bias = getattr(self.get_base_layer(), "bias", None)
            return self._factored_output(x, compressed[0], bias if isinstance(bias, Tensor) else None)
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if compressed:
            result = result - len(compressed) * self._dense_output(x)
        for name in compressed:
            result = result + self._factored_output(x, name)
        return result

    def _dense_output(self, x: Tensor) -> Tensor:
        """``W x``."""
        return F.linear(x, self.dense_weight().to(x.dtype))

    def _factored_output(self, x: Tensor, adapter_name: str, bias: Tensor | None = None) -> Tensor:
        left, right = (_as_input(self._state(name)[adapter_name], x) for name in _FACTORS)
        stored = Factors(left, right, self.split[adapter_name])
        return factored_output(x, stored, None if bias is None else _as_input(bias, x), FACTOR_SCALE**-2)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is a plain LoRA, that is, not yet compressed."""
        return self.factors(adapter_name) is None

    def __repr__(self) -> str:
        return "lora_svd." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def _as_input(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in the type of its input; autocast sees to that itself."""
    return weight if torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype)
