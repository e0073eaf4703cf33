"""Window attention in PyTorch: one gather in, one SDPA per window shape, one gather out."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .windows import inverse_order, join_windows, split_windows, window_order


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: tuple[int, int],
    windows: tuple[int, int],
    shift: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
) -> Tensor:
    if windows == (1, 1):  # the order of the tokens does not matter to dense attention
        return _attend(query, key, value, key_mask, scale).contiguous()
    order = window_order(grid, windows, shift, device=query.device)
    queries, keys, values = (_cut(x, order, grid, windows) for x in (query, key, value))
    masks = [None] * len(queries) if key_mask is None else _cut(key_mask, order, grid, windows)
    attended = [_attend(*group, scale) for group in zip(queries, keys, values, masks, strict=True)]
    return join_windows(attended, grid, windows).index_select(1, inverse_order(order))


def _cut(x: Tensor, order: Tensor, grid: tuple[int, int], windows: tuple[int, int]) -> list[Tensor]:
    return split_windows(x.index_select(1, order), grid, windows)


def _attend(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """SDPA over heads-last windows `[N, L, H, D]`; a masked key has no influence whatever it holds, NaN included."""
    if key_mask is None:
        return _sdpa(query, key, value, None, scale)
    hidden = ~key_mask[:, :, None, None]
    nobody = hidden.all(dim=1, keepdim=True)
    # SDPA may give NaN where all keys are masked, forward or backward. There, all are visible, and hold zeros.
    visible = key_mask[:, None, None, :] | nobody
    return _sdpa(query, key.masked_fill(hidden, 0), value.masked_fill(hidden, 0), visible, scale)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)
