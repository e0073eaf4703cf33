"""Queries and keys whose attention has structure, as that of a video model has, for benchmarks and tests.

Of normal random tensors the attention is nearly uniform, and no choice of blocks is better than another. Here the
tokens of a video grid carry a smooth random field of their position, and head after head the field is finer and the
attention sharper: the first heads are spread out, the last ones look at few places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FIELD_SEED, QUERY_SEED, KEY_SEED = 0, 50, 90


@dataclass(frozen=True)
class Structured:
    """A recipe for queries, keys and values `[B, S, H, D]` of tokens on a grid (frames, height, width), row-major.

    Attributes:
        grid: (frames, height, width).
        heads, head_dim: H and D.
        text: random tokens appended to those of the grid.
        amplitude: how far a later denoising step has moved every logit: queries and keys grow by this share, and fresh
            noise of twice this size is added. The pattern stays.
        pattern: how far the pattern has moved: the field of the keys is shifted by this share of the frames, and by
            half of it along height and width.
    """

    grid: tuple[int, int, int] = (8, 16, 16)
    heads: int = 8
    head_dim: int = 64
    text: int = 0
    amplitude: float = 0.0
    pattern: float = 0.0

    def tensors(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> list[Tensor]:
        """Query, key and value `[1, S, H, D]`, the same at every call."""
        places = positions(self.grid)
        moved = places + self.pattern * torch.tensor([1.0, 0.5, 0.5])
        queries, keys = [], []
        for head in range(self.heads):
            sharpness = math.sqrt(0.6 + 0.35 * head)
            for into, at, seed in ((queries, places, QUERY_SEED), (keys, moved, KEY_SEED)):
                noise = torch.randn(len(places), self.head_dim, generator=_generator(seed + head))
                into.append(sharpness * (field(at, head, self.head_dim) + 0.5 * noise))
        generator = _generator(1000)
        made = [torch.stack(x, 1)[None] for x in (queries, keys)]
        if self.amplitude:
            made = [
                x * (1 + self.amplitude) + 2 * self.amplitude * torch.randn(x.shape, generator=generator) for x in made
            ]
        made.append(torch.randn(made[0].shape, generator=generator))
        if self.text:
            shape = (1, self.text, self.heads, self.head_dim)
            made = [torch.cat((x, torch.randn(shape, generator=generator)), 1) for x in made]
        return [x.to(device, dtype) for x in made]


def positions(grid: tuple[int, int, int]) -> Tensor:
    """fp32 `[f * h * w, 3]`, each coordinate 0 to 1, row-major."""
    axes = [torch.arange(size) / size for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def field(places: Tensor, head: int, head_dim: int) -> Tensor:
    """A smooth random field `[S, head_dim]` over positions `[S, 3]`, finer with every head."""
    generator = _generator(FIELD_SEED + head)
    frequencies = torch.randn(3, head_dim, generator=generator) * (2 + 2 * head)
    phases = 6.28 * torch.rand(head_dim, generator=generator)
    return math.sqrt(2) * torch.cos(places @ frequencies + phases)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
