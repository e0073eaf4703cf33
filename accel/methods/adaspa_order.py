"""In which order AdaSpa looks at the tokens of a call: blocks are made of neighbours in that order."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..families.base import Place

#: Sides of a tile, of a clip in frames, rows and columns, and of a picture: 64 tokens, as many as a block has.
TILES = {3: (4, 4, 4), 2: (8, 8)}


def tile_order(grid: tuple[int, ...]) -> Tensor:
    """For each place in the order of tiles, the row-major number of the token of a grid that comes there.

    Tiles at the far borders are smaller where their sides do not divide the grid's.
    """
    numbers = torch.arange(math.prod(grid)).view(grid)
    sides = TILES[len(grid)]
    cuts = [range(0, length, side) for length, side in zip(grid, sides, strict=True)]
    tiles = itertools.product(*cuts)
    return torch.cat(
        [
            numbers[tuple(slice(start, start + side) for start, side in zip(tile, sides, strict=True))].flatten()
            for tile in tiles
        ]
    )


@dataclass(frozen=True)
class TileOrder:
    """The tokens of a grid tile by tile.

    Attributes:
        there: as `tile_order` says.
        back: its inverse.
    """

    there: Tensor
    back: Tensor

    @classmethod
    def of(cls, grid: tuple[int, ...], device: torch.device) -> TileOrder:
        there = tile_order(grid)
        return cls(there.to(device), torch.argsort(there).to(device))


@dataclass(frozen=True)
class Arrangement:
    """How the tokens of a call are arranged for the kernels.

    As they come, where nothing is hidden and no tiles are wanted. Else the grid comes first, then what is around it,
    and of that the hidden tokens last, so that those seen are a prefix.

    Attributes:
        place: of the grid.
        tiles: order of the grid's tokens.
        around: `[B, T]` order of the tokens around the grid.
        lengths: int32 `[B]` tokens that are seen.
    """

    place: Place
    tiles: TileOrder | None = None
    around: Tensor | None = None
    lengths: Tensor | None = None

    @classmethod
    def of(cls, place: Place, tiles: TileOrder | None, key_mask: Tensor | None) -> Arrangement:
        """Of a call whose `key_mask` is bool `[B, S]`, True for tokens that are seen; those of the grid always are."""
        if key_mask is None:
            return cls(place, tiles)
        lengths = key_mask.sum(dim=1, dtype=torch.int32)
        if place.hidden_last and (tiles is None or not place.start):
            return cls(place, tiles, None, lengths)
        start, end = place.start, place.start + place.tokens - place.around
        around = torch.cat((key_mask[:, end:], key_mask[:, :start]), dim=1)
        order = torch.argsort(around.to(torch.uint8), dim=1, descending=True, stable=True)
        return cls(place, tiles, order, lengths)

    @property
    def is_as_they_come(self) -> bool:
        return self.tiles is None and self.around is None

    @property
    def text(self) -> tuple[tuple[int, int], ...]:
        """Ranges of tokens around the grid, as arranged."""
        tokens, start = self.place.tokens, self.place.start
        grid = tokens - self.place.around
        ranges = ((0, start), (start + grid, tokens)) if self.is_as_they_come else ((grid, tokens),)
        return tuple((first, last) for first, last in ranges if first < last)

    def arrange(self, x: Tensor) -> Tensor:
        """`[B, S, H, D]` as arranged."""
        if self.is_as_they_come:
            return x
        before, grid, after = self._parts(x)
        if self.tiles is not None:
            grid = grid[:, self.tiles.there]
        around = torch.cat((after, before), dim=1)
        if self.around is not None:
            around = around.take_along_dim(self.around[..., None, None], dim=1)
        return torch.cat((grid, around), dim=1)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `arrange`."""
        if self.is_as_they_come:
            return x
        start, count = self.place.start, self.place.tokens - self.place.around
        grid, around = x[:, :count], x[:, count:]
        if self.tiles is not None:
            grid = grid[:, self.tiles.back]
        if self.around is not None:
            around = around.take_along_dim(torch.argsort(self.around, dim=1)[..., None, None], dim=1)
        after = self.place.around - start
        return torch.cat((around[:, after:], grid, around[:, :after]), dim=1)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        start, count = self.place.start, self.place.tokens - self.place.around
        return x[:, :start], x[:, start : start + count], x[:, start + count :]
