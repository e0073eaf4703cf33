"""Peak memory of a call: what PyTorch's allocators hold at most beyond what they held before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes of all tensors that live at once during `call`, its result included, its inputs not.

    Scratch memory inside a library's own routine, such as a matrix product on a CPU, is not counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _without_stderr():
        recorded.start()
    try:
        call()
    finally:
        with _without_stderr():
            recorded.stop()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        highest = max(highest, held)
    return highest


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Builds of PyTorch's profiler tell on standard error, past Python, that they start and stop."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
