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


def heads_last_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor [batch, tokens, heads, head_dim], not {type(tensor).__name__}")
    if tensor.dim() != 4 or 0 in tensor.shape:
        raise ValueError(f"{name} must be [batch, tokens, heads, head_dim] and not empty, got {shape_of(tensor)}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}; supported are float16, bfloat16, float32 and float64")


def same_dtype_and_device(first_name: str, first: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.dtype != first.dtype:
        raise ValueError(f"{first_name} is {first.dtype} but {name} is {tensor.dtype}; the dtypes must be equal")
    if tensor.device != first.device:
        raise ValueError(f"{first_name} is on {first.device} but {name} is on {tensor.device}")


def self_attention_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """`query`, `key` and `value` are `[B, S, H, D]`, alike in shape, dtype and device."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        heads_last_tensor(name, tensor)
        if tensor.shape != query.shape:
            raise ValueError(f"query is {shape_of(query)} but {name} is {shape_of(tensor)}; the shapes must be equal")
        same_dtype_and_device("query", query, name, tensor)


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
    if not isinstance(key_mask, Tensor):
        raise ValueError(f"key_mask must be a bool tensor [batch, tokens], not {type(key_mask).__name__}")
    if key_mask.dtype != torch.bool or key_mask.shape != (batch, tokens):
        raise ValueError(
            f"key_mask must be bool [batch, tokens] = [{batch}, {tokens}], got {key_mask.dtype} {shape_of(key_mask)}"
        )
    if key_mask.device != device:
        raise ValueError(f"key_mask is on {key_mask.device}, the tensors it is for on {device}")
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


def key_value_tensors(key: Tensor, value: Tensor, key_name: str = "key", value_name: str = "value") -> None:
    """Key and value are `[B, N, H, D]`, alike in shape, dtype and device, with at least one key."""
    for name, tensor in ((key_name, key), (value_name, value)):
        heads_last_tensor(name, tensor)
    if key.shape != value.shape:
        raise ValueError(
            f"{key_name} is {shape_of(key)} but {value_name} is {shape_of(value)}; the shapes must be equal"
        )
    same_dtype_and_device(key_name, key, value_name, value)


def positive_eps(eps: float) -> float:
    """An epsilon that stays positive in fp32, so that no denominator is 0."""
    smallest = torch.finfo(torch.float32).tiny
    if not isinstance(eps, (int, float)) or not smallest <= eps < float("inf"):
        raise ValueError(f"eps must be finite and at least {smallest:.3g}, the smallest normal fp32, got {eps}")
    return float(eps)


def process_group(group: torch.distributed.ProcessGroup | None) -> None:
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        raise ValueError(f"group must be a torch.distributed process group of this rank, got {group!r}")


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    eps: float = 1e-4,
    key_mask: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Normal form of `kernels.linear_attention`; the group is for the caller alone."""
    heads_last_tensor("query", query)
    sums = linear_attention_state(key, value, key_mask=key_mask)
    same_dtype_and_device("query", query, "key", key)
    if query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise ValueError(
            f"query is {shape_of(query)} but key is {shape_of(key)}; batch, heads and head_dim must be equal"
        )
    process_group(group)
    return {"query": query, **sums, "eps": positive_eps(eps)}


def linear_attention_state(key: Tensor, value: Tensor, *, key_mask: Tensor | None = None) -> dict[str, Any]:
    """Normal form of `kernels.linear_attention_state`."""
    key_value_tensors(key, value)
    mask = key_mask_tensor(key_mask, key.shape[0], key.shape[1], key.device)
    return {"key": key, "value": value, "key_mask": mask}


def linear_attention_apply(
    query: Tensor, state: Tensor, key_sum: Tensor, count: int | Tensor, *, eps: float = 1e-4
) -> dict[str, Any]:
    """Normal form of `kernels.linear_attention_apply`."""
    heads_last_tensor("query", query)
    batch, _, heads, head_dim = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    for name, tensor, shape in (
        ("state", state, (batch, heads, head_dim, head_dim)),
        ("key_sum", key_sum, (batch, heads, head_dim)),
    ):
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"for a {query.dtype} query of {shape_of(query)}, {name} must be {dtype} {list(shape)}, "
                f"got {tensor.dtype} {shape_of(tensor)}"
            )
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} but query is on {query.device}")
    return {
        "query": query,
        "state": state,
        "key_sum": key_sum,
        "count": counted_keys(count, batch, query.device),
        "eps": positive_eps(eps),
    }


def counted_keys(count: int | Tensor, batch: int, device: torch.device) -> int | Tensor:
    """A number of keys, at least 1, or int64 `[B]`; a tensor of one number, as an all-reduce leaves it, is for all."""
    if isinstance(count, Tensor):
        if count.dtype != torch.int64 or count.shape not in ((), (batch,)):
            raise ValueError(f"a count tensor must be int64 [batch] = [{batch}], got {count.dtype} {shape_of(count)}")
        if count.device != device:
            raise ValueError(f"count is on {count.device} but query is on {device}")
        return count.expand(batch)
    elif not isinstance(count, (int, torch.SymInt)) or isinstance(count, bool):
        raise ValueError(f"count must be an integer or an int64 tensor [batch], got {count!r}")
    elif count < 1:
        raise ValueError(f"count must be at least 1 key, got {count}")
    return count


def token_grid(tokens: int, grid: Sequence[int], grid_offset: int) -> tuple[tuple[int, int], int]:
    """A grid that lies within `tokens` tokens, from the token `grid_offset` on."""
    height, width = int_pair("grid", grid, minimum=1)
    if not isinstance(grid_offset, (int, torch.SymInt)) or isinstance(grid_offset, bool) or grid_offset < 0:
        raise ValueError(f"grid_offset must be an integer and not negative, got {grid_offset!r}")
    if grid_offset + height * width > tokens:
        raise ValueError(
            f"grid {height}x{width} at token {grid_offset} ends at token {grid_offset + height * width}, "
            f"but there are {tokens}"
        )
    return (height, width), grid_offset


def radius_of_circle(radius: float) -> float:
    """A radius in tokens, at least 1."""
    number = isinstance(radius, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(radius, bool)
    if not number or not 1 <= radius < float("inf"):
        raise ValueError(f"radius must be a finite number of tokens and at least 1, got {radius!r}")
    return float(radius)


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Sequence[int],
    radius: float,
    grid_offset: int = 0,
    pooled_key: Tensor | None = None,
    pooled_value: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Normal form of `kernels.local_attention`; the group is for the caller alone."""
    process_group(group)
    self_attention_tensors(query, key, value)
    batch, tokens, _, head_dim = query.shape
    grid, grid_offset = token_grid(tokens, grid, grid_offset)
    if (pooled_key is None) != (pooled_value is None):
        given, missing = ("pooled_key", "pooled_value") if pooled_value is None else ("pooled_value", "pooled_key")
        raise ValueError(f"{given} is given without {missing}")
    if pooled_key is not None and pooled_value is not None:
        key_value_tensors(pooled_key, pooled_value, "pooled_key", "pooled_value")
        same_dtype_and_device("query", query, "pooled_key", pooled_key)
        if pooled_key.shape[0] != batch or pooled_key.shape[2:] != query.shape[2:]:
            raise ValueError(
                f"query is {shape_of(query)} but pooled_key is {shape_of(pooled_key)}; "
                "batch, heads and head_dim must be equal"
            )
    return {
        "query": query,
        "key": key,
        "value": value,
        "grid": grid,
        "grid_offset": grid_offset,
        "radius": radius_of_circle(radius),
        "scale": scale_or_default(scale, head_dim),
        "pooled_key": pooled_key,
        "pooled_value": pooled_value,
        "key_mask": key_mask_tensor(key_mask, batch, tokens, query.device),
    }


def pooling(x: Tensor, weights: Tensor, grid: Sequence[int], grid_offset: int) -> tuple[tuple[int, int], int, int]:
    """The grid, its first token and the side of a cell, of `kernels.pool_tokens`."""
    heads_last_tensor("x", x)
    (height, width), grid_offset = token_grid(x.shape[1], grid, grid_offset)
    if not isinstance(weights, Tensor) or weights.dim() != 2 or weights.shape[0] != weights.shape[1]:
        got = shape_of(weights) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"weights must be a tensor [s, s], got {got}")
    if not weights.is_floating_point() or weights.device != x.device:
        raise ValueError(f"weights must be floating point and on {x.device}, got {weights.dtype} on {weights.device}")
    cell = weights.shape[0]
    if cell == 0 or height % cell or width % cell:
        raise ValueError(f"a grid of {height}x{width} tokens cannot be cut into cells of {cell}x{cell}")
    return (height, width), grid_offset, cell
