"""Local attention in Triton.

A program attends for one tile of grid queries, 8 x 16 where registers allow: first to the dense and the pooled keys,
then to a precomputed list of 8 x 8 tiles of grid keys, with the circle as a mask in registers. Rows are found by
pointers, so the tensors are read where they lie. Dense queries are a second kernel: they are few and see every token,
so their keys are split among programs, and the parts merged by their log-sum-exp.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from ..targets import TARGETS, Config, Shipped, Target, target_of
from .geometry import squared_reach, tile_lists
from .triton_kernels import (
    DENSE_UNSPECIALISED,
    GRID_UNSPECIALISED,
    local_attention_dense_kernel,
    local_attention_grid_kernel,
)

# Keys of a split: fewer do not pay for the merge.
MIN_SPLIT = 1024
PROGRAMS_PER_SM = 2
# (rows, columns) of a tile of so many tokens.
TILES = {128: (8, 16), 64: (8, 8), 32: (4, 8), 16: (4, 4)}
# Tiles by target, element size and padded head dimension. They were chosen to spill nothing on their target
# (kernels/aot.py), not by timing.
WIDE_MMA = {  # sm_80 and sm_120 keep all operands in registers
    (2, 64): Config(128, 64, 8, 3),
    (2, 128): Config(64, 32, 4, 2),
}
FP32 = {  # multiplied without tensor cores, to be exact
    (4, 64): Config(32, 32, 8, 2),
    (4, 128): Config(32, 16, 8, 2),
}
WGMMA = {(2, 64): Config(128, 64, 8, 3), (2, 128): Config(128, 64, 8, 2)}
CONFIGS = {
    "sm_80": WIDE_MMA | FP32,
    "sm_90": WGMMA | FP32,
    "sm_100": WGMMA | FP32,
    "sm_120": WIDE_MMA | FP32,
    "gfx942": {(2, 64): Config(128, 64, 8, 2), (2, 128): Config(128, 32, 8, 2)} | FP32,
}


def configuration(target: Target, element_size: int, head_dim: int, masked: bool) -> tuple[Config, dict[str, Any]]:
    """The tiles for a call, and the constants that it shares with its ahead-of-time check."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    config = CONFIGS[target.name][element_size, max(64, block_d)]
    if masked:  # the mask is one more value for each score
        config = replace(config, block_n=min(config.block_n, 32))
    return config, {
        "HAS_MASK": masked,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }


def tile_widths(config: Config) -> dict[str, int]:
    return {"TILE_W": TILES[config.block_m][1], "KEY_TILE_W": TILES[config.block_n][1]}


def shipped() -> list[Shipped]:
    """For kernels/aot.py: every tile configuration, with and without pooled keys, and the key mask."""
    plain = [(dtype, head_dim, False, False) for dtype in ("fp16", "bf16", "fp32") for head_dim in (64, 128)]
    more = [("bf16", 128, True, False), ("bf16", 128, True, True), ("bf16", 64, True, True)]
    dense = [("fp16", 64, False), ("fp16", 128, False), ("bf16", 128, False), ("bf16", 128, True), ("fp32", 128, False)]
    return [
        *(_shipped_grid(target, *call) for target in TARGETS for call in (*plain, *more)),
        *(_shipped_dense(target, *call) for target in TARGETS for call in dense),
    ]


def _shipped_grid(target: Target, dtype: str, head_dim: int, pooled: bool, masked: bool) -> Shipped:
    element_size = 4 if dtype == "fp32" else 2
    config, fixed = configuration(target, element_size, head_dim, masked)
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}") | {"lse_ptr": "*fp32"}
    signature |= dict.fromkeys(("starts_ptr", "entries_ptr"), "*i32")
    signature |= dict.fromkeys(GRID_UNSPECIALISED, "i32") | {"qk_scale": "fp32"}
    fixed |= tile_widths(config) | {"HAS_POOLED": pooled, "ALIGNMENT": 16 // element_size}
    for name, there, kind in (("pk_ptr", pooled, dtype), ("pv_ptr", pooled, dtype), ("mask_ptr", masked, "u8")):
        if there:
            signature[name] = f"*{kind}"
        else:
            fixed[name] = None
    variant = f"D {head_dim}" + ", pooled" * pooled + ", key mask" * masked
    return Shipped(local_attention_grid_kernel, target, dtype, variant, config, signature, fixed)


def _shipped_dense(target: Target, dtype: str, head_dim: int, masked: bool) -> Shipped:
    element_size = 4 if dtype == "fp32" else 2
    config, fixed = configuration(target, element_size, head_dim, masked)
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}")
    signature |= dict.fromkeys(("out_ptr", "lse_ptr"), "*fp32")
    signature |= dict.fromkeys(DENSE_UNSPECIALISED, "i32") | {"qk_scale": "fp32"}
    fixed |= {"ALIGNMENT": 16 // element_size}
    if masked:
        signature["mask_ptr"] = "*u8"
    else:
        fixed["mask_ptr"] = None
    variant = f"D {head_dim}" + ", key mask" * masked
    return Shipped(local_attention_dense_kernel, target, dtype, variant, config, signature, fixed)


@functools.lru_cache(maxsize=16)
def lists_on(
    device: torch.device, rows: tuple[int, int], grid: tuple[int, int], radius: float, block_m: int, block_n: int
) -> tuple[Tensor, Tensor]:
    """`geometry.tile_lists` on a device."""
    starts, entries = tile_lists(rows, grid, radius, TILES[block_m], TILES[block_n])
    return starts.to(device), entries.to(device)


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: tuple[int, int],
    grid_offset: int,
    radius: float,
    scale: float,
    pooled_key: Tensor | None = None,
    pooled_value: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output, and the natural logarithm of the softmax denominators, `[B, H, S]`, which backward needs."""
    batch, tokens, heads, _ = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    first, last = grid_offset, grid_offset + grid[0] * grid[1]
    lse[:, :, first:last] = grid_queries(
        query[:, first:last],
        key,
        value,
        grid=grid,
        grid_offset=grid_offset,
        radius=radius,
        scale=scale,
        pooled_key=pooled_key,
        pooled_value=pooled_value,
        key_mask=key_mask,
        out=out[:, first:last],
    )[1]
    for start, stop in ((0, first), (last, tokens)):
        if start < stop:
            queries = query[:, start:stop]
            out[:, start:stop], lse[:, :, start:stop] = dense_queries(
                queries, key, value, scale=scale, key_mask=key_mask
            )
    return out, lse


def grid_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: tuple[int, int],
    grid_offset: int,
    radius: float,
    scale: float,
    query_rows: tuple[int, int] | None = None,
    pooled_key: Tensor | None = None,
    pooled_value: Tensor | None = None,
    key_mask: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `eager.grid_queries`."""
    pooled = pooled_key is not None
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    query, key, value = (_rows_in_place(x) for x in (query, key, value))
    pooled_key, pooled_value = (_rows_in_place(x) if pooled else key for x in (pooled_key, pooled_value))
    batch, length, heads, head_dim = query.shape
    rows = query_rows or (0, grid[0])
    lse = query.new_empty((batch, heads, length), dtype=torch.float32)
    config, fixed = configuration(target_of(query.device), query.element_size(), head_dim, key_mask is not None)
    # A reach beyond the grid sees no more; squares stay small enough for fp32.
    furthest = (grid[0] - 1) ** 2 + (grid[1] - 1) ** 2 + 1
    radius = min(radius, math.sqrt(furthest) + 1)
    starts, entries = lists_on(query.device, rows, grid, radius, config.block_m, config.block_n)
    strides, alignment = _counted_strides(query, key, value, pooled_key, pooled_value, out)
    programs = (len(starts) - 1) * heads * batch
    with torch.cuda.device_of(query):
        local_attention_grid_kernel[(programs,)](
            query, key, value, pooled_key if pooled else None, pooled_value if pooled else None,
            None if key_mask is None else key_mask.contiguous().view(torch.uint8), starts, entries, out, lse,
            *strides, heads, *grid, rows[0], rows[1] - rows[0], grid_offset, key.shape[1],
            pooled_key.shape[1] if pooled else 0, squared_reach(radius), scale * math.log2(math.e),
            **fixed, **tile_widths(config), HAS_POOLED=pooled, ALIGNMENT=alignment,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, lse


def dense_queries(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `eager.dense_queries`."""
    query, key, value = (_rows_in_place(x) for x in (query, key, value))
    batch, queries, heads, head_dim = query.shape
    tokens = key.shape[1]
    config, fixed = configuration(target_of(query.device), query.element_size(), head_dim, key_mask is not None)
    programs = triton.cdiv(queries, config.block_m) * heads * batch
    splits, split_tokens = divided(tokens, programs, query.device, config.block_n)
    out = query.new_empty((splits, batch, queries, heads, head_dim), dtype=torch.float32)
    lse = query.new_empty((splits, batch, heads, queries), dtype=torch.float32)
    strides, alignment = _counted_strides(query, key, value)
    with torch.cuda.device_of(query):
        local_attention_dense_kernel[(programs * splits,)](
            query, key, value, None if key_mask is None else key_mask.contiguous().view(torch.uint8), out, lse,
            *strides, heads, queries, tokens, splits, split_tokens, scale * math.log2(math.e),
            **fixed, ALIGNMENT=alignment,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    if splits == 1:
        return out[0], lse[0]
    total = lse.logsumexp(0)
    # Without a key in any split all are -inf, all outputs 0, and any share will do.
    shares = (lse - total).exp().masked_fill(total.isneginf(), 0)
    return torch.einsum("pbqhd,pbhq->bqhd", out, shares), total


def divided(tokens: int, programs: int, device: torch.device, tile: int) -> tuple[int, int]:
    """(splits, tokens of each): so many that the programs of all fill the device, and none too short."""
    wanted = triton.cdiv(PROGRAMS_PER_SM * _multiprocessors(device), programs)
    splits = max(1, min(wanted, tokens // MIN_SPLIT))
    size = triton.cdiv(triton.cdiv(tokens, splits), tile) * tile
    return triton.cdiv(tokens, size), size


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _rows_in_place(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _counted_strides(*tensors: Tensor) -> tuple[list[int], int]:
    """The strides of batch, tokens and heads in units of the alignment, and the alignment in elements."""
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    elements = 16 // tensors[0].element_size()
    alignment = elements if all(stride % elements == 0 for stride in strides) else 1
    return [stride // alignment for stride in strides], alignment
