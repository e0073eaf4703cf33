"""What Diffusers has to say while it works, for whoever would rather say it in a line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heard_from_diffusers() -> Iterator[list[str]]:
    """What Diffusers would write to the terminal in the block, for a line of ours."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger = logging.getLogger("diffusers")
    before, logger.handlers = logger.handlers, [Ear(logging.WARNING)]
    try:
        yield heard
    finally:
        logger.handlers = before
