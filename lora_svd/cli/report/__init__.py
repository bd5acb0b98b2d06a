"""The report of a run: one self-contained HTML page and its figures as PNG files."""

from .data import Measured, ReportData, bytes_by_part
from .messages import Messages, recorded_messages
from .page import write_report
from .trained import LayerSummary, TrainedRun, TrainingSummary

__all__ = [
    "LayerSummary",
    "Measured",
    "Messages",
    "ReportData",
    "TrainedRun",
    "TrainingSummary",
    "bytes_by_part",
    "recorded_messages",
    "write_report",
]
