"""Which grid tokens are near each other, and how a grid is cut into tiles of queries with the keys they need."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Along one axis: queries `[start, stop)` of a tile, and the keys `[key_start, key_stop)` any of them may see."""

    start: int
    stop: int
    key_start: int
    key_stop: int

    @property
    def queries(self) -> int:
        return self.stop - self.start

    @property
    def keys(self) -> int:
        return self.key_stop - self.key_start

    @property
    def shape(self) -> tuple[int, int, int]:
        """Queries, keys, and where the first key lies from the first query: tiles of one shape have one mask."""
        return self.queries, self.keys, self.key_start - self.start


def squared_reach(radius: float) -> int:
    """The integer that squared distances between tokens must be below: d2 < radius ** 2, exactly."""
    radius = min(radius, 2.0**31)  # more than any grid; its square stays finite
    return math.ceil(radius * radius)


def reach(radius: float) -> int:
    """The largest distance along one axis at which a token is still seen."""
    return math.isqrt(squared_reach(radius) - 1)


def covers(radius: float, grid: tuple[int, int]) -> bool:
    """Every token of the grid sees every other."""
    return (grid[0] - 1) ** 2 + (grid[1] - 1) ** 2 < squared_reach(radius)


def spans(start: int, stop: int, size: int, length: int, radius: float) -> list[Span]:
    """Queries `[start, stop)` of an axis of `length` keys in tiles of `size`, the last one cut short."""
    far = reach(radius)
    edges = [(first, min(first + size, stop)) for first in range(start, stop, size)]
    return [Span(first, last, max(first - far, 0), min(last + far, length)) for first, last in edges]


def alike(tiles: list[Span]) -> Iterator[list[Span]]:
    """Neighbouring tiles of one shape."""
    for _, group in itertools.groupby(tiles, key=lambda tile: tile.shape):
        yield list(group)


def circle(rows: tuple[int, int, int], columns: tuple[int, int, int], radius: float, *, device: torch.device) -> Tensor:
    """bool `[queries, keys]` of a tile, both row-major: the query may attend to the key. Arguments as `Span.shape`."""
    (dy, dx) = (
        first + torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]
        for queries, keys, first in (rows, columns)
    )
    inside = (dy * dy)[:, None, :, None] + (dx * dx)[None, :, None, :] < squared_reach(radius)
    return inside.flatten(2).flatten(0, 1)


def gaps(start: int, stop: int, size: int, length: int, key_size: int) -> Tensor:
    """int64 `[query tiles, key tiles]`: the distance along an axis from a tile of queries to a tile of keys, 0 if they
    share a place. Queries `[start, stop)` are cut by `size`, the `length` keys by `key_size`, last tiles short."""
    first, key_first = torch.arange(start, stop, size), torch.arange(0, length, key_size)
    last, key_last = (first + size - 1).clamp(max=stop - 1), (key_first + key_size - 1).clamp(max=length - 1)
    before = first[:, None] - key_last[None, :]
    after = key_first[None, :] - last[:, None]
    return before.maximum(after).clamp(min=0)


def tile_lists(
    rows: tuple[int, int],
    grid: tuple[int, int],
    radius: float,
    tile: tuple[int, int],
    key_tile: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """The tiles of keys that each tile of queries may see any of.

    Args:
        rows: rows of queries of the grid.
        tile, key_tile: (rows, columns) of a tile of queries and of one of keys.

    Returns:
        `(starts, entries)`, int32: the keys of query tile i, row-major, are `entries[starts[i] : starts[i + 1]]`, each
        a row of key tiles times 2 ** 16 plus a column.
    """
    vertical = gaps(*rows, tile[0], grid[0], key_tile[0])
    horizontal = gaps(0, grid[1], tile[1], grid[1], key_tile[1])
    counts, entries = [torch.zeros(1, dtype=torch.int64)], []
    for row in vertical:  # one row of tiles at a time, with the key tiles near it: all pairs at once would be many
        near = (row < radius).nonzero()[:, 0]
        seen = (row[near] ** 2)[None, :, None] + (horizontal**2)[:, None, :] < squared_reach(radius)
        _, y, x = seen.nonzero(as_tuple=True)
        counts.append(seen.sum((1, 2)))
        entries.append(near[y] << 16 | x)
    return torch.cat(counts).cumsum(0).to(torch.int32), torch.cat(entries).to(torch.int32)
