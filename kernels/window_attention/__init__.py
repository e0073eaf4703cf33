"""Shifted-window attention. The public function is `attnswap.kernels.window_attention`."""

from .op import window_attention
from .windows import (
    WindowGroup,
    from_windows,
    inverse_order,
    join_windows,
    split_windows,
    to_windows,
    window_groups,
    window_order,
)

__all__ = [
    "WindowGroup",
    "from_windows",
    "inverse_order",
    "join_windows",
    "split_windows",
    "to_windows",
    "window_attention",
    "window_groups",
    "window_order",
]
