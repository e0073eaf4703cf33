"""The definition of local attention: dense attention under an explicit mask, in fp32 (fp64 stays fp64)."""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import squared_reach


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: tuple[int, int],
    grid_offset: int,
    radius: float,
    scale: float,
    pooled_key: Tensor | None = None,
    pooled_value: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output, and the natural logarithm of the softmax denominators, `[B, H, S]`, which backward needs."""
    batch, tokens, heads, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, heads, tokens), dtype=dtype)
    allowed = visible(tokens, grid, grid_offset, radius, device=query.device)
    of_the_grid = grid_tokens(tokens, grid, grid_offset, device=query.device)
    for sample in range(batch):
        keys, values, seen = key[sample], value[sample], allowed
        if key_mask is not None:
            keys, values = (x.masked_fill(~key_mask[sample, :, None, None], 0) for x in (keys, values))
            seen = allowed & key_mask[sample]
        for rows in (~of_the_grid, of_the_grid):
            own = seen[rows]
            if pooled_key is not None and rows is of_the_grid:
                keys = torch.cat((keys, pooled_key[sample]))
                values = torch.cat((values, pooled_value[sample]))
                own = torch.cat((own, own.new_ones(len(own), pooled_key.shape[1])), 1)
            attended = _attend(query[sample, rows].to(dtype), keys.to(dtype), values.to(dtype), own, scale)
            out[sample, rows], lse[sample, :, rows] = attended[0].to(query.dtype), attended[1]
    return out, lse


def _attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    scores = scores.masked_fill(~allowed, float("-inf"))
    # A query with no key left has a softmax of 0 / 0, and is 0.
    shares = scores.softmax(-1).masked_fill(~allowed.any(-1, keepdim=True), 0)
    return torch.einsum("hqk,khd->qhd", shares, value), scores.logsumexp(-1)


def grid_tokens(tokens: int, grid: tuple[int, int], grid_offset: int, *, device: torch.device | None = None) -> Tensor:
    """bool `[S]`: the token belongs to the grid."""
    place = torch.arange(tokens, device=device) - grid_offset
    return (place >= 0) & (place < grid[0] * grid[1])


def visible(
    tokens: int, grid: tuple[int, int], grid_offset: int, radius: float, *, device: torch.device | None = None
) -> Tensor:
    """bool `[S, S]`: the query of a row may attend to the key of a column, pooled keys apart."""
    place = torch.arange(tokens, device=device) - grid_offset
    y, x = place // grid[1], place % grid[1]
    dense = ~grid_tokens(tokens, grid, grid_offset, device=device)
    distance = (y[:, None] - y[None, :]) ** 2 + (x[:, None] - x[None, :]) ** 2
    return dense[:, None] | dense[None, :] | (distance < squared_reach(radius))
