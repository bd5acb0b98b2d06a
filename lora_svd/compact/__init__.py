"""What a user ships: low-rank layers, their checkpoint, and a report of their size."""

from .loader import LoraSVDCompactConfig, LoraSVDCompactQuantizer, describe_compact, save_compact, untie
from .low_rank import LowRankLinear, compact_module, stored_weight
from .report import LayerReport, ParameterReport, parameter_report

__all__ = [
    "LayerReport",
    "LoraSVDCompactConfig",
    "LoraSVDCompactQuantizer",
    "LowRankLinear",
    "ParameterReport",
    "compact_module",
    "describe_compact",
    "parameter_report",
    "save_compact",
    "stored_weight",
    "untie",
]
