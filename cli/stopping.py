"""Ctrl-C in what takes long: as a flag that every step looks at, since an exception may come where Python drops it."""

from __future__ import annotations

import os
import signal
from typing import Any


class Stop:
    """Whether somebody has asked, by Ctrl-C or by the signal that ends processes; as a context manager, it listens.

    The first lets the step that runs come to its end; the second does not wait for it.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return bool(self.signal)

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            # A shell that starts a job in the background has it ignore Ctrl-C.
            if (before := signal.getsignal(number)) is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _ask(self, number: int, _frame: object) -> None:
        self.signal = number
        self.__exit__()
        # Not by `print`, which may be at work; in the place of a bar, which is drawn again below.
        clear = b"\r\033[K" if os.isatty(2) else b""
        os.write(2, clear + b"attnswap: ending after this step; once more ends at once.\n")
