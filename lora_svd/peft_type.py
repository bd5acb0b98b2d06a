"""The name under which PEFT knows this tuner.

PEFT's own enum cannot be extended from outside; a string enum whose name equals its value hashes and compares like the
string, so it is found by the raw JSON value, has the ``.value`` that transformers reads, and pickles by reference to
this package, which registers the tuner when it is unpickled.
"""

import enum


class LoraSVDPeftType(enum.StrEnum):
    """The single member, ``LORA_SVD``."""

    LORA_SVD = "LORA_SVD"


LORA_SVD = LoraSVDPeftType.LORA_SVD
PREFIX = "lora_svd_"
