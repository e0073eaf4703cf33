"""What can go wrong in a job, by whose fault it is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

SHOWN = 12
BLACKED_OUT = "the model's safety checker has blacked the picture out. Try another --seed or prompt."


class BadInput(ValueError):
    """The request cannot be met as written. Raised before any denoising step; the message says what would do."""


class JobFailed(RuntimeError):
    """The request was fine, the work was not: out of memory, not-a-number, a full disk."""


class NotWritten(JobFailed):
    """A file could not be written: a full disk, a folder that is gone.

    Args:
        path: of the file.
        error: of the system.
    """

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"{path} could not be written: {error.strerror or error}")
        self.errno = error.errno


def near(name: str, known: Iterable[str]) -> str:
    """' Did you mean …?' with the names most like `name`, else those that there are, a dozen at most."""
    known = sorted(known)
    if matches := difflib.get_close_matches(name, known, n=3, cutoff=0.5):
        return f" Did you mean {' or '.join(matches)}?"
    more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return f" There are: {', '.join(known[:SHOWN])}{more}." if known else ""
