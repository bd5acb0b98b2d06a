"""Errors raised by lora_svd."""

import torch

_LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]


class LoraSVDError(ValueError):
    """A setting, call or checkpoint that cannot be honoured: the field or module, the value and the mend."""


class NumericalError(LoraSVDError):
    """Statistics or matrices from which no trustworthy factorization can be computed."""


class in_module:
    """Puts the module's name in front of a numerical failure inside of the ``with`` block."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NumericalError | _LinAlgError) and self._name not in str(error):
            raise NumericalError(f"{self._name}: {error}") from error
