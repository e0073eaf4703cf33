"""How many pairs of a query and a key there are to compute, and how many each backend computes. Per head and sample."""

from __future__ import annotations

import functools
import math

from .eager import CPU_TILE
from .geometry import covers, gaps, spans, squared_reach

# Tiles (rows, columns) of queries and of keys of the Triton kernel, on the GPUs that hold the largest ones.
QUERY_TILE, KEY_TILE = (8, 16), (8, 8)


@functools.lru_cache(maxsize=1024)
def window_pairs(grid: tuple[int, int], radius: float) -> int:
    """Pairs of grid tokens with dy ** 2 + dx ** 2 < radius ** 2."""
    height, width = grid
    limit = squared_reach(radius)
    total = 0
    for dy in range(min(height, math.isqrt(limit - 1) + 1)):
        far = min(math.isqrt(limit - 1 - dy * dy), width - 1)
        in_rows = width * (2 * far + 1) - far * (far + 1)
        total += (height - dy) * in_rows * (1 if dy == 0 else 2)
    return total


def ideal_pairs(grid: tuple[int, int], radius: float, *, dense: int = 0, pooled: int = 0) -> int:
    """Pairs by the definition, for `dense` tokens besides the grid and `pooled` keys."""
    return window_pairs(grid, radius) + _others(grid, dense, pooled)


@functools.lru_cache(maxsize=1024)
def executed_pairs(
    backend: str,
    grid: tuple[int, int],
    radius: float,
    *,
    dense: int = 0,
    pooled: int = 0,
    tiles: tuple[tuple[int, int], tuple[int, int]] = (QUERY_TILE, KEY_TILE),
) -> int:
    """Pairs that a backend computes, masked ones and padding included; `eager` on a CPU, `triton` by `tiles`.

    Raises:
        ValueError: for an unknown backend.
    """
    height, width = grid
    tokens = height * width
    if backend == "reference":
        return (tokens + dense) ** 2 + tokens * pooled
    if backend == "eager":
        if covers(radius, grid):
            return tokens * tokens + _others(grid, dense, pooled)
        by_axis = (
            sum(tile.queries * tile.keys for tile in spans(0, length, size, length, radius))
            for length, size in zip(grid, CPU_TILE, strict=True)
        )
        return math.prod(by_axis) + _others(grid, dense, pooled)
    if backend != "triton":
        raise ValueError(f"unknown backend {backend!r}; valid are reference, eager, triton")
    tile, key_tile = tiles
    rows, columns = math.prod(tile), math.prod(key_tile)
    query_tiles = _tiles(height, tile[0]) * _tiles(width, tile[1])
    for_each = _tiles(dense, columns) + _tiles(pooled, columns)
    of_dense = _tiles(dense, rows) * _tiles(dense + tokens, columns)
    return rows * columns * (_near_tiles(grid, radius, tile, key_tile) + query_tiles * for_each + of_dense)


def _others(grid: tuple[int, int], dense: int, pooled: int) -> int:
    """Pairs with a dense token or a pooled key."""
    return grid[0] * grid[1] * (2 * dense + pooled) + dense * dense


def _tiles(length: int, size: int) -> int:
    return -(-length // size)


def _near_tiles(grid: tuple[int, int], radius: float, tile: tuple[int, int], key_tile: tuple[int, int]) -> int:
    """Entries of `geometry.tile_lists`, counted by their distances along the two axes."""
    vertical, horizontal = (
        gaps(0, length, size, length, key_size).flatten().bincount().tolist()
        for length, size, key_size in zip(grid, tile, key_tile, strict=True)
    )
    limit = squared_reach(radius)
    return sum(
        down * across
        for dy, down in enumerate(vertical)
        if down
        for dx, across in enumerate(horizontal)
        if across and dy * dy + dx * dx < limit
    )
