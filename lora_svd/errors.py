"""Errors and warnings of lora_svd."""

import warnings
from contextvars import ContextVar

import numpy as np
import torch

_LINALG_ERRORS = (torch.linalg.LinAlgError, np.linalg.LinAlgError)  # pyright: ignore[reportPrivateImportUsage]


class LoraSVDError(ValueError):
    """A setting, call or checkpoint that cannot be honoured: the field or module, the value and the mend."""


class NumericalError(LoraSVDError):
    """Statistics or matrices from which no trustworthy factorization can be computed."""


class NumericalWarning(UserWarning):
    """A fallback was taken, so that a result is not the one that the method defines."""


_module: ContextVar[str | None] = ContextVar("module", default=None)


def warn_numerical(message: str) -> None:
    """Say that a fallback was taken, with the name of the module that :class:`in_module` is about in front."""
    name = _module.get()
    warnings.warn(message if name is None else f"{name}: {message}", NumericalWarning, stacklevel=3)


class in_module:
    """Put the module's name in front of numerical failures and warnings in the ``with`` block."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._token = _module.set(self._name)

    def __exit__(self, type_: object, error: BaseException | None, trace: object) -> None:
        _module.reset(self._token)
        if isinstance(error, (NumericalError, *_LINALG_ERRORS)) and self._name not in str(error):
            raise NumericalError(f"{self._name}: {error}") from error
