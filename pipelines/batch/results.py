"""What the journal says of a row, and what it takes for a row to be finished."""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from .. import save
from ..errors import BadInput
from ..printable import printable
from ..session import Result
from .journal import sha256_of
from .plan import Planned

SHOWN = 300


class State(Enum):
    """What an earlier run has left of a row; all but the first two are made again."""

    DONE = "done"
    NEW = "new"
    FAILED = "failed before"
    CHANGED = "asked for something else"
    GONE = "whose file is gone"
    DAMAGED = "whose file is not what was written"


def state(planned: Planned, entry: Mapping[str, Any] | None) -> State:
    """
    Raises:
        OSError: the file is there but cannot be read.
    """
    if entry is None:
        return State.NEW
    if entry.get("row") != planned.asked:
        return State.CHANGED
    if entry.get("status") != "done":
        return State.FAILED
    try:
        whole = sha256_of(planned.file) == entry.get("sha256")
    except FileNotFoundError:
        return State.GONE
    return State.DONE if whole else State.DAMAGED


def is_foreign(path: Path) -> bool:
    """Whether the file at `path` is there and holds something that attnswap has not made.

    An empty file holds nothing: a power cut leaves such where a file was about to be.
    """
    if not path.exists() or (path.is_file() and path.stat().st_size == 0):
        return False
    try:
        save.read_record(path)
    except BadInput:
        return True
    return False


def done(planned: Planned, result: Result, *, batch: int, worker: str) -> dict[str, Any]:
    """The entry of a row that was made, `batch` rows in one call."""
    return {
        **_head(planned, "done", worker),
        "file": planned.file.name,
        "sha256": sha256_of(planned.file),
        "seconds": round(result.seconds, 3),
        "batch": batch,
        "peak_bytes": result.peak_bytes,
        "peak_since_start": result.peak_since_start,
        "report": result.report and result.report.summary(),
        "notices": list(result.notices),
        "error": None,
    }


def failed(planned: Planned, error: BaseException, *, expected: bool, worker: str) -> dict[str, Any]:
    """The entry of a row that could not be made; of what nobody expected, with the traceback."""
    text = str(error) if expected else f"{type(error).__name__}: {error}"
    return {
        **_head(planned, "failed", worker),
        "file": None,
        "sha256": None,
        "seconds": None,
        "batch": None,
        "peak_bytes": None,
        "report": None,
        "error": text,
        **({} if expected else {"traceback": "".join(traceback.format_exception(error))}),
    }


def on_a_line(error: str) -> str:
    """What went wrong, fit for a terminal; the entry has it whole."""
    first, _, more = error.partition("\n")
    return printable(first, SHOWN) + (" …" if more else "")


def _head(planned: Planned, status: str, worker: str) -> dict[str, Any]:
    return {
        "id": planned.id,
        "status": status,
        "line": planned.row.line,
        "row": planned.asked,
        "worker": worker,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
    }
