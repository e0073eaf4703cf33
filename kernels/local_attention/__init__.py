"""Circular local attention. The public functions are in `attnswap.kernels`."""

from .counts import ideal_pairs
from .op import local_attention
from .pooling import pool_tokens

__all__ = ["ideal_pairs", "local_attention", "pool_tokens"]
