"""Gradients of local attention by recomputation, a tile of queries at a time; whichever backend ran forward.

With L the log-sum-exp of a query over all its keys, p = exp(score - L), g the gradient of its output o and c = g·o:

    dv = sum of p g      dscore = p (g·v - c)      dq = scale * sum of dscore k      dk = scale * sum of dscore q

so that each set of keys can be taken alone. Sums are in fp32 (fp64 for fp64).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .eager import accumulator, chunks, circle_bias, heads_first, tile_shape
from .geometry import covers, spans


@dataclass(frozen=True)
class Queries:
    """Queries `[H, n, D]` of one sample, what backward knows of each, and the sum that becomes their gradient."""

    query: Tensor
    grad: Tensor
    lse: Tensor
    share: Tensor
    grad_query: Tensor

    def part(self, rows: slice) -> Queries:
        return Queries(*(x[:, rows] for x in vars(self).values()))


@dataclass(frozen=True)
class KeyValues:
    """Keys and values `[H, n, D]` of one sample, zero where `hidden`, and the sums that become their gradients."""

    key: Tensor
    value: Tensor
    grad_key: Tensor
    grad_value: Tensor
    hidden: Tensor | None = None

    def part(self, rows: slice) -> KeyValues:
        tensors = (x[:, rows] for x in (self.key, self.value, self.grad_key, self.grad_value))
        return KeyValues(*tensors, None if self.hidden is None else self.hidden[:, rows])


def local_attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    grid_offset: int,
    radius: float,
    scale: float,
    pooled_key: Tensor | None = None,
    pooled_value: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, pooled key and pooled value; the last two are empty where there are none."""
    gradients = tuple(like(x, query) for x in (query, key, value, pooled_key, pooled_value))
    grid_rows = slice(grid_offset, grid_offset + grid[0] * grid[1])
    dense_rows = (slice(0, grid_rows.start), slice(grid_rows.stop, query.shape[1]))
    for sample in range(query.shape[0]):
        queries = queries_of(grad[sample], out[sample], lse[sample], query[sample])
        keys = keys_of(key[sample], value[sample], None if key_mask is None else key_mask[sample])
        for rows in dense_rows:
            accumulate(queries.part(rows), keys, scale)
        of_grid = queries.part(grid_rows)
        if covers(radius, grid):
            accumulate(of_grid, keys, scale)
        else:
            for rows in dense_rows:
                accumulate(of_grid, keys.part(rows), scale)
            accumulate_near(of_grid, keys.part(grid_rows), grid, radius, scale)
        sums = [queries.grad_query, keys.grad_key, keys.grad_value]
        if pooled_key is not None and pooled_value is not None:
            pooled = keys_of(pooled_key[sample], pooled_value[sample])
            accumulate(of_grid, pooled, scale)
            sums += [pooled.grad_key, pooled.grad_value]
        for total, gradient in zip(sums, gradients, strict=False):
            gradient[sample] = total.transpose(0, 1)
    return gradients


def like(x: Tensor | None, query: Tensor) -> Tensor:
    """A new contiguous tensor for the gradient of `x`; an empty one where there is no `x`."""
    return query.new_empty((0,) if x is None else x.shape)


def queries_of(grad: Tensor, out: Tensor, lse: Tensor, query: Tensor) -> Queries:
    """From the heads-last tensors of one sample."""
    dtype = accumulator(query)
    query, grad = heads_first(query, dtype), heads_first(grad, dtype)
    share = (grad * out.transpose(0, 1)).sum(-1)
    # A query without a key has no share in anything: exp(score - inf) is 0.
    return Queries(query, grad, lse.masked_fill(lse.isneginf(), float("inf")), share, torch.zeros_like(query))


def keys_of(key: Tensor, value: Tensor, key_mask: Tensor | None = None) -> KeyValues:
    """From the heads-last tensors of one sample."""
    dtype = accumulator(key)
    hidden = None if key_mask is None else ~key_mask[None]
    key, value = (heads_first(x, dtype) for x in (key, value))
    if hidden is not None:
        key, value = (x.masked_fill_(hidden[..., None], 0) for x in (key, value))
    return KeyValues(key, value, torch.zeros_like(key), torch.zeros_like(value), hidden)


def accumulate(queries: Queries, keys: KeyValues, scale: float, bias: Tensor | None = None) -> None:
    """Add what these queries and these keys give to each other's gradients."""
    heads, length, _ = queries.query.shape
    if keys.key.shape[1] == 0:
        return
    for rows in chunks(queries.query, length, heads * keys.key.shape[1]):
        part = queries.part(rows)
        scores = torch.bmm(part.query, keys.key.mT).mul_(scale)
        if bias is not None:
            scores.add_(bias[rows])
        if keys.hidden is not None:
            scores.masked_fill_(keys.hidden[:, None, :], float("-inf"))
        p = scores.sub_(part.lse[..., None]).exp_()
        keys.grad_value.baddbmm_(p.mT, part.grad)
        grad_scores = torch.bmm(part.grad, keys.value.mT).sub_(part.share[..., None]).mul_(p)
        part.grad_query.baddbmm_(grad_scores, keys.key, alpha=scale)
        keys.grad_key.baddbmm_(grad_scores.mT, part.query, alpha=scale)


def accumulate_near(queries: Queries, keys: KeyValues, grid: tuple[int, int], radius: float, scale: float) -> None:
    """`accumulate` for grid queries and the grid keys inside their circles, by strips of columns as forward."""
    height, width = grid
    tile = tile_shape(queries.query.device)
    bias = functools.lru_cache(maxsize=64)(functools.partial(circle_bias, radius=radius, like=queries.query))
    for columns in spans(0, width, tile[1], width, radius):
        own, seen = slice(columns.start, columns.stop), slice(columns.key_start, columns.key_stop)
        some = Queries(*(strip(x, grid, own) for x in vars(queries).values()))
        near = KeyValues(*(x if x is None else strip(x, grid, seen) for x in vars(keys).values()))
        for rows in spans(0, height, tile[0], height, radius):
            accumulate(
                some.part(slice(rows.start * columns.queries, rows.stop * columns.queries)),
                near.part(slice(rows.key_start * columns.keys, rows.key_stop * columns.keys)),
                scale,
                bias(rows.shape, columns.shape),
            )
        put_back(queries.grad_query, some.grad_query, grid, own)
        put_back(keys.grad_key, near.grad_key, grid, seen)
        put_back(keys.grad_value, near.grad_value, grid, seen)


def strip(x: Tensor, grid: tuple[int, int], columns: slice) -> Tensor:
    """Some columns of grid tokens `[H, h * w, ...]`, as a contiguous copy `[H, h * columns, ...]`."""
    return x.unflatten(1, grid)[:, :, columns].flatten(1, 2).contiguous()


def put_back(x: Tensor, part: Tensor, grid: tuple[int, int], columns: slice) -> None:
    """`strip` undone for a part that was added to."""
    place = x.unflatten(1, grid)[:, :, columns]
    place.copy_(part.view_as(place))
