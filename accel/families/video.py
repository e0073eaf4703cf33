"""What families of transformers over video tokens share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Grid = tuple[int, int, int]


def grid_of(latent: Tensor, patch: Sequence[int]) -> Grid:
    """(f, h, w) of the tokens made from a latent `[B, C, F, H, W]` by a convolution whose stride is the patch."""
    frames, height, width = (int(length) // side for length, side in zip(latent.shape[-3:], patch, strict=True))
    return frames, height, width
