"""Errors raised by lora_svd."""


class LoraSVDError(ValueError):
    """A setting, call or checkpoint that cannot be honoured: the field or module, the value and the mend."""


class NumericalError(LoraSVDError):
    """Statistics or matrices from which no trustworthy factorization can be computed."""
