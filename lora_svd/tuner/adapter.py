"""``LayerAdapter``: all that one adapter has in one layer, which is what is saved of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compact.convert import factored_output
from ..config import PREFIX
from ..decompositions import DECOMPOSITIONS, Factors, Split
from ..errors import LoraSVDError
from ..statistics import COUNTS, STATISTICS
from . import distributed
from .observer import Observer

if TYPE_CHECKING:
    from ..config import LoraSVDConfig
    from ..groups import GroupSearch

ADAPTERS = PREFIX + "adapters"  # the attribute of a layer that holds its adapters by name
# Factors are stored this much larger, so that a step of an optimizer like Adam, whose length does not depend on the
# gradient's, moves them less than it moves the bypass. A power of 2, so that scaling rounds nothing.
_FACTOR_SCALE = 4.0
# The config of an adapter may come from anywhere; it cannot have more memory than the model gives reason for.
WIDEST_BYPASS = 1024


OF_FACTORS = ("left", "right", "rows", "columns")


def part_of(name: str) -> str:
    """Where a tensor of that name is in a :class:`LayerAdapter`."""
    parents = {"A": "", "B": "", "group": "", **dict.fromkeys(OF_FACTORS, "factors.")}
    return parents.get(name, "observer.") + name


class LayerFactors(nn.Module):
    """Factors that stand for a weight while it trains; their scale is known here only.

    Args:
        factors: left (out, k) and right (k, in), or of the shape that ``split`` makes of it.
        trainable: whether an optimizer may change them.
        filled: False for factors that are still to be loaded or copied, which refuse to compute.
    """

    rows: nn.Parameter | None
    columns: nn.Parameter | None

    def __init__(self, factors: Factors, device: torch.device, *, trainable: bool, filled: bool = True) -> None:
        super().__init__()
        self.split, self.trainable, self.filled = factors.split, trainable, filled
        self.left, self.right = (
            distributed.with_averaged_gradient(nn.Parameter((_FACTOR_SCALE * side).to(device), requires_grad=trainable))
            for side in (factors.left, factors.right)
        )
        # Parameters, though of integers: others copy an adapter parameter by parameter.
        for name in ("rows", "columns"):
            index: Tensor | None = getattr(factors, name)
            of_device = None if index is None else nn.Parameter(index.to(device), requires_grad=False)
            self.register_parameter(name, of_device)

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    def fits(self, saved: Mapping[str, Tensor]) -> bool:
        """Whether tensors by their names on disk have factors of these shapes."""
        own = {name: tensor.shape for name in OF_FACTORS if (tensor := getattr(self, name)) is not None}
        return own == {name: saved[name].shape for name in OF_FACTORS if name in saved}

    def value(self) -> Factors:
        """The factors themselves."""
        return Factors(self.left / _FACTOR_SCALE, self.right / _FACTOR_SCALE, self.split, self.rows, self.columns)

    def product(self) -> Tensor:
        """``left right``, (out, in), with gradients; of the rows and columns that are kept."""
        self._check_filled()
        return self.value().product()

    def applied(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``left (right x) + bias``, (..., out), in the type of x (..., in); autocast sees to types itself. Of the rows
        and columns that are kept."""
        self._check_filled()
        bias = bias if bias is None or self.rows is None else bias[self.rows]
        autocast = torch.is_autocast_enabled(x.device.type)
        left, right, bias = (t if t is None or autocast else t.to(x.dtype) for t in (self.left, self.right, bias))
        assert left is not None
        assert right is not None
        return factored_output(x, Factors(left, right, self.split), bias, _FACTOR_SCALE**-2)

    def looked_up(self, ids: Tensor, dtype: torch.dtype, padding_idx: int | None) -> Tensor:
        """``left (right e_id)``, (..., out), of ids (...)."""
        self._check_filled()
        hidden = F.embedding(ids, self.right.T, padding_idx=padding_idx).to(dtype) * _FACTOR_SCALE**-2
        return F.linear(hidden, self.left.to(dtype)).to(dtype)

    def transposed(self, h: Tensor) -> Tensor:
        """``right^T (left^T h)``, (..., in), of h (..., out)."""
        self._check_filled()
        left, right = self.left.to(h.dtype), self.right.to(h.dtype)
        return F.linear(F.linear(h, left.T) * _FACTOR_SCALE**-2, right.T)

    def _check_filled(self) -> None:
        """Raise if nobody has filled the factors that an adapter's config asked for; looked at until they are."""
        if not self.filled:
            self.filled = bool(self.left.any())
            if not self.filled:
                raise LoraSVDError(
                    "compressed: got True for an adapter whose factors are all zero, expected False: its config is "
                    "that of an adapter that was saved. Load that with PeftModel.from_pretrained(model, folder), or "
                    "set compressed=False and compact_ranks=None"
                )


class LayerAdapter(nn.Module):
    """One adapter in one layer: the bypass ``s B A``, factors for the weight once it is compressed, and the observer.

    Attributes:
        A, B: trainable, (r, in) and (out, r), of the bypass.
        scaling: s, ``lora_alpha / r``.
        split: in which order the weight is factorized.
        factors: that stand for the weight; None while it is whole or stays dense.
        observer: what was seen of the layer.
        group: int64, the place among the adapter's layers of the one that takes this one's neurons or heads, which may
            be this one; and the number of heads, (2,), or (1,) for neurons. None without.
        search: for such layers, while it runs.
    """

    factors: LayerFactors | None
    group: Tensor | None

    def __init__(
        self, shape: tuple[int, int], config: LoraSVDConfig, *, r: int, alpha: float, diagonals: Mapping[str, int]
    ) -> None:
        super().__init__()
        out_features, in_features = shape
        self.shape, self.r, self.scaling = shape, r, alpha / r
        self.trains_factors = config.trains_factors
        self.split: Split = DECOMPOSITIONS[config.decomposition].split(out_features, in_features)
        self.dropout: nn.Module = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.A, self.B = nn.Parameter(torch.empty(r, in_features)), nn.Parameter(torch.empty(out_features, r))
        self.factors = None
        self.observer = Observer(shape, diagonals)
        self.register_buffer("group", None)
        self.search: GroupSearch | None = None
        self.was_loaded = False  # since its run was told

    def set_requires_grad(self, requires_grad: bool) -> None:
        """Let an optimizer train the bypass, and factors that may be trained, or not."""
        frozen = set() if self.factors is None or self.factors.trainable else set(self.factors.parameters())
        for parameter in self.parameters():
            if parameter.is_leaf and parameter.is_floating_point():  # under FSDP some are no leaves
                parameter.requires_grad_(requires_grad and parameter not in frozen)

    @property
    def bypass(self) -> Factors:
        """s B (out, r) and A (r, in), float32."""
        return Factors(self.scaling * self.B.detach().float(), self.A.detach().float())

    @property
    def kept_bypass(self) -> Factors:
        """Of the rows and columns that the factors stand for."""
        return self.bypass.narrowed(None if self.factors is None else self.factors.value())

    def sides(self) -> tuple[Tensor, Tensor]:
        """B and A as they are used: of the rows and columns that the factors stand for."""
        rows, columns = (None, None) if self.factors is None else (self.factors.rows, self.factors.columns)
        B = self.B if rows is None else self.B.index_select(0, rows)
        return B, self.A if columns is None else self.A.index_select(1, columns)

    @property
    def kept_rank(self) -> int:
        """Rank of the factors; the full one where the weight is whole."""
        return self.split.full_rank if self.factors is None else self.factors.rank

    @property
    def gradients(self) -> list[Tensor]:
        """Of A and B, as far as they have one."""
        return [side.grad for side in (self.A, self.B) if side.grad is not None]

    @property
    def has_step(self) -> bool:
        """Whether it is observed and has gradients."""
        return self.observer.collects and len(self.gradients) == 2

    def set_factors(self, factors: Factors | None, *, filled: bool = True) -> None:
        """Let factors stand for the weight from now on; None restores the whole weight."""
        # With low_cpu_mem_usage A is empty at first, on the meta device.
        device = torch.device("cpu") if self.A.is_meta else self.A.device
        self.factors = (
            None if factors is None else LayerFactors(factors, device, trainable=self.trains_factors, filled=filled)
        )

    # -- loading -------------------------------------------------------------------------------------------------------

    def check_saved(self, name: str, saved: Mapping[str, Tensor]) -> None:
        """Raise if tensors by their names on disk, of the layer ``name``, are not all there, or of another shape."""
        needed = {"A", "B"} | ({"left", "right"} if {"left", "right"} & saved.keys() else set())
        if missing := sorted(needed - saved.keys()):
            raise LoraSVDError(
                f"{name}.{ADAPTERS}.{part_of(missing[0])}: missing in this adapter, or under another name; get its "
                "file again"
            )
        (out_features, in_features), (rows, columns) = self.shape, self.split.shape
        rank = min(saved["right"].shape[:1], default=0) if "left" in needed else 0
        for part, size in (("rows", rows), ("columns", columns)):
            if part in saved:
                self._check_index(f"{name}.{ADAPTERS}.{part_of(part)}", saved[part], size)
        rows, columns = (len(saved[part]) if part in saved else n for part, n in (("rows", rows), ("columns", columns)))
        expected: dict[str, tuple[int, ...]] = {
            "A": (self.r, in_features),
            "B": (out_features, self.r),
            "left": (rows, rank),
            "right": (rank, columns),
            "counts": (len(COUNTS),),
            "group": (2,) if "group" in saved and len(saved["group"]) == 2 else (1,),
        }
        for statistic in STATISTICS:
            is_packed = statistic in saved and saved[statistic].dim() == 1
            expected[statistic] = self.observer.sum_shape(statistic, packed=is_packed)
        for part, shape in expected.items():
            found = saved.get(part)
            if found is not None and tuple(found.shape) != shape:
                raise LoraSVDError(
                    f"{name}.{ADAPTERS}.{part_of(part)}: has shape {tuple(found.shape)} in this adapter, expected "
                    f"{shape}; load it into the model it was trained on, with its own adapter_config.json"
                )

    @staticmethod
    def _check_index(name: str, index: Tensor, size: int) -> None:
        """Raise unless an index is one of some of ``size`` features, ascending; on the meta device it has no values."""
        is_index = index.dim() == 1 and index.dtype == torch.int64 and 0 < len(index) <= size
        if is_index and not index.is_meta:
            is_index = bool((index.diff() > 0).all()) and int(index[0]) >= 0 and int(index[-1]) < size
        if not is_index:
            raise LoraSVDError(
                f"{name}: is no index of some of {size} features in this adapter, expected ascending integers below "
                f"{size}; load it into the model it was trained on, or get its file again"
            )

    def _room(self, saved: Mapping[str, Tensor]) -> Factors:
        left, right, *index = (torch.empty_like(saved[part]) if part in saved else None for part in OF_FACTORS)
        assert left is not None
        assert right is not None
        is_narrowed = any(of is not None for of in index)
        return Factors(left, right, None if is_narrowed else self.split, *index)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Make room for what is about to be loaded, of its shapes, and take away what is not: a run is thus resumed
        from, or the best model loaded from, a checkpoint of any phase."""
        saved = {key.rpartition(".")[2]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        if saved:
            self.check_saved(prefix.partition(f".{ADAPTERS}.")[0], saved)
            if self.factors is None or not self.factors.fits(saved):  # else an optimizer keeps what it has
                self.set_factors(self._room(saved) if "left" in saved else None)
            self.observer.make_room(saved, self.A.device)
            self.group = torch.empty_like(saved["group"], device=self.A.device) if "group" in saved else None
            self.was_loaded = True
        super()._load_from_state_dict(state_dict, prefix, *args)
