"""Counter of a run's warnings."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

Messages = Counter[tuple[str, str]]


@contextmanager
def recorded_messages() -> Iterator[Messages]:
    """Count what ``warnings`` shows and what is logged as a warning or worse, by (category or logger, text).

    Filters stay as they are: what they silence is not counted, and what they show once counts once.
    """
    messages: Messages = Counter()
    handler = _CountingHandler(messages)
    loggers = [logging.getLogger()]
    if not (apart := logging.getLogger("transformers")).propagate:
        loggers.append(apart)
    with warnings.catch_warnings():
        show = warnings.showwarning

        def count_and_show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
            messages[category.__name__, str(message)] += 1
            show(message, category, *place, **options)

        warnings.showwarning = count_and_show
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield messages
        finally:
            for logger in loggers:
                logger.removeHandler(handler)


class _CountingHandler(logging.Handler):
    def __init__(self, messages: Messages) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != "py.warnings":  # counted when it was raised
            self._messages[record.name, record.getMessage()] += 1
