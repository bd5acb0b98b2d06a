"""What a user ships: low-rank layers, their checkpoint, and a report of their size.

What is listed here is for users; the rest of the package takes what it needs from the modules.
"""

from .dense import densify
from .hub import push_compact
from .layers import LowRankEmbedding, LowRankLinear, TiedHead
from .saving import save_compact
from .size import LayerReport, ParameterReport, parameter_report

__all__ = [
    "LayerReport",
    "LowRankEmbedding",
    "LowRankLinear",
    "ParameterReport",
    "TiedHead",
    "densify",
    "parameter_report",
    "push_compact",
    "save_compact",
]
