"""What all pages of the demo share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cost.pace import Pace
    from .server.limits import Limits
    from .server.shelf import Shelf
    from .server.visitors import Visitors
    from .server.worker import Worker


@dataclass(frozen=True)
class Site:
    """
    Attributes:
        shelf: the models that are offered.
        worker: runs one job at a time.
        visitors: what each of them has made.
        limits: that no request gets beyond.
        pace: how fast this machine has been so far.
        folder: private; for everything that is written, gone when the server ends.
    """

    shelf: Shelf
    worker: Worker
    visitors: Visitors
    limits: Limits
    pace: Pace
    folder: Path
