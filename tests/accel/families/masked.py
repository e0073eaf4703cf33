"""Stock models with the mask of CLEAR, written out as its definition says, added to their own dense attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from attnswap.accel.families.base import Place


def in_sight(place: Place, radius: float) -> torch.Tensor:
    """Bool `[S, S]`, by the definition, pair by pair."""
    height, width = place.grid
    position: list[tuple[int, int] | None] = [None] * place.tokens
    for row in range(height):
        for column in range(width):
            position[place.start + row * width + column] = row, column

    def sees(query: tuple[int, int] | None, key: tuple[int, int] | None) -> bool:
        if query is None or key is None:
            return True
        return (query[0] - key[0]) ** 2 + (query[1] - key[1]) ** 2 < radius**2

    return torch.tensor([[sees(query, key) for key in position] for query in position])


def pooled(x: torch.Tensor, place: Place, side: int) -> torch.Tensor:
    """Means `[B, H, cells, D]` of the grid's cells of `side` times `side` tokens, of x `[B, H, S, D]`."""
    height, width = place.grid
    means = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            tokens = [place.start + y * width + x for y in range(top, top + side) for x in range(left, left + side)]
            means.append(x[:, :, tokens].mean(2))
    return torch.stack(means, dim=2)


@contextmanager
def masked(places: Iterable[Place], radius: float, down_factor: int | None = None) -> Iterator[Callable[[], int]]:
    """Attention over as many tokens as one of the places has is masked; yields how many calls were."""
    stock = F.scaled_dot_product_attention
    masks = {place.tokens: (place, in_sight(place, radius)) for place in places}
    calls = 0

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, **rest: Any
    ) -> torch.Tensor:
        nonlocal calls
        if key.shape[2] not in masks:
            return stock(query, key, value, attn_mask=attn_mask, **rest)
        calls += 1
        place, mask = masks[key.shape[2]]
        mask = mask[None, None] if attn_mask is None else mask & attn_mask
        if down_factor is not None:
            key = torch.cat([key, pooled(key, place, down_factor)], dim=2)
            value = torch.cat([value, pooled(value, place, down_factor)], dim=2)
            in_grid = torch.zeros(place.tokens, dtype=torch.bool)
            in_grid[place.start : place.start + place.tokens - place.around] = True
            cells = key.shape[2] - place.tokens
            mask = torch.cat([mask, in_grid[:, None].expand(*mask.shape[:-1], cells)], dim=-1)
        return stock(query, key, value, attn_mask=mask, **rest)

    F.scaled_dot_product_attention = attention
    try:
        yield lambda: calls
    finally:
        F.scaled_dot_product_attention = stock
