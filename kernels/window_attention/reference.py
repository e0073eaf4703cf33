"""The definition of window attention: one window at a time, in fp32 (fp64 stays fp64)."""

from __future__ import annotations

import torch
from torch import Tensor


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
    height, width = grid
    shift_y, shift_x = shift.tolist()
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for rows in torch.arange(height).tensor_split(windows[0]):
        for columns in torch.arange(width).tensor_split(windows[1]):
            token_y = (rows + shift_y) % height
            token_x = (columns + shift_x) % width
            tokens = (token_y[:, None] * width + token_x).flatten().to(query.device)
            for image in range(query.shape[0]):
                keys = tokens if key_mask is None else tokens[key_mask[image, tokens]]
                if len(keys) == 0:
                    continue  # nobody to attend to: the row stays 0
                window_query = query[image, tokens].to(dtype)
                window_key = key[image, keys].to(dtype)
                window_value = value[image, keys].to(dtype)
                scores = torch.einsum("qhd,khd->hqk", window_query, window_key) * scale
                attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), window_value)
                out[image, tokens] = attended.to(query.dtype)
    return out
