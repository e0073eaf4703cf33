"""Along a series of cases that differ in size alone: how time grows, and what a call too long to make would take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import torch

from .registry import Benchmark, Case
from .result import Growth, Measurement, Record

# A line through two points says nothing about its fit.
FEWEST_POINTS = 3


def growths(records: Iterable[Record]) -> tuple[Growth, ...]:
    """The exponent of each contender's median time, from the size up that the series is fitted from."""
    points: dict[tuple[str, str, str, str], list[tuple[int, float]]] = {}
    for record in records:
        if record.series is None or record.size is None or record.size < record.fit_from:
            continue
        for measurement in record.measurements:
            if measurement.median_ms:
                key = (record.benchmark, record.series, record.dtype, measurement.contender)
                points.setdefault(key, []).append((record.size, measurement.median_ms))
    return tuple(
        Growth(*key, exponent(found), min(found)[0], max(found)[0])
        for key, found in points.items()
        if len(found) >= FEWEST_POINTS
    )


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """Of the power law through (size, quantity), by least squares on logarithms."""
    sizes, amounts = zip(*points, strict=True)
    return statistics.linear_regression(list(map(math.log, sizes)), list(map(math.log, amounts))).slope


def too_long(
    benchmark: Benchmark, case: Case, dtype: str, device: torch.device, records: Iterable[Record], *, limit_s: float
) -> dict[str, Measurement]:
    """The contenders that are not to be called, by name: those expected to need more than `limit_s` for a call.

    Expected is the time at the largest size measured so far in the series, times (size / that size) ** order.
    """
    if case.scale is None:
        return {}
    before = [
        record
        for record in records
        if (record.benchmark, record.series, record.dtype) == (benchmark.name, case.scale.series, dtype)
    ]
    found = {}
    for contender in benchmark.contenders(device):
        measured = [
            (record.size, measurement.median_ms)
            for record in before
            for measurement in record.measurements
            if record.size and measurement.contender == contender.name and measurement.median_ms
        ]
        if contender.order is None or not measured:
            continue
        size, time_ms = max(measured)
        expected_ms = time_ms * (case.scale.size / size) ** contender.order
        if expected_ms > limit_s * 1e3:
            reason = (
                f"not called, it would take about {expected_ms / 1e3:.0f} s: extrapolated from {time_ms:.0f} ms "
                f"at {size}, as size ^ {contender.order:g}"
            )
            found[contender.name] = Measurement(
                contender.name, contender.role, "extrapolated", reason, extrapolated_ms=expected_ms
            )
    return found
