"""Compression of a checkpoint that does not fit into memory: one decoder block of it is in memory at a time."""

from .compress import compress_checkpoint

__all__ = ["compress_checkpoint"]
