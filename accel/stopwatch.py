"""Time spent in parts of a run, without making the host wait for the device."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch


class Stopwatch:
    """Adds up how long named parts took; CUDA devices keep the time themselves, read when somebody asks."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def time(self, part: str, device: torch.device) -> Iterator[None]:
        """Add the time the body takes on `device` to `part`."""
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(torch.cuda.current_stream(device))
            yield
            end.record(torch.cuda.current_stream(device))
            self._pending.append((part, start, end))
        else:
            begun = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - begun

    def seconds(self, part: str) -> float:
        """Of a part so far; waits for the device."""
        for name, start, end in self._pending:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1000
        self._pending.clear()
        return self._seconds[part]

    def __getstate__(self) -> dict[str, Any]:
        # Events of a device belong to this process; a copy of a model starts anew.
        return vars(Stopwatch())


class Span:
    """From the begin of a run to the last moment it was seen to be at work, added up over runs."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._device: torch.device | None = None
        self._marks: tuple[Any, Any] = (None, None)

    def begin(self, device: torch.device) -> None:
        """A run begins on `device`."""
        self._seconds = self.seconds
        self._device = device
        start = self._mark()
        self._marks = (start, start)

    def reach(self) -> None:
        """The run is still at work."""
        if self._device is not None:
            self._marks = (self._marks[0], self._mark())

    @property
    def seconds(self) -> float:
        """So far; waits for the device."""
        start, end = self._marks
        if isinstance(start, float):
            return self._seconds + end - start
        if start is None or start is end:
            return self._seconds
        end.synchronize()
        return self._seconds + float(start.elapsed_time(end)) / 1000

    def _mark(self) -> Any:
        assert self._device is not None
        if self._device.type != "cuda":
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    def __getstate__(self) -> dict[str, Any]:
        return vars(Span())
