"""One case: every contender is tried and checked; those that are right are timed against each other."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from .memory import peak_bytes
from .registry import Benchmark, Case, Check, Contender, Inputs, Prepared, Unavailable
from .result import Measurement
from .timing import Clock, Timed, clock_for, interleave

# Our error may be twice that of plain PyTorch in the same dtype, and never has to be below one rounding.
ERROR_FACTOR = 2.0
MAX_REASON = 300
SEED = 0


def measure_case(
    benchmark: Benchmark,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seconds: float,
    known: Mapping[str, Measurement],
) -> tuple[Measurement, ...]:
    """One measurement per contender, in their order; whatever goes wrong is in the measurement, nothing is raised.

    `known` has measurements, by contender, that need not or cannot be made.
    """
    case = replace(case, dtypes=(dtype,))  # what is executed may depend on it
    contenders = benchmark.contenders(device)
    found = _measure(contenders, benchmark, case, dtype, device, seconds=seconds, known=known)
    return tuple(
        replace(measurement, flops=contender.flops(case))
        if contender.flops and measurement.status != "unavailable"
        else measurement
        for contender, measurement in zip(contenders, found, strict=True)
    )


def _measure(
    contenders: Sequence[Contender],
    benchmark: Benchmark,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seconds: float,
    known: Mapping[str, Measurement],
) -> tuple[Measurement, ...]:
    try:
        clock = clock_for(device)
        inputs = benchmark.make_inputs(case, dtype, device, SEED)
        check = benchmark.check(case, inputs) if benchmark.check else None
    except Exception as error:
        return tuple(_failed(contender, _reason(error)) for contender in contenders)
    memory_on = device if benchmark.memory else None
    trials = [
        (known[contender.name], None)
        if contender.name in known
        else _try(contender, case, inputs, check, clock, memory_on)
        for contender in contenders
    ]
    ready = {found.contender: Timed(prepared.call, prepared.around) for found, prepared in trials if prepared}
    if not ready:
        return tuple(found for found, _ in trials)
    try:
        timings = interleave(ready, clock, seconds=seconds)
    except Exception as error:
        failure = f"while timing: {_reason(error)}"
        return tuple(
            replace(found, status="failed", reason=failure) if prepared else found for found, prepared in trials
        )
    return tuple(
        replace(found, **asdict(timings[found.contender])) if prepared else found for found, prepared in trials
    )


def _try(
    contender: Contender,
    case: Case,
    inputs: Inputs,
    check: Check | None,
    clock: Clock,
    memory_on: torch.device | None,
) -> tuple[Measurement, Prepared | None]:
    """The contender's first call: is it able to run, and is it right? Only then is there something to time."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            prepared = contender.prepare(case, inputs)
            _poison(inputs)
            with prepared.around():
                output = prepared.call()
            density = prepared.density() if prepared.density else None
            clock.synchronize()  # a kernel that breaks is to be blamed here, not at the next contender
            # Dense attention computes something else; it is a baseline for time and PyTorch's own.
            error, limit = (
                _error(prepared.restore(output), check) if check and contender.role != "dense" else (None, None)
            )
            del output
            with prepared.around():
                peak = peak_bytes(prepared.call, memory_on) if memory_on else None
        except Unavailable as unavailable:
            return Measurement(contender.name, contender.role, "unavailable", str(unavailable)), None
        except Exception as failure:
            notes = "; ".join(dict.fromkeys(str(warning.message).splitlines()[0] for warning in caught))
            return _failed(contender, _reason(failure, notes)), None
    found = Measurement(
        contender.name, contender.role, "ok", error=error, error_limit=limit, peak_bytes=peak, density=density
    )
    if error is not None and limit is not None and not error <= limit:  # NaN is wrong too
        reason = f"error {error:.2g} against the reference, {limit:.2g} allowed"
        return replace(found, status="wrong", reason=reason), None
    return found, prepared


def _poison(inputs: Inputs) -> None:
    """Leaves NaN in the memory that the next output is likely to get: there, the last contender's right answer lies."""
    for tensor in inputs.values():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            torch.full_like(tensor, torch.nan)


def _error(output: Any, check: Check) -> tuple[float, float]:
    exact = check.exact.double()
    scale = exact.norm()

    def relative(tensor: torch.Tensor) -> float:
        return float((tensor.double() - exact).norm() / scale)

    limit = max(ERROR_FACTOR * relative(check.yardstick), torch.finfo(check.yardstick.dtype).eps)
    return relative(check.sample(output)), limit


def _failed(contender: Contender, reason: str) -> Measurement:
    return Measurement(contender.name, contender.role, "failed", reason)


def _reason(error: Exception, notes: str = "") -> str:
    """One line: PyTorch often raises a general message and puts the cause into warnings."""
    first = next((line for line in str(error).splitlines() if line.strip()), "no message")
    text = f"{type(error).__name__}: {first.strip()}" + (f" ({notes})" if notes else "")
    return text if len(text) <= MAX_REASON else f"{text[: MAX_REASON - 1]}…"
