"""Every op that has a benchmark. A new op adds its module here."""

from __future__ import annotations

from . import block_sparse, linear_attention, local_attention, window_attention
from .registry import Registry


def default_registry() -> Registry:
    return Registry(
        [window_attention.BENCHMARK, linear_attention.BENCHMARK, local_attention.BENCHMARK, block_sparse.BENCHMARK]
    )
