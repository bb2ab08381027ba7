"""transformers and accelerate kept from telling a user of virtual GPUs about the real ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARIES = ("transformers", "accelerate", "bitsandbytes")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within it, only errors of these libraries are shown; their levels are restored."""
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
