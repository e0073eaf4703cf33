"""The blocks of 128 x 128 pairs that FlexAttention computes for circular local attention, found strip by strip.

`create_block_mask` gives the same blocks, but asks for every pair: 69 billion of them at 8192 px.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from .baselines import MaskMod

BLOCK = 128


@dataclass(frozen=True)
class Tokens:
    """Text, then a row-major grid, then, among keys only, pooled keys."""

    text: int
    grid: tuple[int, int]
    radius: float
    pooled: int = 0

    @property
    def queries(self) -> int:
        return self.text + math.prod(self.grid)

    @property
    def keys(self) -> int:
        return self.queries + self.pooled

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """bool, for indices of queries and keys that broadcast: the query may attend to the key."""
        (qy, qx), (ky, kx) = (((x - self.text) // self.grid[1], (x - self.text) % self.grid[1]) for x in (query, key))
        dy, dx = qy - ky, qx - kx
        seen = (dy * dy + dx * dx < self.radius**2).logical_or_(query < self.text).logical_or_(key < self.text)
        return torch.where(key < self.queries, seen, query >= self.text) if self.pooled else seen

    def mask_mod(self, device: torch.device) -> MaskMod:
        """The same for FlexAttention, in the form that suits the device."""
        text, width, queries, squared = self.text, self.grid[1], self.queries, self.radius**2
        if device.type == "cpu":
            # Tables are faster than divisions here, and with the radius in one, no other radius is compiled anew.
            place = torch.arange(self.keys, dtype=torch.int32) - text
            y, x, limit = place // width, place % width, torch.tensor(squared, dtype=torch.float32)

        def near(query: Tensor, key: Tensor) -> Tensor:
            if device.type == "cpu":
                dy, dx = y[query] - y[key], x[query] - x[key]
                return dy * dy + dx * dx < limit
            query, key = query - text, key - text
            dy, dx = query // width - key // width, query % width - key % width
            return dy * dy + dx * dx < squared

        def local(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query < text) | (key < text) | near(query, key)

        def with_pooled(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            pooled = key >= queries
            return (pooled & (query >= text)) | (~pooled & local(batch, head, query, key))

        return with_pooled if self.pooled else local


@dataclass(frozen=True)
class Blocks:
    """Which blocks `[query blocks, key blocks]` are computed: those with a mask, and those without."""

    masked: Tensor
    full: Tensor
    lengths: tuple[int, int]

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key in them; the last blocks are cut short."""
        rows, columns = (
            torch.tensor([min(BLOCK, length - start) for start in range(0, length, BLOCK)]) for length in self.lengths
        )
        return int(rows @ (self.masked | self.full).long() @ columns)

    def block_mask(self, mask_mod: MaskMod, device: torch.device) -> BlockMask:
        from torch.nn.attention.flex_attention import BlockMask

        def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
            order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
            count, order = (x.to(device, torch.int32)[None, None].contiguous() for x in (blocks.sum(1), order))
            return count, order

        masked, full = listed(self.masked), listed(self.full)
        return BlockMask.from_kv_blocks(
            masked[0], masked[1], full[0], full[1], BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=self.lengths
        )


@functools.lru_cache(maxsize=32)
def blocks_of(tokens: Tokens, device: torch.device) -> Blocks:
    """The blocks for `tokens`, worked out on `device`."""
    shape = (-(-tokens.queries // BLOCK), -(-tokens.keys // BLOCK))
    some, every = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
    for row in range(shape[0]):
        queries = range(row * BLOCK, min((row + 1) * BLOCK, tokens.queries))
        for first, last in _candidates(tokens, queries, shape[1]):
            keys = torch.arange(first * BLOCK, min(last * BLOCK, tokens.keys), dtype=torch.int32, device=device)
            rows = torch.arange(queries.start, queries.stop, dtype=torch.int32, device=device)
            seen = tokens.visible(rows[:, None], keys)
            whole = pad(seen, (0, (last - first) * BLOCK - len(keys), 0, BLOCK - len(queries)))
            parts = whole.view(BLOCK, last - first, BLOCK)
            some[row, first:last] = parts.any(2).any(0).cpu()
            every[row, first:last] = parts.all(2).all(0).cpu()
    return Blocks(some & ~every, every, (tokens.queries, tokens.keys))


def _candidates(tokens: Tokens, queries: range, blocks: int) -> list[tuple[int, int]]:
    """Ranges of key blocks outside of which these queries see nothing."""
    if queries.start < tokens.text:
        return [(0, blocks)]
    width, far = tokens.grid[1], math.ceil(tokens.radius)
    top = max(0, (queries.start - tokens.text) // width - far)
    bottom = min(tokens.grid[0], (queries.stop - 1 - tokens.text) // width + far + 1)
    ranges = [
        (0, tokens.text),
        (tokens.text + top * width, tokens.text + bottom * width),
        (tokens.queries, tokens.keys),
    ]
    return [(start // BLOCK, -(-stop // BLOCK)) for start, stop in ranges if start < stop]
