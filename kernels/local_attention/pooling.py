"""Pooled tokens: the far field of CLEAR (arXiv 2412.16112), one weighted sum for each cell of the grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks


def pool_tokens(x: Tensor, weights: Tensor, *, grid: Sequence[int], grid_offset: int = 0) -> Tensor:
    """Sum each s x s cell of a token grid with the weights `a`: P[Y, X] = sum over u, v of a[u, v] x[sY + u, sX + v].

    Sums are taken in fp32 (fp64 for fp64). Differentiable in `x` and in `weights`, which need not sum to 1.

    Args:
        x: `[B, S, H, D]`; tokens `[grid_offset, grid_offset + h * w)` are the row-major grid, others are ignored.
        weights: `[s, s]`, any floating dtype.
        grid: (h, w) in tokens, both divisible by s.
        grid_offset: the first token of the grid.

    Returns:
        `[B, (h / s) * (w / s), H, D]`, row-major, in the dtype of `x`.

    Raises:
        ValueError: for a grid that does not fit the tokens or that s does not divide, and for other shapes.
    """
    (height, width), grid_offset, cell = checks.pooling(x, weights, grid, grid_offset)
    batch, _, heads, head_dim = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    cells = x[:, grid_offset : grid_offset + height * width]
    cells = cells.reshape(batch, height // cell, cell, width // cell, cell, heads, head_dim)
    # One row of every cell at a time: an fp32 copy of all tokens is never made.
    pooled = x.new_zeros((batch, height // cell, width // cell, heads, head_dim), dtype=dtype)
    for row, weight in zip(cells.unbind(2), weights.to(dtype).unbind(0), strict=True):
        pooled = pooled + torch.einsum("byxvhd,v->byxhd", row.to(dtype), weight)
    return pooled.to(x.dtype).flatten(1, 2)
