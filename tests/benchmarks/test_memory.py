from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from attnswap.benchmarks import runner
from attnswap.benchmarks.memory import peak_bytes

CPU = torch.device("cpu")
MIB = 2**20
X = torch.zeros(MIB // 4)


def test_the_result_counts_and_the_inputs_do_not():
    assert peak_bytes(lambda: X.neg(), CPU) == MIB


def test_what_lives_at_once_adds_up_and_what_is_gone_does_not():
    def one_after_the_other():
        for _ in range(3):
            X.neg()

    def at_once():
        return [X.neg() for _ in range(3)]

    assert peak_bytes(one_after_the_other, CPU) == MIB
    assert peak_bytes(at_once, CPU) == 3 * MIB


def test_a_failing_call_raises_and_standard_error_is_kept(capfd):
    def fails():
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        peak_bytes(fails, CPU)
    print("still here", file=sys.stderr, flush=True)
    assert capfd.readouterr().err.endswith("still here\n")


def test_memory_is_measured_where_the_benchmark_asks_for_it(doubling):
    asked = replace(doubling(ours=lambda x: x + x), memory=True)
    (with_memory,), (without,) = (
        runner.run_benchmarks([benchmark], device="cpu", quick=True).records[0].measurements
        for benchmark in (asked, doubling(ours=lambda x: x + x))
    )
    assert with_memory.peak_bytes == 64 * 4
    assert without.peak_bytes is None
