"""Geometry of shifted windows: bounds, index tables, and tokens into windows and back.

A grid of h x w tokens, row-major, is rolled cyclically by the shift and cut into a x b windows. Rolled position
(y, x) holds the token at ((y + shift_y) mod h, (x + shift_x) mod w). Windows are cut as `torch.tensor_split` cuts:
sizes along an axis differ by at most one, the larger ones first. So there are at most four window shapes, and
windows of one shape form a group that can be computed as one batch.

*Window order* lists the groups one after the other, in a group the windows row-major, in a window the tokens
row-major. With windows of one shape it is simply all windows row-major.

Everything is plain tensor arithmetic, for any device, traceable by `torch.compile`, and never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks


@dataclass(frozen=True)
class WindowGroup:
    """All windows of one shape: `rows` x `columns` windows of `height` x `width` tokens each."""

    rows: int
    columns: int
    height: int
    width: int

    @property
    def count(self) -> int:
        """Windows in the group."""
        return self.rows * self.columns

    @property
    def length(self) -> int:
        """Tokens in one window."""
        return self.height * self.width


def _runs(size: int, parts: int) -> list[tuple[int, int]]:
    """(how many, tokens each) of the windows along one axis: the larger ones, then the smaller ones."""
    small, larger = divmod(size, parts)
    return [run for run in ((larger, small + 1), (parts - larger, small)) if run[0] > 0]


def window_groups(grid: Sequence[int], windows: Sequence[int]) -> tuple[WindowGroup, ...]:
    """The groups of windows of one shape, in window order; one group when the windows divide the grid."""
    return tuple(
        WindowGroup(rows, columns, height, width)
        for rows, height in _runs(grid[0], windows[0])
        for columns, width in _runs(grid[1], windows[1])
    )


def window_order(
    grid: Sequence[int], windows: Sequence[int], shift: Sequence[int] | Tensor, *, device: torch.device
) -> Tensor:
    """Index table from window order to tokens.

    Args:
        grid: (h, w) in tokens.
        windows: (a, b), windows along each axis.
        shift: (shift_y, shift_x) in tokens; integers or an int64 tensor `[2]` on the CPU or on `device`.
        device: where the table is made.

    Returns:
        int64 `[h * w]`: entry p is the row-major index of the token at place p of window order.
    """
    (height, width), (rows, columns) = checks.window_grid(grid[0] * grid[1], grid, windows)
    shift_y, shift_x = checks.shift_tensor(shift, device).unbind()
    token_y = (torch.arange(height, device=device) + shift_y) % height
    token_x = (torch.arange(width, device=device) + shift_x) % width
    rolled = token_y[:, None] * width + token_x
    order = []
    top = 0
    for vertical, window_height in _runs(height, rows):
        left = 0
        for horizontal, window_width in _runs(width, columns):
            part = rolled[top : top + vertical * window_height, left : left + horizontal * window_width]
            part = part.reshape(vertical, window_height, horizontal, window_width)
            order.append(part.transpose(1, 2).flatten())
            left += horizontal * window_width
        top += vertical * window_height
    return order[0] if len(order) == 1 else torch.cat(order)


def inverse_order(order: Tensor) -> Tensor:
    """The table back: entry t is the place of token t in window order."""
    places = torch.arange(order.shape[0], device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)


def split_windows(x: Tensor, grid: Sequence[int], windows: Sequence[int]) -> list[Tensor]:
    """Tokens in window order as one batch of windows per group.

    Args:
        x: `[B, S, ...]` in window order, S = h * w.

    Returns:
        One tensor `[B * count, length, ...]` per group, image-major: all windows of image 0, then of image 1. With
        windows of one shape there is a single entry, and it is a view of a contiguous `x`.
    """
    groups = window_groups(grid, windows)
    parts = x.split([group.count * group.length for group in groups], dim=1)
    return [
        part.reshape(x.shape[0] * group.count, group.length, *x.shape[2:])
        for part, group in zip(parts, groups, strict=True)
    ]


def join_windows(parts: Sequence[Tensor], grid: Sequence[int], windows: Sequence[int]) -> Tensor:
    """`split_windows` undone: `[B, S, ...]`, still in window order."""
    groups = window_groups(grid, windows)
    batch = parts[0].shape[0] // groups[0].count
    unfolded = [
        part.reshape(batch, group.count * group.length, *part.shape[2:])
        for part, group in zip(parts, groups, strict=True)
    ]
    return unfolded[0] if len(unfolded) == 1 else torch.cat(unfolded, dim=1)


def to_windows(
    x: Tensor, grid: Sequence[int], windows: Sequence[int] = (2, 2), shift: Sequence[int] | Tensor = (0, 0)
) -> list[Tensor]:
    """Cut tokens into shifted windows.

    Args:
        x: `[B, S, ...]` with S = h * w row-major tokens: hidden states, heads-last projections or a mask.
        grid: (h, w) in tokens.
        windows: (a, b), windows along each axis.
        shift: cyclic shift (shift_y, shift_x) in tokens; integers or an int64 tensor `[2]`.

    Returns:
        One tensor `[B * count, length, ...]` per window shape, image-major: image 0 with all its windows, then image
        1. Windows that divide the grid give exactly one tensor.

    Raises:
        ValueError: if the grid does not hold S tokens or cannot be cut into so many windows.
    """
    checks.window_grid(x.shape[1], grid, windows)
    return split_windows(x.index_select(1, window_order(grid, windows, shift, device=x.device)), grid, windows)


def from_windows(
    parts: Sequence[Tensor],
    grid: Sequence[int],
    windows: Sequence[int] = (2, 2),
    shift: Sequence[int] | Tensor = (0, 0),
) -> Tensor:
    """`to_windows` undone: windows back into `[B, S, ...]` row-major tokens, contiguous."""
    order = window_order(grid, windows, shift, device=parts[0].device)
    return join_windows(parts, grid, windows).index_select(1, inverse_order(order))
