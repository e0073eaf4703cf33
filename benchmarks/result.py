"""What a run found: plain records that go to JSON and back, the ratios derived from them, and the table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

SCHEMA = 1
TABLE_WIDTH = 100
# Below this number of tokens, what a call costs at any size still shows.
FIT_FROM = 16384
# "wrong": the error is over the limit, so it was not timed. "unavailable": not meant to run on this machine or case.
# "failed": it broke. "extrapolated": it would take too long. The reason says why.
Status = Literal["ok", "wrong", "unavailable", "failed", "extrapolated"]


@dataclass(frozen=True)
class Measurement:
    """One contender on one case. Errors are ‖out − exact‖ / ‖exact‖; None where nothing was checked.

    `peak_bytes` is what a call allocates at most, its output included. `extrapolated_ms` was not measured. `flops` are
    the operations that the contender executes, where they are counted; `density` is the share of dense attention's
    query-key pairs that a model computes.
    """

    contender: str
    role: str
    status: Status
    reason: str = ""
    median_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    rounds: int = 0
    error: float | None = None
    error_limit: float | None = None
    peak_bytes: int | None = None
    extrapolated_ms: float | None = None
    flops: float | None = None
    density: float | None = None


@dataclass(frozen=True)
class Record:
    """One case in one dtype, with every contender that was tried."""

    benchmark: str
    kind: str
    case: str
    shape: Mapping[str, Any]
    dtype: str
    measurements: tuple[Measurement, ...]
    flops: float | None = None
    bytes: float | None = None
    ideal_ms: float | None = None
    series: str | None = None
    size: int | None = None
    fit_from: int = FIT_FROM

    def fastest(self, role: str) -> Measurement | None:
        timed = [m for m in self.measurements if m.role == role and m.median_ms is not None]
        return min(timed, key=lambda m: m.median_ms or 0.0, default=None)

    def speedup(self, measurement: Measurement, role: str) -> float | None:
        """How many times faster than the fastest contender of `role`."""
        baseline = self.fastest(role)
        if baseline is None or not baseline.median_ms or not measurement.median_ms:
            return None
        return baseline.median_ms / measurement.median_ms

    def fraction_of_ideal(self, measurement: Measurement) -> float | None:
        """Ideal time / measured time. Dense attention is other work than the op's, so it has none."""
        if self.ideal_ms is None or not measurement.median_ms or measurement.role == "dense":
            return None
        return self.ideal_ms / measurement.median_ms

    def excess(self, measurement: Measurement) -> float | None:
        """Executed over ideal work."""
        return measurement.flops / self.flops if measurement.flops and self.flops else None

    def allowed(self, flops: float | None) -> float | None:
        """The speed-up over dense attention that so much work allows, if it runs as fast as dense attention's."""
        dense = next((m.flops for m in self.measurements if m.role == "dense" and m.flops), None)
        return dense / flops if dense and flops else None

    def reached(self, measurement: Measurement, flops: float | None) -> float | None:
        """The share of that speed-up that was measured."""
        found, allowed = self.speedup(measurement, "dense"), self.allowed(flops)
        return found / allowed if found and allowed else None


@dataclass(frozen=True)
class Cut:
    """A case that the time budget left out."""

    benchmark: str
    case: str
    dtype: str
    reason: str


@dataclass(frozen=True)
class Growth:
    """How the time of a contender grows along a series: as size ** exponent, fitted from `smallest` to `largest`."""

    benchmark: str
    series: str
    dtype: str
    contender: str
    exponent: float
    smallest: int
    largest: int


@dataclass(frozen=True)
class Target:
    """What a benchmark aims at, what was found, and whether that is enough; None where nothing could be found."""

    benchmark: str
    aim: str
    found: str
    met: bool | None


@dataclass(frozen=True)
class Result:
    date: str
    device: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: str | None
    quick: bool
    ceilings: Mapping[str, Mapping[str, float]]
    records: tuple[Record, ...]
    cut: tuple[Cut, ...] = ()
    tests: Mapping[str, Any] | None = None
    growths: tuple[Growth, ...] = ()
    targets: tuple[Target, ...] = ()
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Result:
        if content.get("schema") != SCHEMA:
            raise ValueError(f"benchmark result of schema {content.get('schema')!r}; this version reads {SCHEMA}")
        records = tuple(
            Record(**{**record, "measurements": tuple(Measurement(**m) for m in record["measurements"])})
            for record in content["records"]
        )
        cut = tuple(Cut(**cut) for cut in content["cut"])
        growths = tuple(Growth(**growth) for growth in content.get("growths", ()))
        targets = tuple(Target(**target) for target in content.get("targets", ()))
        return cls(**{**content, "records": records, "cut": cut, "growths": growths, "targets": targets})

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Result:
        return cls.from_dict(json.loads(Path(path).read_text()))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, to a temporary name first, so that an interrupted run leaves no half-written file."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def with_tests(self, tests: Mapping[str, Any]) -> Result:
        return replace(self, tests=tests)

    def plus(self, other: Result) -> Result:
        """With what was measured on the same machine later on."""
        return replace(
            self,
            records=self.records + other.records,
            cut=self.cut + other.cut,
            growths=self.growths + other.growths,
            targets=self.targets + other.targets,
            ceilings={**other.ceilings, **self.ceilings},
        )

    def broken(self) -> Iterator[tuple[Record, Measurement]]:
        """Our own contenders that gave wrong numbers or broke."""
        for record in self.records:
            for measurement in record.measurements:
                if measurement.role == "ours" and measurement.status in ("wrong", "failed"):
                    yield record, measurement

    def table(self) -> str:
        """A plain-text table no wider than 100 columns."""
        from .table import text_table

        return text_table(self)
