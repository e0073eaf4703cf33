"""Series of cases: the exponent of growth, and contenders that are extrapolated instead of called."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attnswap.benchmarks import render, runner
from attnswap.benchmarks.growth import growths, too_long
from attnswap.benchmarks.registry import Scale
from attnswap.benchmarks.result import Measurement, Record, Result

CPU = torch.device("cpu")


def record(size, series="vectors", dtype="float32", **times_ms):
    # The fastest call is of no account: it is off by another factor at each size.
    measured = tuple(Measurement(name, "ours", "ok", "", time, time / size) for name, time in times_ms.items())
    return Record("doubling", "op", f"size {size}", {}, dtype, measured, series=series, size=size)


def test_the_exponent_of_a_power_law_is_found():
    sizes = (2**14, 2**16, 2**18)
    found = growths(record(size, linear=3e-4 * size, square=1e-6 * size**2) for size in sizes)
    assert {growth.contender: round(growth.exponent, 6) for growth in found} == {"linear": 1, "square": 2}
    assert {(growth.smallest, growth.largest) for growth in found} == {(2**14, 2**18)}


def test_small_sizes_and_other_series_and_dtypes_do_not_bend_the_line():
    records = [record(size, ours=size) for size in (2**14, 2**15, 2**16)]
    odd = [record(2**10, ours=1e6), record(2**15, series="other", ours=1e6), record(2**15, dtype="float16", ours=1e6)]
    (growth,) = growths([*records, *odd])
    assert growth.exponent == pytest.approx(1)


def test_two_points_are_no_line():
    assert growths([record(2**14, ours=1.0), record(2**15, ours=2.0)]) == ()


@pytest.fixture
def squared(doubling):
    """One case of size 4000 whose contender `dense` grows with the square of the size."""
    benchmark = doubling(ours=lambda x: x * 2, dense=lambda x: x * 3)
    (case,) = benchmark.cases
    slow = tuple(replace(c, order=2) if c.name == "dense" else c for c in benchmark.contenders(CPU))
    return replace(benchmark, cases=(replace(case, scale=Scale("vectors", 4000)),), contenders=lambda device: slow)


def test_a_call_that_would_take_too_long_is_extrapolated_from_the_largest_size(squared):
    before = [record(1000, dense=10.0), record(2000, dense=100.0, ours=1e9)]
    found = too_long(squared, squared.cases[0], "float32", CPU, before, limit_s=0.399)
    assert set(found) == {"dense"}  # ours was slow too, but nobody said how it grows
    assert (found["dense"].status, found["dense"].extrapolated_ms, found["dense"].median_ms) == (
        "extrapolated",
        400.0,
        None,
    )
    assert "extrapolated from 100 ms at 2000, as size ^ 2" in found["dense"].reason
    assert too_long(squared, squared.cases[0], "float32", CPU, before, limit_s=0.401) == {}


def test_nothing_is_extrapolated_without_a_measurement_of_the_series(squared):
    for before in ([], [record(2000, series="other", dense=1e9)], [record(2000, dtype="float16", dense=1e9)]):
        assert too_long(squared, squared.cases[0], "float32", CPU, before, limit_s=1.0) == {}


def test_the_runner_does_not_call_what_is_extrapolated(squared, monkeypatch):
    (small,) = squared.cases
    large = replace(small, label="large", scale=Scale("vectors", 4_000_000_000))
    calls = []

    def counted(contender):
        def prepare(case, inputs):
            calls.append((contender.name, case.label))
            return contender.prepare(case, inputs)

        return replace(contender, prepare=prepare)

    contenders = tuple(map(counted, squared.contenders(CPU)))
    both = replace(squared, cases=(small, large), contenders=lambda device: contenders)
    first, second = runner.run_benchmarks([both], device="cpu", quick=True).records
    assert [m.status for m in first.measurements] == ["ok", "ok"]
    assert [m.status for m in second.measurements] == ["ok", "extrapolated"]
    assert ("dense", "large") not in calls
    assert (second.series, second.size) == ("vectors", 4_000_000_000)


@pytest.mark.parametrize("file", sorted(render.RESULTS.glob("*linear-attention*.json")), ids=lambda file: file.name)
def test_the_exponents_on_the_page_are_those_of_the_times_on_the_page(file):
    result = Result.read(file)
    assert result.growths == growths(result.records)
