"""The tiles of the Triton kernels of block-sparse attention, and what of them is checked ahead of time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton

from ..targets import TARGETS, Config, Shipped, Target
from .triton_dense import dense_attention_kernel, reference_kernel
from .triton_scores import block_scores_kernel
from .triton_sparse import block_index_kernel, block_sparse_kernel
from .triton_tiles import UNSPECIALISED

# Blocks of a row that one step of `block_index_kernel` unpacks.
CHUNK = 1024
MAX_ROWS = 128
# Largest tiles by target, element size and padded head dimension. They were chosen to spill nothing on their target
# (kernels/aot.py), not by timing. Attention over a mask has a tile for each block of queries, with warps in proportion
# where that is less; blocks larger than a tile are walked, or their scores summed, in several.
FP32 = {  # multiplied without tensor cores, to be exact
    (4, 64): Config(32, 32, 8, 1),
    (4, 128): Config(32, 16, 8, 1),
}
TALL = Config(128, 64, 8, 3)
SLIM = Config(128, 32, 8, 3)  # where all operands are kept in registers
ATTENTION = {
    "sm_80": {(2, 64): TALL, (2, 128): SLIM} | FP32,
    "sm_90": {(2, 64): TALL, (2, 128): TALL} | FP32,
    "sm_100": {(2, 64): TALL, (2, 128): Config(128, 64, 8, 2)} | FP32,
    "sm_120": {(2, 64): TALL, (2, 128): Config(64, 32, 4, 3)} | FP32,
    "gfx942": {(2, 64): Config(128, 64, 8, 2), (2, 128): Config(128, 32, 8, 2)} | FP32,
}
# Scores alone: no output to accumulate.
SEARCH = {
    "sm_80": {(2, 64): TALL, (2, 128): TALL} | FP32,
    "sm_90": {(2, 64): TALL, (2, 128): TALL} | FP32,
    "sm_100": {(2, 64): TALL, (2, 128): Config(64, 64, 4, 3)} | FP32,
    "sm_120": {(2, 64): TALL, (2, 128): Config(128, 64, 8, 2)} | FP32,
    "gfx942": {(2, 64): Config(128, 64, 8, 2), (2, 128): Config(128, 64, 8, 2)} | FP32,
}
# An output and two sums.
FP32_AND_SUMS = {(4, 64): Config(32, 16, 8, 1), (4, 128): Config(16, 16, 4, 1)}
FUSED = {
    "sm_80": {(2, 64): TALL, (2, 128): SLIM} | FP32_AND_SUMS,
    "sm_90": {(2, 64): TALL, (2, 128): TALL} | FP32,
    "sm_100": {(2, 64): TALL, (2, 128): TALL} | FP32_AND_SUMS,
    "sm_120": {(2, 64): TALL, (2, 128): SLIM} | FP32,
    "gfx942": {(2, 64): Config(128, 64, 8, 2), (2, 128): Config(128, 64, 8, 2)} | FP32,
}


def configuration(
    configs: dict[str, dict[tuple[int, int], Config]],
    target: Target,
    element_size: int,
    head_dim: int,
    block: tuple[int, int] = (MAX_ROWS, 128),
) -> tuple[Config, dict[str, Any]]:
    """The tiles for a call, none larger than `block`, and the constants that it shares with its ahead-of-time check."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    largest = configs[target.name][element_size, max(64, block_d)]
    config = replace(largest, block_m=min(largest.block_m, block[0]), block_n=min(largest.block_n, block[1]))
    config = replace(config, num_warps=max(1, largest.num_warps * config.block_m // largest.block_m))
    return config, {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }


def sparse_constants(config: Config, block: tuple[int, int]) -> dict[str, int]:
    return {"ROW_TILES": block[0] // config.block_m, "KEY_TILES": block[1] // config.block_n}


def score_constants(config: Config, block: tuple[int, int]) -> dict[str, int]:
    """A tile of the search may be several blocks of queries: they share the keys, and their scores are kept apart."""
    return {"SCORE_ROWS": max(1, config.block_m // block[0])}


def shipped() -> list[Shipped]:
    """For kernels/aot.py: the blocks of the presets, with and without lengths."""
    paper, tall = (64, 64), (128, 64)
    sparse = [("bf16", 128, paper, True), ("bf16", 128, tall, False), ("fp16", 64, paper, False),
              ("bf16", 64, tall, True), ("fp32", 128, paper, False)]  # fmt: skip
    scores = [("bf16", 128, paper, True), ("bf16", 128, tall, False), ("fp16", 64, paper, False),
              ("fp32", 128, paper, False)]  # fmt: skip
    fused = [("bf16", 128, paper, True), ("bf16", 128, tall, False), ("bf16", 64, paper, False),
             ("fp32", 128, paper, False)]  # fmt: skip
    entries = []
    for target in TARGETS:
        entries += [_shipped(block_sparse_kernel, ATTENTION, target, *call) for call in sparse]
        entries += [_shipped(block_scores_kernel, SEARCH, target, *call, HAS_VALUE=False) for call in scores]
        entries += [_shipped(block_scores_kernel, FUSED, target, *call, HAS_VALUE=True) for call in fused]
        entries += [
            _shipped(dense_attention_kernel, ATTENTION, target, "bf16", 128, (128, 128), True, REPAIR=True),
            _shipped(dense_attention_kernel, ATTENTION, target, "fp16", 64, (128, 128), False, REPAIR=False),
            _shipped(reference_kernel, ATTENTION, target, "bf16", 128, (128, 128), True, HAS_GIVEN=True),
            _shipped_index(target),
        ]
    return entries


def _shipped(
    kernel: Any,
    configs: dict[str, dict[tuple[int, int], Config]],
    target: Target,
    dtype: str,
    head_dim: int,
    block: tuple[int, int],
    lengths: bool,
    **flags: bool,
) -> Shipped:
    element_size = 4 if dtype == "fp32" else 2
    rows = block[0] if kernel is block_sparse_kernel else MAX_ROWS
    config, fixed = configuration(configs, target, element_size, head_dim, (rows, block[1]))
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}")
    signature |= dict.fromkeys(("given_ptr", "reference_ptr", "scores_ptr", "lse_ptr"), "*fp32")
    signature |= dict.fromkeys(("blocks_ptr", "starts_ptr", "counts_ptr", "order_ptr", "lengths_ptr"), "*i32")
    signature |= dict.fromkeys(UNSPECIALISED, "i32") | {"qk_scale": "fp32"}
    fixed |= (
        sparse_constants(config, block)
        | score_constants(config, block)
        | flags
        | {"HAS_LENGTHS": lengths, "ALIGNMENT": 16 // element_size}
    )
    absent = {"lengths_ptr": lengths, "v_ptr": flags.get("HAS_VALUE", True), "reference_ptr": flags.get("REPAIR", True)}
    for name in (name for name, there in absent.items() if not there):
        del signature[name]
        fixed[name] = None
    names = [name.lower().removeprefix("has_") for name, there in flags.items() if there]
    variant = ", ".join([f"D {head_dim}", f"block {block[0]}x{block[1]}", *names, *["lengths"] * lengths])
    return Shipped(kernel, target, dtype, variant, config, signature, fixed)


def _shipped_index(target: Target) -> Shipped:
    signature = {"bits_ptr": "*u8"} | dict.fromkeys(("starts_ptr", "blocks_ptr"), "*i32")
    signature |= dict.fromkeys(UNSPECIALISED, "i32")
    config = Config(1, CHUNK, 4, 1)
    return Shipped(block_index_kernel, target, "u8", "", config, signature, {"CHUNK": CHUNK})
