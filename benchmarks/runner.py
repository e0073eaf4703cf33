"""Runs benchmarks and collects what they found. `python -m attnswap.benchmarks.runner --help`."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import machine
from .growth import growths, too_long
from .machine import Ceiling
from .measure import measure_case
from .ops import default_registry
from .registry import DTYPES, Benchmark, Case
from .result import FIT_FROM, Cut, Record, Result, Target

# How long the contenders of one case are timed, all of them together.
SECONDS_PER_CASE = {"cuda": 1.5, "cpu": 4.0}
QUICK_SECONDS_PER_CASE = 0.4
# A contender whose next call is expected to take longer is not called.
LONGEST_CALL_S = {"cuda": 1.0, "cpu": 10.0}

Progress = Callable[[int, int, str], None]


def run(
    ops: Sequence[str] | None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    quick: bool = False,
    progress: Progress | None = None,
    budget_s: float | None = None,
) -> Result:
    """Measures `ops` (all where None) on `device`.

    Args:
        ops: Names as in `kernels.ops()`.
        device: CUDA where there is one, else the CPU, where None.
        dtype: A dtype or its name (`"bf16"`, `"bfloat16"`); None measures each case in its own dtypes.
        quick: Only the cases marked so, and fewer rounds: to see that it works, not to quote.
        progress: Called as `progress(done, total, text)` before each case and once at the end.
        budget_s: Seconds for the whole run; a case that might overrun it is left out and listed in `Result.cut`.

    Raises:
        ValueError: for an unknown op (with near matches), dtype or device.
    """
    benchmarks = default_registry().select(ops)
    return run_benchmarks(benchmarks, device=device, dtype=dtype, quick=quick, progress=progress, budget_s=budget_s)


def run_benchmarks(
    benchmarks: Sequence[Benchmark],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    quick: bool = False,
    progress: Progress | None = None,
    budget_s: float | None = None,
) -> Result:
    """As `run`, for benchmarks that need not be in the registry."""
    where = _device(device)
    plan = _plan(benchmarks, where, _dtype(dtype), quick)
    report = progress or (lambda done, total, text: None)
    described = machine.describe_device(where)
    seconds = QUICK_SECONDS_PER_CASE if quick else SECONDS_PER_CASE[where.type]
    ceilings: dict[str, Ceiling] = {}
    records: list[Record] = []
    cut: list[Cut] = []
    started, longest = time.monotonic(), 0.0
    with torch.no_grad():
        for done, (benchmark, case, dtype_) in enumerate(plan):
            name = _name(dtype_)
            begun = time.monotonic()
            # The next case may take as long as the longest so far, so one that might overrun is not begun.
            if budget_s is not None and begun - started + longest > budget_s:
                cut.append(Cut(benchmark.name, case.label, name, f"the time budget of {budget_s:.0f} s was used up"))
                continue
            report(done, len(plan), f"{benchmark.name}: {case.label}, {name}")
            if benchmark.cost and name not in ceilings:
                ceilings[name] = machine.measure_ceiling(where, dtype_)
            cost = benchmark.cost(case, dtype_) if benchmark.cost else None
            known = too_long(benchmark, case, name, where, records, limit_s=LONGEST_CALL_S[where.type])
            records.append(
                Record(
                    benchmark=benchmark.name,
                    kind=benchmark.kind,
                    case=case.label,
                    shape=dict(case.shape),
                    dtype=name,
                    measurements=measure_case(benchmark, case, dtype_, where, seconds=seconds, known=known),
                    flops=cost.flops if cost else None,
                    bytes=cost.bytes if cost else None,
                    ideal_ms=ceilings[name].ideal_ms(cost.flops, cost.bytes) if cost else None,
                    series=case.scale.series if case.scale else None,
                    size=case.scale.size if case.scale else None,
                    fit_from=case.scale.fit_from if case.scale else FIT_FROM,
                )
            )
            longest = max(longest, time.monotonic() - begun)
    report(len(plan), len(plan), "done")
    return Result(
        date=datetime.date.today().isoformat(),
        device=described,
        versions=machine.versions(),
        commit=machine.commit(),
        quick=quick,
        ceilings={name: vars(ceiling) for name, ceiling in ceilings.items()},
        records=tuple(records),
        cut=tuple(cut),
        growths=growths(records),
        targets=_targets(benchmarks, records, described),
    )


def _targets(
    benchmarks: Sequence[Benchmark], records: Sequence[Record], device: Mapping[str, Any]
) -> tuple[Target, ...]:
    return tuple(
        target
        for benchmark in benchmarks
        if benchmark.targets
        for target in benchmark.targets([r for r in records if r.benchmark == benchmark.name], device)
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device(device: torch.device | str | None) -> torch.device:
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type not in SECONDS_PER_CASE:
        raise ValueError(f"benchmarks run on {' or '.join(SECONDS_PER_CASE)}, not on {chosen}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {chosen} was asked for, but torch {torch.__version__} sees no CUDA device")
    return chosen


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _plan(
    benchmarks: Sequence[Benchmark], device: torch.device, dtype: torch.dtype | None, quick: bool
) -> list[tuple[Benchmark, Case, torch.dtype]]:
    """The first case of every benchmark, then the second: a budget that runs out leaves no benchmark empty."""
    queues = [
        [
            (benchmark, case, dtype_)
            for case in benchmark.cases
            if case.device == device.type and (case.quick or not quick)
            for dtype_ in ((dtype,) if dtype else case.dtypes)
        ]
        for benchmark in benchmarks
    ]
    turns = max(map(len, queues), default=0)
    return [queue[turn] for turn in range(turns) for queue in queues if turn < len(queue)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m attnswap.benchmarks.runner", description="Measure the kernels.")
    parser.add_argument("--op", action="append", metavar="NAME", help="an op to measure; again for more (default: all)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="measure every case in this dtype")
    parser.add_argument("--quick", action="store_true", help="few cases, few rounds: not for quoting")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    options = parser.parse_args(arguments)
    try:
        result = run(
            options.op, device=options.device, dtype=options.dtype, quick=options.quick, progress=print_progress
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(result.table())
    if options.json:
        result.write(options.json)
    return 0


def print_progress(done: int, total: int, text: str) -> None:
    """One line per case on standard error, so that standard output holds the table alone."""
    print(f"[{done}/{total}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
