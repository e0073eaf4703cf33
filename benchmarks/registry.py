"""The one registry of what is measured; the runner needs to know nothing else about a benchmark."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from .result import FIT_FROM

if TYPE_CHECKING:
    from .result import Record, Target

Inputs = Mapping[str, Any]
Kind = Literal["op", "model"]
# "ours": what this package brings. "same": the same result by other people's code, its preparation not timed.
# "dense": what a user runs today, on the same tensors.
Role = Literal["ours", "same", "dense"]

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class Scale:
    """Where a case stands in a series of cases that differ in `size` alone, such as the number of tokens.

    How time grows along the series is fitted to the sizes from `fit_from` up.
    """

    series: str
    size: int
    fit_from: int = FIT_FROM


@dataclass(frozen=True)
class Case:
    """One problem size. `shape` is plain JSON and is all that the benchmark needs to build its inputs."""

    label: str
    shape: Mapping[str, Any]
    device: Literal["cpu", "cuda"]
    dtypes: tuple[torch.dtype, ...]
    quick: bool = False
    scale: Scale | None = None


@dataclass(frozen=True)
class Cost:
    """The least work that gives the result: floating-point operations, and each input read and output written once."""

    flops: float
    bytes: float


class Unavailable(Exception):
    """Raised by `Contender.prepare`: it cannot run this case on this machine, and is not meant to."""


@dataclass(frozen=True)
class Prepared:
    """A contender ready to be timed: only `call` is; `around` is entered outside the timed region at every call.

    `restore` brings what `call` returned into the form that the check takes: the op's own output, in its layout, or all
    of its outputs that are checked. `density` is the share of dense attention's query-key pairs that the latest call
    computed, where it is known.
    """

    call: Callable[[], Any]
    restore: Callable[[Any], Any] = field(default=lambda output: output)
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    density: Callable[[], float] | None = None


@dataclass(frozen=True)
class Contender:
    """`order`: its time grows as size ** order along a series. Given, a call that would take too long is not made, and
    its time is extrapolated. `flops`: the floating-point operations that it executes for a case, where they are
    counted."""

    name: str
    role: Role
    prepare: Callable[[Case, Inputs], Prepared]
    order: float | None = None
    flops: Callable[[Case], float] | None = None


@dataclass(frozen=True)
class Check:
    """What a right answer is: `exact` in higher precision, `yardstick` by plain PyTorch in the case's own dtype.

    Both hold only the part that `sample` takes from a full output, so that the largest cases can be checked too.
    """

    exact: torch.Tensor
    yardstick: torch.Tensor
    sample: Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: cases, inputs, contenders. A model has no `cost` and no `check`: it is compared by time alone.

    With `memory`, the peak memory of each contender is measured too. `targets` says of what was measured on a device
    (as `machine.describe_device` describes it) whether it is what was aimed at.
    """

    name: str
    cases: tuple[Case, ...]
    make_inputs: Callable[[Case, torch.dtype, torch.device, int], Inputs]
    contenders: Callable[[torch.device], tuple[Contender, ...]]
    cost: Callable[[Case, torch.dtype], Cost] | None = None
    check: Callable[[Case, Inputs], Check] | None = None
    kind: Kind = "op"
    memory: bool = False
    targets: Callable[[Sequence[Record], Mapping[str, Any]], Sequence[Target]] | None = None


class Registry:
    """Benchmarks by name, in the order in which they were registered."""

    def __init__(self, benchmarks: Iterable[Benchmark] = ()) -> None:
        self._benchmarks: dict[str, Benchmark] = {}
        for benchmark in benchmarks:
            self.register(benchmark)

    def register(self, benchmark: Benchmark) -> None:
        if benchmark.name in self._benchmarks:
            raise ValueError(f"benchmark {benchmark.name!r} is registered twice")
        self._benchmarks[benchmark.name] = benchmark

    def names(self) -> tuple[str, ...]:
        return tuple(self._benchmarks)

    def select(self, names: Iterable[str] | None) -> tuple[Benchmark, ...]:
        """The benchmarks called `names`, or all of them; an unknown name raises `ValueError` with the near matches."""
        if names is None:
            return tuple(self._benchmarks.values())
        return tuple(self._get(name) for name in names)

    def _get(self, name: str) -> Benchmark:
        if name in self._benchmarks:
            return self._benchmarks[name]
        near = difflib.get_close_matches(name, self._benchmarks, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(self._benchmarks) or 'none'}"
        raise ValueError(f"no benchmark for {name!r}; {hint}")
