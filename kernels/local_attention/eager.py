"""Local attention in PyTorch, a tile of queries at a time.

The grid is cut into strips of columns. The keys within reach of a strip are copied side by side once; there, the keys
within reach of some of its rows lie together, so that tiles with the same surroundings are one batch of attention over
overlapping views, under one mask. Dense and pooled keys are a second attention, without a mask, and the two are merged
by their log-sum-exp. Everything is computed in fp32 (fp64 for fp64), and scores are never larger than for a strip.

`grid_queries` and `dense_queries` are the two halves of the operation. They take any rows of queries and any part of
the keys, so that they serve attention over several devices too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import Span, alike, circle, covers, spans

# Rows and columns of a tile of queries. On a CPU, of 4 x 8 to 64 x 64, 8 x 8 was the fastest or close to it at every
# radius and grid tried. Elsewhere a tile costs launches.
CPU_TILE, DEVICE_TILE = (8, 8), (16, 16)
# Scores in memory at once, where they are not left to a fused attention.
CPU_CHUNK, DEVICE_CHUNK = 2**20, 2**26

Bias = Callable[[tuple[int, int, int], tuple[int, int, int]], Tensor]


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
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, heads, tokens), dtype=accumulator(query))
    first, last = grid_offset, grid_offset + grid[0] * grid[1]
    lse[:, :, first:last] = grid_queries(
        query[:, first:last],
        key,
        value,
        grid=grid,
        grid_offset=grid_offset,
        radius=radius,
        scale=scale,
        pooled_key=pooled_key,
        pooled_value=pooled_value,
        key_mask=key_mask,
        out=out[:, first:last],
    )[1]
    for start, stop in ((0, first), (last, tokens)):
        if start < stop:
            queries = query[:, start:stop]
            out[:, start:stop], lse[:, :, start:stop] = dense_queries(
                queries, key, value, scale=scale, key_mask=key_mask
            )
    return out, lse


def grid_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: tuple[int, int],
    grid_offset: int,
    radius: float,
    scale: float,
    query_rows: tuple[int, int] | None = None,
    pooled_key: Tensor | None = None,
    pooled_value: Tensor | None = None,
    key_mask: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the queries of some rows of a grid.

    Args:
        query: `[B, (y1 - y0) * w, H, D]`, rows `query_rows` = (y0, y1) of the grid that the keys form; None for all.
        key, value: `[B, S, H, D]`: dense tokens, from `grid_offset` on a row-major grid of (h, w), more dense tokens.
        pooled_key, pooled_value, key_mask: as in `kernels.local_attention`.
        out: where to write the output.

    Returns:
        The output `[B, (y1 - y0) * w, H, D]` in the dtype of `query`, and its natural log-sum-exp
        `[B, H, (y1 - y0) * w]` in fp32 (fp64 for fp64).
    """
    rows, width = query_rows or (0, grid[0]), grid[1]
    by_place = (rows[1] - rows[0], width)
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    lse = query.new_empty((query.shape[0], query.shape[2], *by_place), dtype=accumulator(query))
    tile = tile_shape(query.device)
    bias = functools.lru_cache(maxsize=64)(functools.partial(circle_bias, radius=radius, like=lse))
    for sample in range(query.shape[0]):
        queries, outputs = (x[sample].unflatten(0, by_place) for x in (query, out))
        near, dense = split_keys(sample, key, value, pooled_key, pooled_value, key_mask, grid, grid_offset, radius)
        for columns in spans(0, width, tile[1], width, radius):
            place = slice(columns.start, columns.stop)
            q = heads_first(queries[:, place], lse.dtype)
            parts = []
            if near is not None:
                strip = near.seen_by(columns).to(lse.dtype)
                parts.append(_attend_near(q, strip, spans(*rows, tile[0], grid[0], radius), columns, bias, scale))
            if dense is not None:
                parts.append(_attend_dense(q.flatten(1, 2), dense, scale))
            attended, total = functools.reduce(lambda part, other: merge(*part, *other), parts)
            outputs[:, place] = attended.unflatten(1, q.shape[1:3]).permute(1, 2, 0, 3)
            lse[sample, :, :, place] = total.unflatten(1, q.shape[1:3])
    return out, lse.flatten(2)


def dense_queries(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of queries `[B, Q, H, D]` to all keys `[B, S, H, D]`, which may be a part of the tokens.

    Returns:
        The output `[B, Q, H, D]` and its natural log-sum-exp `[B, H, Q]`, both in fp32 (fp64 for fp64). `merge` puts
        the results over parts of the keys together.
    """
    batch, length, heads, head_dim = query.shape
    dtype = accumulator(query)
    out = query.new_empty((batch, heads, length, head_dim), dtype=dtype)
    lse = query.new_empty((batch, heads, length), dtype=dtype)
    for sample in range(batch):
        keys = Keys(key[sample], value[sample], None if key_mask is None else ~key_mask[sample]).to(dtype)
        out[sample], lse[sample] = _attend_dense(heads_first(query[sample], dtype), keys, scale)
    return out.transpose(1, 2), lse


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: outputs `[..., D]`, log-sum-exps `[...]`."""
    total = torch.logaddexp(lse, other_lse)
    # Without a key in either set both are -inf, both outputs 0, and any share will do.
    share = (other_lse - total).exp_().masked_fill_(total.isneginf(), 0)
    return torch.lerp(out, other_out, share[..., None]), total


@dataclass(frozen=True)
class Keys:
    """Keys and values of one sample, heads-last `[..., H, D]` or after `to` heads-first; `hidden`: the masked ones."""

    key: Tensor
    value: Tensor
    hidden: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Keys:
        """Heads-first and contiguous `[H, ..., D]`; a masked key holds zeros."""
        key, value = (heads_first(x, dtype) for x in (self.key, self.value))
        if self.hidden is not None:
            key, value = (x.masked_fill(self.hidden[..., None], 0) for x in (key, value))
        return Keys(key, value, None if self.hidden is None else self.hidden.contiguous())

    def seen_by(self, span: Span) -> Keys:
        """The columns of a grid of keys that a strip of queries sees."""
        place = (slice(None), slice(span.key_start, span.key_stop))
        return Keys(self.key[place], self.value[place], None if self.hidden is None else self.hidden[place])


def split_keys(
    sample: int,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor | None,
    pooled_value: Tensor | None,
    key_mask: Tensor | None,
    grid: tuple[int, int],
    grid_offset: int,
    radius: float,
) -> tuple[Keys | None, Keys | None]:
    """The keys of one sample that a grid query sees by their distance, `[h, w, H, D]`, and those it sees anyhow."""
    hidden = None if key_mask is None else ~key_mask[sample]
    key, value = key[sample], value[sample]
    first, last = grid_offset, grid_offset + grid[0] * grid[1]
    near = None
    if not covers(radius, grid):
        near = Keys(*(x if x is None else x[first:last].unflatten(0, grid) for x in (key, value, hidden)))
        key, value, hidden = (x if x is None else torch.cat((x[:first], x[last:])) for x in (key, value, hidden))
    if pooled_key is not None and pooled_value is not None:
        key, value = torch.cat((key, pooled_key[sample])), torch.cat((value, pooled_value[sample]))
        if hidden is not None:
            hidden = torch.cat((hidden, hidden.new_zeros(pooled_key.shape[1])))
    return near, Keys(key, value, hidden).to(accumulator(key)) if len(key) else None


def tile_shape(device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile of queries."""
    return CPU_TILE if device.type == "cpu" else DEVICE_TILE


def circle_bias(rows: tuple[int, int, int], columns: tuple[int, int, int], *, radius: float, like: Tensor) -> Tensor:
    """`geometry.circle` as a term of the scores: 0 and -inf."""
    inside = circle(rows, columns, radius, device=like.device)
    return like.new_zeros(inside.shape).masked_fill_(~inside, float("-inf"))


def _attend_near(
    query: Tensor, strip: Keys, tiles: list[Span], columns: Span, bias: Bias, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of a strip of queries `[H, rows, columns, D]` to the strip of keys in reach, `[H, h, columns, D]`."""
    width = query.shape[2]
    out = torch.empty_like(query).flatten(1, 2)
    lse = query.new_empty(out.shape[:-1])
    top = tiles[0].start
    for group in alike(tiles):
        first = group[0]
        place = slice((first.start - top) * width, (group[-1].stop - top) * width)
        q = query.flatten(1, 2)[:, place].unflatten(1, (len(group), first.queries * width))
        k, v = (_windows(x, group) for x in (strip.key, strip.value))
        mask = bias(first.shape, columns.shape)[None, None]
        if strip.hidden is not None:
            mask = mask.masked_fill(_windows(strip.hidden[None, ..., None], group).mT, float("-inf"))
        attended, total = attend(q, k, v, mask, scale, may_be_empty=strip.hidden is not None)
        out[:, place], lse[:, place] = attended.flatten(1, 2), total.flatten(1)
    return out, lse


def _windows(strip: Tensor, group: list[Span]) -> Tensor:
    """`[H, tiles, keys, D]`, overlapping views of a contiguous strip `[H, h, columns, D]`."""
    heads, height, width, size = strip.shape
    row = width * size
    return strip.as_strided(
        (heads, len(group), group[0].keys * width, size),
        (height * row, group[0].queries * row, size, 1),
        strip.storage_offset() + group[0].key_start * row,
    )


def _attend_dense(query: Tensor, keys: Keys, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of `[H, Q, D]` to all of `keys`."""
    mask = None
    if keys.hidden is not None:
        mask = query.new_zeros(keys.hidden.shape).masked_fill_(keys.hidden, float("-inf"))[None, None, None]
        mask = mask.expand(1, 1, query.shape[1], -1)
    tensors = (x[:, None] for x in (query, keys.key, keys.value))
    out, lse = attend(*tensors, mask, scale, may_be_empty=mask is not None)
    return out[:, 0], lse[:, 0]


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, *, may_be_empty: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention and its natural log-sum-exp over `[H, T, Q, D]` and `[H, T, K, D]` with a term for the scores."""
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=bias, scale=scale
        )
    else:
        out, lse = attend_by_chunks(query, key, value, bias, scale)
    if may_be_empty and bias is not None:
        empty = bias.isneginf().all(-1)
        out, lse = out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, float("-inf"))
    return out, lse


def attend_by_chunks(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`attend` by products of matrices, some queries at a time; a query without a key gives NaN."""
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:-1])
    for rows in chunks(query, query.shape[2], query.shape[0] * query.shape[1] * key.shape[2]):
        scores = query[:, :, rows] @ key.mT * scale
        if bias is not None:
            scores += bias[:, :, rows]
        lse[:, :, rows] = scores.logsumexp(-1)
        out[:, :, rows] = scores.sub_(lse[:, :, rows, None]).exp_() @ value
    return out, lse


def chunks(query: Tensor, queries: int, scores_of_one: int) -> Iterator[slice]:
    """Queries in parts of which all scores can be in memory."""
    step = max(1, (CPU_CHUNK if query.device.type == "cpu" else DEVICE_CHUNK) // scores_of_one)
    return (slice(start, min(start + step, queries)) for start in range(0, queries, step))


def heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[..., H, D]` as `[H, ..., D]`, contiguous and in `dtype`, in one pass."""
    x = x.movedim(-2, 0)
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)


def accumulator(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)
