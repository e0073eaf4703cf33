"""Context parallelism without processes: threads stand for ranks, and exchange tensors by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import torch
from attnswap.accel.families.parallel import ContextParallel


def shared_out(run: Callable[[int], torch.Tensor], ranks: int) -> list[torch.Tensor]:
    """What `run(rank)` gives on each of the ranks, over which the tokens of any model are taken to be split."""
    own, meet = threading.local(), threading.Barrier(ranks, timeout=30)
    mail: list[list[torch.Tensor]] = [[] for _ in range(ranks)]

    def of(model: Any) -> ContextParallel:
        return ContextParallel(None, ranks, own.rank)  # type: ignore[arg-type]

    def exchange(
        parallel: ContextParallel, send: list[torch.Tensor], shapes: list[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        mail[parallel.rank] = send
        meet.wait()
        received = [sent[parallel.rank] for sent in mail]
        meet.wait()
        assert [x.shape for x in received] == [torch.Size(shape) for shape in shapes]
        return received

    def start(rank: int) -> torch.Tensor:
        own.rank = rank
        with torch.no_grad():
            return run(rank)

    patched = mock.patch.multiple(ContextParallel, of=of, _exchange=exchange)
    with patched, ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(start, range(ranks)))
