"""Times several callables against each other, in turn (A B C A B C …), so that a drift of the machine hits all alike.

`torch.utils.benchmark` and `triton.testing.do_bench` time one callable after the other, and the former keeps the
GPU's L2 cache warm between calls; neither fits a ratio that has to hold on a machine whose clocks move.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 100
WARM_UP_SHARE = 0.2
# Larger than any L2 cache. Zeroing it also keeps the GPU busy while Python launches the next call, so that the launch
# itself stays out of the figure.
FLUSH_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Timing:
    median_ms: float
    min_ms: float
    max_ms: float
    rounds: int

    @classmethod
    def of(cls, samples_ms: list[float]) -> Timing:
        return cls(statistics.median(samples_ms), min(samples_ms), max(samples_ms), len(samples_ms))


@dataclass(frozen=True)
class Timed:
    """What is timed; `around` is entered before each call, outside the timed region."""

    call: Callable[[], Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


class Clock(Protocol):
    def measure(self, call: Callable[[], Any]) -> Callable[[], float]:
        """Runs `call` once; the result gives its milliseconds once `synchronize` has been called."""

    def synchronize(self) -> None: ...


class CpuClock:
    def measure(self, call: Callable[[], Any]) -> Callable[[], float]:
        start = time.perf_counter()
        call()
        elapsed_ms = (time.perf_counter() - start) * 1e3
        return lambda: elapsed_ms

    def synchronize(self) -> None:
        pass


class CudaClock:
    """CUDA events, with the L2 cache flushed before each call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def measure(self, call: Callable[[], Any]) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        call()
        end.record()
        return lambda: start.elapsed_time(end)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def interleave(contenders: Mapping[str, Timed], clock: Clock, *, seconds: float) -> dict[str, Timing]:
    """Calls the contenders in turn for about `seconds` (5 to 100 rounds), after a warm-up of a fifth of that."""

    def one_round() -> dict[str, Callable[[], float]]:
        readings = {}
        for name, timed in contenders.items():
            with timed.around():
                readings[name] = clock.measure(timed.call)
        return readings

    started = time.perf_counter()
    warm_up_rounds = 0
    while True:
        one_round()
        clock.synchronize()
        warm_up_rounds += 1
        elapsed = time.perf_counter() - started
        if elapsed >= seconds * WARM_UP_SHARE:
            break
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, round(seconds / (elapsed / warm_up_rounds))))

    readings = [one_round() for _ in range(rounds)]
    clock.synchronize()
    return {name: Timing.of([reading[name]() for reading in readings]) for name in contenders}
