"""Windowed attention around a processor that must be kept: tokens are cut into windows before it and joined after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ...kernels.window_attention import from_windows, to_windows
from ..families.unet import Size


@dataclass
class WindowPlan:
    """What a windowed layer does in one call: shift in tokens, on the CPU for a compiler to see as data."""

    windows: tuple[int, int]
    shift: tuple[int, int]
    shift_tensor: Tensor
    pairs: int
    around: bool
    backend: str | None = None
    searches: bool = False


def run_in_windows(
    run: Callable[[Tensor, Tensor | None], Tensor],
    hidden_states: Tensor,
    mask: Tensor | None,
    grid: tuple[int, ...],
    plan: WindowPlan,
) -> Tensor:
    """`run` on each window of tokens `[B, h * w, C]` and of a key bias `[B, 1, h * w]`."""
    if plan.around:
        resized_to: tuple[int, ...] = whole_windows(grid, plan.windows)
        hidden_states = _resize_tokens(hidden_states, grid, resized_to)
        mask = None if mask is None else _resize_tokens(mask.transpose(1, 2), grid, resized_to).transpose(1, 2)
    else:
        resized_to = grid
    parts = to_windows(hidden_states, resized_to, plan.windows, plan.shift)
    masks: list[Tensor | None] = [None] * len(parts)
    if mask is not None:
        keys = to_windows(mask.transpose(1, 2), resized_to, plan.windows, plan.shift)
        masks = [part.transpose(1, 2) for part in keys]
    out = [run(part, part_mask) for part, part_mask in zip(parts, masks, strict=True)]
    return _resize_tokens(from_windows(out, resized_to, plan.windows, plan.shift), resized_to, grid)


def whole_windows(grid: tuple[int, ...], windows: tuple[int, int]) -> Size:
    """The grid enlarged to whole windows: ceil(side / windows) * windows."""
    return tuple(-(-side // count) * count for side, count in zip(grid, windows, strict=True))  # type: ignore[return-value]


def _resize_tokens(tokens: Tensor, grid: tuple[int, ...], to: tuple[int, ...]) -> Tensor:
    """`[B, h * w, C]` tokens as a picture, resized bicubically."""
    if tuple(grid) == tuple(to):
        return tokens
    picture = tokens.transpose(1, 2).unflatten(2, tuple(grid))
    return F.interpolate(picture, size=tuple(to), mode="bicubic").flatten(2).transpose(1, 2)
