"""Adaptive block-sparse attention (AdaSpa). The public functions are in `attnswap.kernels`."""

from .mask import BlockMask
from .op import block_scores, block_sparse_attention, dense_attention, dense_attention_with_scores
from .selection import Selection, head_levels, select_blocks

__all__ = [
    "BlockMask",
    "Selection",
    "block_scores",
    "block_sparse_attention",
    "dense_attention",
    "dense_attention_with_scores",
    "head_levels",
    "select_blocks",
]
