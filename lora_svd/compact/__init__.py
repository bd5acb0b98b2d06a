"""What a user ships: low-rank layers, their checkpoint, and a report of their size."""

from .card import compact_card
from .dense import densify
from .hub import push_compact
from .loader import LoraSVDCompactConfig, LoraSVDCompactQuantizer, describe_compact, untie
from .low_rank import compact_module, dense_weight, factored_output, stored_weight
from .quantized import check_quantization, keep_unpacked, quantize_modules
from .report import LayerReport, ParameterReport, parameter_report
from .saving import save_compact
from .standalone import LowRankEmbedding, LowRankLinear, TiedHead, layer_features, tie_head
from .stored import num_bytes

__all__ = [
    "LayerReport",
    "LoraSVDCompactConfig",
    "LoraSVDCompactQuantizer",
    "LowRankEmbedding",
    "LowRankLinear",
    "ParameterReport",
    "TiedHead",
    "check_quantization",
    "compact_card",
    "compact_module",
    "dense_weight",
    "densify",
    "describe_compact",
    "factored_output",
    "keep_unpacked",
    "layer_features",
    "num_bytes",
    "parameter_report",
    "push_compact",
    "quantize_modules",
    "save_compact",
    "stored_weight",
    "tie_head",
    "untie",
]
