"""Our kernels as contenders: an operation on a backend by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .. import kernels
from .registry import Prepared, Unavailable


def prepared(
    op: str, backend: str, arguments: Mapping[str, Any], restore: Callable[[Any], Any] = lambda output: output
) -> Prepared:
    """`kernels.<op>(**arguments)` on one backend.

    Raises:
        Unavailable: it cannot run there; the message says why.
    """
    with kernels.use_backend("auto"):
        considered = kernels.explain(op, **arguments).considered
    verdict = next(entry for entry in considered if entry.backend == backend)
    if not verdict.can:
        raise Unavailable(verdict.reason)
    function = getattr(kernels, op)
    return Prepared(lambda: function(**arguments), restore, around=lambda: kernels.use_backend(backend))
