"""Validation of everything the public kernels accept, in one place.

Each operation has one function here. It takes the public arguments, raises `ValueError` with the numbers in the
message, and returns the arguments in the normal form every implementation receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shape_of(tensor: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def self_attention_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """`query`, `key` and `value` are `[B, S, H, D]`, alike in shape, dtype and device."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor [batch, tokens, heads, head_dim], not {type(tensor).__name__}")
        if tensor.dim() != 4 or 0 in tensor.shape:
            raise ValueError(f"{name} must be [batch, tokens, heads, head_dim] and not empty, got {shape_of(tensor)}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; supported are float16, bfloat16, float32 and float64")
        if tensor.shape != query.shape:
            raise ValueError(f"query is {shape_of(query)} but {name} is {shape_of(tensor)}; the shapes must be equal")
        if tensor.dtype != query.dtype:
            raise ValueError(f"query is {query.dtype} but {name} is {tensor.dtype}; the dtypes must be equal")
        if tensor.device != query.device:
            raise ValueError(f"query is on {query.device} but {name} is on {tensor.device}")


def int_pair(name: str, value: Sequence[int], *, minimum: int | None = None) -> tuple[int, int]:
    """Two Python integers, at least `minimum` each."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be two integers, got {value!r}")
    for entry in value:
        # torch.SymInt is how a compiler shows a size that may change.
        if not isinstance(entry, (int, torch.SymInt)) or isinstance(entry, bool):
            raise ValueError(f"{name} must be two integers, got {value!r}")
    if minimum is not None and (value[0] < minimum or value[1] < minimum):
        raise ValueError(f"{name} must be at least {minimum} along each axis, got {tuple(value)}")
    return value[0], value[1]


def window_grid(tokens: int, grid: Sequence[int], windows: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """A grid that holds `tokens` tokens and can be cut into `windows`."""
    height, width = int_pair("grid", grid, minimum=1)
    rows, columns = int_pair("windows", windows, minimum=1)
    if height * width != tokens:
        raise ValueError(f"grid {height}x{width} holds {height * width} tokens, but there are {tokens}")
    if rows > height or columns > width:
        raise ValueError(f"a grid of {height}x{width} tokens cannot be cut into {rows}x{columns} windows")
    return (height, width), (rows, columns)


def shift_tensor(shift: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """The shift as an int64 tensor `[2]`.

    Integers become a tensor on the CPU, whatever `device` is: reading it back needs no wait for the accelerator, and
    a compiled graph sees a tensor whose values may change freely.
    """
    if not isinstance(shift, Tensor):
        return torch.tensor(int_pair("shift", shift), dtype=torch.int64)
    if shift.shape != (2,) or shift.dtype != torch.int64:
        raise ValueError(f"a shift tensor must be int64 [2], got {shift.dtype} {shape_of(shift)}")
    if shift.device.type != "cpu" and shift.device != device:
        raise ValueError(f"shift is on {shift.device}; it must be on the CPU or on {device}")
    return shift


def key_mask_tensor(key_mask: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor | None:
    """A boolean mask `[B, S]` over the keys, or None."""
    if key_mask is None:
        return None
    if key_mask.dtype != torch.bool or key_mask.shape != (batch, tokens):
        raise ValueError(
            f"key_mask must be bool [batch, tokens] = [{batch}, {tokens}], got {key_mask.dtype} {shape_of(key_mask)}"
        )
    if key_mask.device != device:
        raise ValueError(f"key_mask is on {key_mask.device} but query is on {device}")
    return key_mask


def scale_or_default(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return float(scale)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Sequence[int],
    windows: Sequence[int] = (2, 2),
    shift: Sequence[int] | Tensor = (0, 0),
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> dict[str, Any]:
    """Normal form of `kernels.window_attention`."""
    self_attention_tensors(query, key, value)
    batch, tokens, _, head_dim = query.shape
    grid, windows = window_grid(tokens, grid, windows)
    return {
        "query": query,
        "key": key,
        "value": value,
        "grid": grid,
        "windows": windows,
        "shift": shift_tensor(shift, query.device),
        "scale": scale_or_default(scale, head_dim),
        "key_mask": key_mask_tensor(key_mask, batch, tokens, query.device),
    }
