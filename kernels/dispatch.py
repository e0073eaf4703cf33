"""Which implementation of an operation runs, and why.

An operation is registered once, at import, with its check and its implementations. The backend is chosen for each
call: `use_backend` first, then the environment variable ``ATTNSWAP_BACKEND``, then ``auto``, which takes Triton on
a GPU where it can run and the eager PyTorch version everywhere else. A backend that was asked for by name never
falls back silently: where it cannot run, the call raises.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("reference", "eager", "triton")
AUTO = "auto"
ENVIRONMENT_VARIABLE = "ATTNSWAP_BACKEND"

_requested: ContextVar[str | None] = ContextVar("attnswap_backend", default=None)


class Verdict(NamedTuple):
    """Whether an implementation can take a call, and the reason in words."""

    can: bool
    reason: str


class Considered(NamedTuple):
    backend: str
    can: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """The backend chosen for one call of `op`, why, and what each backend could have done."""

    op: str
    backend: str
    reason: str
    considered: tuple[Considered, ...]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend} ({self.reason})"]
        width = max(len(entry.backend) for entry in self.considered)
        for entry in self.considered:
            lines.append(f"  {entry.backend:<{width}}  {'can run' if entry.can else 'cannot run'}: {entry.reason}")
        return "\n".join(lines)


def _always(**call: Any) -> Verdict:
    return Verdict(True, "takes every input")


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    `target` is ``module:function``, imported when first run, so that a backend whose library is missing costs
    nothing. `can_run` gets the checked call. `prefer` is asked by ``auto`` only, and only of an implementation that
    can run: the place for a measured rule such as "not for windows above N tokens on this GPU".
    """

    backend: str
    target: str
    can_run: Callable[..., Verdict] = field(default=_always)
    prefer: Callable[..., Verdict] = field(default=_always)

    def load(self) -> Callable[..., Any]:
        module, _, function = self.target.partition(":")
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return loaded


@dataclass(frozen=True)
class Op:
    name: str
    check: Callable[..., dict[str, Any]]
    implementations: dict[str, Implementation]
    part_of: str | None = None


_OPS: dict[str, Op] = {}


def register(
    name: str,
    *,
    check: Callable[..., dict[str, Any]],
    implementations: tuple[Implementation, ...],
    part_of: str | None = None,
) -> None:
    """Make an operation known. Called once per operation, when its package is imported.

    `part_of` names the operation of which this is a step that can be taken alone.
    """
    _OPS[name] = Op(name, check, {entry.backend: entry for entry in implementations}, part_of)


def ops() -> tuple[str, ...]:
    """Names of all operations, sorted; without the steps that are a part of one."""
    return tuple(sorted(name for name, op in _OPS.items() if op.part_of is None))


def get_op(name: str) -> Op:
    """The registered operation; `ValueError` with near matches for an unknown name."""
    if name in _OPS:
        return _OPS[name]
    near = difflib.get_close_matches(name, ops(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(ops())}"
    raise ValueError(f"unknown operation {name!r}; {hint}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation inside the block on one backend.

    Args:
        name: ``"reference"`` (the definition, slow), ``"eager"`` (PyTorch), ``"triton"`` or ``"auto"``.

    The choice belongs to the current thread or task, nests, and goes before ``ATTNSWAP_BACKEND``. An operation that
    the backend cannot run raises `ValueError` with the reason.
    """
    token = _requested.set(_known_backend(name, "use_backend"))
    try:
        yield
    finally:
        _requested.reset(token)


def _known_backend(name: str, source: str) -> str:
    if name not in (AUTO, *BACKENDS):
        raise ValueError(f"{source}: unknown backend {name!r}; valid are {', '.join((AUTO, *BACKENDS))}")
    return name


def _request() -> tuple[str, str]:
    """The backend asked for and who asked."""
    requested = _requested.get()
    if requested is not None:
        return requested, "use_backend"
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE)
    if from_environment:
        return _known_backend(from_environment, ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE
    return AUTO, "default"


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend `kernels.<op>(*args, **kwargs)` would run on now, and why; nothing is computed.

    Raises:
        ValueError: for an unknown operation, for arguments the operation itself would refuse, and for a backend
            asked for by name that cannot run them.
    """
    registered = get_op(op)
    return choose(op, registered.check(*args, **kwargs))


def choose(op: str, call: dict[str, Any]) -> Explanation:
    """`explain` for a call that is already checked."""
    implementations = get_op(op).implementations
    considered = tuple(Considered(name, *_verdict(entry, call)) for name, entry in implementations.items())
    verdicts = {entry.backend: entry for entry in considered}
    requested, source = _request()
    if requested != AUTO:
        if requested not in verdicts:
            raise ValueError(f"{op} has no {requested} implementation ({source}); it has {', '.join(verdicts)}")
        if not verdicts[requested].can:
            raise ValueError(f"{op} cannot run on {requested} ({source}): {verdicts[requested].reason}")
        return Explanation(op, requested, f"asked for by {source}", considered)
    backend, reason = _automatic(implementations, verdicts, call)
    return Explanation(op, backend, reason, considered)


def _automatic(
    implementations: dict[str, Implementation], verdicts: dict[str, Considered], call: dict[str, Any]
) -> tuple[str, str]:
    triton = verdicts.get("triton")
    if triton is None:
        return "eager", "there is no triton implementation"
    if not triton.can:
        return "eager", f"triton cannot run: {triton.reason}"
    if device_of(call).type != "cuda":
        return "eager", "the triton interpreter is for tests, used only when asked for"
    preferred = implementations["triton"].prefer(**call)
    return ("triton", triton.reason) if preferred.can else ("eager", preferred.reason)


def _verdict(implementation: Implementation, call: dict[str, Any]) -> Verdict:
    if implementation.backend == "triton":
        ready = triton_ready(device_of(call))
        if not ready.can:
            return ready
    return implementation.can_run(**call)


def device_of(call: dict[str, Any]) -> torch.device:
    """The device of a checked call: that of its first tensor, the query or key."""
    return next(argument.device for argument in call.values() if isinstance(argument, Tensor))


def triton_ready(device: torch.device) -> Verdict:
    """Whether Triton kernels of any operation can run on tensors of this device."""
    if not _triton_is_installed():
        return Verdict(False, "triton is not installed")
    if device.type != "cuda":
        if triton_interprets():
            return Verdict(True, "the triton interpreter is on (TRITON_INTERPRET)")
        return Verdict(False, f"the tensors are on {device}, not on a CUDA or ROCm GPU")
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return Verdict(False, f"{device} has compute capability {major}.{minor}; 8.0 or later is needed")
    return Verdict(True, f"triton is installed and the tensors are on {device}")


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_interprets() -> bool:
    """Whether Triton kernels are interpreted on the CPU instead of compiled, as TRITON_INTERPRET=1 asks."""
    if "TRITON_INTERPRET" not in os.environ:  # spares processes without a GPU the import
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def run(op: str, call: dict[str, Any]) -> Any:
    """Choose the backend for a checked call and compute it.

    Autocast is off inside: an operation computes in the dtype of its tensors, whatever the backend.
    """
    implementation = get_op(op).implementations[choose(op, call).backend].load()
    device_type = device_of(call).type
    if not torch.is_autocast_enabled(device_type):
        return implementation(**call)
    with torch.autocast(device_type, enabled=False):
        return implementation(**call)
