from __future__ import annotations

from contextlib import contextmanager

import torch
from attnswap.benchmarks.timing import MAX_ROUNDS, MIN_ROUNDS, CpuClock, Timed, clock_for, interleave


class ScriptedClock:
    """Gives prepared readings instead of real ones."""

    def __init__(self, readings_ms):
        self._readings = iter(readings_ms)

    def measure(self, call):
        call()
        reading = next(self._readings)
        return lambda: reading

    def synchronize(self):
        pass


def test_contenders_are_called_in_turn():
    calls = []
    contenders = {name: Timed(lambda name=name: calls.append(name)) for name in "ABC"}
    timings = interleave(contenders, CpuClock(), seconds=0.001)
    assert "".join(calls) == "ABC" * (len(calls) // 3)
    assert all(MIN_ROUNDS <= timing.rounds <= MAX_ROUNDS for timing in timings.values())


def test_the_median_stands_with_the_fastest_and_the_slowest_and_warm_up_is_left_out():
    warm_up, rounds = [1000.0], [3.0, 1.0, 2.0, 9.0, 2.5]
    slow_call = Timed(lambda: torch.randn(10**6))  # long against the time allowed: one warm-up round, the fewest others
    timing = interleave({"A": slow_call}, ScriptedClock(warm_up + rounds), seconds=1e-6)["A"]
    assert (timing.median_ms, timing.min_ms, timing.max_ms, timing.rounds) == (2.5, 1.0, 9.0, 5)


def test_what_is_around_a_call_is_entered_each_time_and_not_timed():
    events = []

    @contextmanager
    def around():
        events.append("enter")
        yield
        events.append("leave")

    class Clock(CpuClock):
        def measure(self, call):
            events.append("start")
            reading = super().measure(call)
            events.append("stop")
            return reading

    interleave({"A": Timed(lambda: events.append("call"), around)}, Clock(), seconds=0.001)
    once = ["enter", "start", "call", "stop", "leave"]
    assert events == once * (len(events) // len(once))


def test_a_cpu_is_timed_by_the_wall_clock():
    assert isinstance(clock_for(torch.device("cpu")), CpuClock)
