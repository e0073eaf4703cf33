"""The rows of a result, as a terminal and a Markdown page both show them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from .result import TABLE_WIDTH, Growth, Measurement, Record, Result, Target

HEADINGS = ("contender", "ms", "min … max", "vs dense", "vs same", "of ideal")
PEAK, DENSITY = "peak MiB", "density"
LEGEND = (
    "ms: median. vs dense, vs same: how many times faster than the fastest dense attention, and than the fastest "
    "code by others for the same result (its preparation not timed). of ideal: the time that this machine's measured "
    "peak and bandwidth allow, as a share of the time taken. peak MiB: the most that a call allocates, output "
    "included. density: the share of dense attention's query-key pairs that the layers of a method compute."
)
WORK_HEADINGS = ("work", "executed ÷ ideal", "vs dense", "work allows", "of that", "ideal allows", "of that")
WORK_LEGEND = (
    "work: the operations that a contender executes, over those that the result needs. work allows, ideal allows: the "
    "speed-up over dense attention that the one or the other allows, run as fast as dense attention runs its own; "
    "of that: the share that was measured."
)
_WIDTHS = (29, 9, 22, 10, 10, 10, 10)
_WORK_WIDTHS = (29, 18, 10, 13, 9, 13, 8)


def headings(record: Record) -> tuple[str, ...]:
    """Those of `cells`."""
    return (*HEADINGS, *[PEAK] * _has_peaks(record), *[DENSITY] * _has_densities(record))


def case_title(record: Record) -> str:
    shape = ", ".join(f"{name} {_plain(value)}" for name, value in record.shape.items())
    return f"{record.case} · {record.dtype} · {shape}"


def cells(record: Record, measurement: Measurement) -> tuple[str, ...]:
    """One row under `headings`, for a contender whose time is known."""
    if measurement.extrapolated_ms is None:
        time = _milliseconds(measurement.median_ms)
        span = f"{_milliseconds(measurement.min_ms)} … {_milliseconds(measurement.max_ms)}"
    else:
        time, span = f"≈ {_milliseconds(measurement.extrapolated_ms)}", "extrapolated"
    row = (
        measurement.contender,
        time,
        span,
        _times(record.speedup(measurement, "dense")),
        _times(record.speedup(measurement, "same")),
        _percent(record.fraction_of_ideal(measurement)),
    )
    peak, density = _mebibytes(measurement.peak_bytes), density_text(measurement.density)
    return (*row, *[peak] * _has_peaks(record), *[density] * _has_densities(record))


def has_work(record: Record) -> bool:
    """The operations that contenders execute were counted."""
    return any(measurement.flops for measurement in record.measurements)


def work_cells(record: Record, measurement: Measurement) -> tuple[str, ...]:
    """One row under `WORK_HEADINGS`."""
    return (
        measurement.contender,
        _times(record.excess(measurement)),
        _times(record.speedup(measurement, "dense")),
        _times(record.allowed(measurement.flops)),
        _percent(record.reached(measurement, measurement.flops)),
        _times(record.allowed(record.flops)),
        _percent(record.reached(measurement, record.flops)),
    )


def work_rows(record: Record) -> list[tuple[str, ...]]:
    """Dense attention is what all others are compared with, and has no row; nor has one that cannot run."""
    return [
        work_cells(record, measurement)
        for measurement in record.measurements
        if measurement.flops and measurement.role != "dense" and has_row(measurement)
    ]


def has_row(measurement: Measurement) -> bool:
    return measurement.median_ms is not None or measurement.extrapolated_ms is not None


def growth_line(growth: Growth) -> str:
    """How the time of a contender grows along a series."""
    which = f"{growth.contender}, {growth.dtype}, {growth.series}"
    return f"{which}: time grows as size ^ {growth.exponent:.2f} from {growth.smallest} to {growth.largest}"


def target_line(target: Target) -> str:
    """What was aimed at, and what was found."""
    verdict = {True: "met", False: "missed", None: "open"}[target.met]
    return f"target {verdict}: {target.aim}; {target.found}"


def _has_peaks(record: Record) -> bool:
    return any(measurement.peak_bytes is not None for measurement in record.measurements)


def _has_densities(record: Record) -> bool:
    return any(measurement.density is not None for measurement in record.measurements)


def not_timed(measurement: Measurement) -> str:
    """Why a contender has no row."""
    return f"{measurement.contender}: {measurement.status}, {measurement.reason}"


def text_table(result: Result) -> str:
    return "\n".join(_text_lines(result))


def _text_lines(result: Result) -> Iterator[str]:
    machine = f"{result.device['name']}, torch {result.versions['torch']}, {result.date}"
    yield textwrap.shorten(machine, TABLE_WIDTH)
    for benchmark in dict.fromkeys(record.benchmark for record in result.records):
        yield ""
        records = [record for record in result.records if record.benchmark == benchmark]
        yield _columns((benchmark, *max(map(headings, records), key=len)[1:]))
        for record in records:
            yield from textwrap.wrap(case_title(record), TABLE_WIDTH, subsequent_indent="    ")
            for measurement in record.measurements:
                if has_row(measurement):
                    yield _columns((f"  {measurement.contender}", *cells(record, measurement)[1:]))
                else:
                    yield from textwrap.wrap(
                        not_timed(measurement), TABLE_WIDTH, initial_indent="  ", subsequent_indent="    "
                    )
        yield from _work_lines([record for record in records if has_work(record)])
        for growth in result.growths:
            if growth.benchmark == benchmark:
                yield from textwrap.wrap(growth_line(growth), TABLE_WIDTH, subsequent_indent="    ")
        for target in result.targets:
            if target.benchmark == benchmark:
                yield from textwrap.wrap(target_line(target), TABLE_WIDTH, subsequent_indent="    ")
    if result.cut:
        yield ""
        for cut in result.cut:
            line = f"not measured: {cut.benchmark}, {cut.case}, {cut.dtype}: {cut.reason}"
            yield from textwrap.wrap(line, TABLE_WIDTH, subsequent_indent="    ")
    yield ""
    yield from textwrap.wrap(LEGEND, TABLE_WIDTH)
    if any(has_work(record) for record in result.records):
        yield from textwrap.wrap(WORK_LEGEND, TABLE_WIDTH)


def _work_lines(records: Sequence[Record]) -> Iterator[str]:
    if not records:
        return
    yield ""
    yield _columns(WORK_HEADINGS, _WORK_WIDTHS)
    for record in records:
        yield f"{record.case} · {record.dtype}"
        yield from (_columns((f"  {name}", *rest), _WORK_WIDTHS) for name, *rest in work_rows(record))


def _columns(texts: tuple[str, ...], widths: Sequence[int] = _WIDTHS) -> str:
    first, *rest = zip(texts, widths, strict=False)
    return (f"{first[0]:<{first[1]}}" + "".join(f"{text:>{width}}" for text, width in rest)).rstrip()


def _plain(value: object) -> str:
    return " x ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _milliseconds(value: float | None) -> str:
    """Three significant digits, and never an exponent."""
    if value is None:
        return "–"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _mebibytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**20:.1f}"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x"


def density_text(density: float | None) -> str:
    """In percent; below ten of them with a decimal, as a large picture's are a few tenths."""
    return "–" if density is None else f"{density:.1%}" if density < 0.1 else f"{density:.0%}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
