"""Options of a configuration: a field with its help text and the check of its values.

A check is a function of the field's name and the value, and raises LoraSVDError unless the value is valid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import field, fields
from types import UnionType
from typing import Any

from .errors import LoraSVDError

Check = Callable[[str, Any], None]


def option(default: Any, help: str, check: Check | None = None) -> Any:
    """A dataclass field with the help text that command lines show, and the check of its values."""
    return field(default=default, metadata={"help": help} | ({"check": check} if check else {}))


def check_options(config: Any) -> None:
    """Check the value of every option of a dataclass.

    Raises:
        LoraSVDError: one is not valid, with the field, the value and what is valid.
    """
    for entry in fields(config):
        if check := entry.metadata.get("check"):
            check(entry.name, getattr(config, entry.name))


def number(type_: type | UnionType, accept: Callable[[Any], bool], expected: str) -> Check:
    """Check of numbers: of this type, no bool, finite, and accepted by ``accept``."""

    def check(name: str, value: Any) -> None:
        is_number = isinstance(value, type_) and not isinstance(value, bool)
        if not (is_number and abs(value) < math.inf and accept(value)):
            raise LoraSVDError(f"{name}: got {value!r}, expected {expected}")

    return check


def whole(least: int) -> Check:
    """Check of integers, ``least`` or more."""
    return number(int, lambda x: x >= least, f"an integer >= {least}")


def one_of(valid: Collection[str]) -> Check:
    """Check of texts: one of ``valid``, a registry that may grow."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in valid:
            raise LoraSVDError(f"{name}: unknown value {value!r}, expected one of {sorted(valid)}")

    return check


def optional(check: Check) -> Check:
    """Check that lets None pass as well."""
    return lambda name, value: None if value is None else check(name, value)


def by_module(check_value: Check, *, patterns: bool = False) -> Check:
    """Check of dictionaries by module name, or by regular expression with ``patterns``."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise LoraSVDError(f"{name}: got {value!r}, expected a dictionary with names of modules as keys")
        for key, entry in value.items():
            check_value(f"{name}: {key}", entry)
            if patterns:
                regex(name, key)

    return check


def module_names(*, text: bool = True, patterns: bool = False) -> Check:
    """Check of module names in a list or, with ``text``, of one regular expression; with ``patterns`` the entries of
    a list are regular expressions too."""

    def check(name: str, value: Any) -> None:
        is_list = isinstance(value, list | tuple | set) and all(isinstance(entry, str) for entry in value)
        if not (is_list or (text and isinstance(value, str))):
            expected = "names in a list or a regular expression" if text else "names in a list"
            raise LoraSVDError(f"{name}: got {value!r}, expected {expected}")
        for entry in [value] if isinstance(value, str) else value if patterns else ():
            regex(name, entry)

    return check


def regex(name: str, value: str) -> None:
    """Check of regular expressions."""
    try:
        re.compile(value)
    except re.error as error:
        raise LoraSVDError(f"{name}: got {value!r}, expected a regular expression: {error}") from error


def layer_indices(name: str, value: Any) -> None:
    """Check of an index, or a list of them."""
    if not all(type(index) is int and index >= 0 for index in (value if isinstance(value, list) else [value])):
        raise LoraSVDError(f"{name}: got {value!r}, expected an index >= 0 or a list of them")


def flag(name: str, value: Any) -> None:
    """Check of bools."""
    if not isinstance(value, bool):
        raise LoraSVDError(f"{name}: got {value!r}, expected True or False")


REAL = int | float
COUNT = number(int, lambda x: x >= 1, "a positive integer")
POSITIVE = number(REAL, lambda x: x > 0, "a positive number")
SHARE = number(REAL, lambda x: 0 <= x <= 1, "a number in [0, 1]")
