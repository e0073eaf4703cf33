"""Window attention as one Triton kernel.

The usual flash loop over key tiles. A tile's rows are found by index arithmetic, so the tensors are read where they
lie: nothing is rolled, partitioned or padded in memory, and uneven windows cost a masked tail tile at most.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..targets import TARGETS, Config, Shipped, Target, target_of

# Grid sizes, window counts, shifts and strides change from call to call. Left unspecialised, they never cause a
# second compilation. What matters of the strides is given by the constant ALIGNMENT, the unit they are counted in:
# rows known to start on 16 bytes are loaded 16 bytes at a time.
UNSPECIALISED = [
    *(f"stride_{tensor}{axis}" for tensor in "qkv" for axis in "bsh"),
    *("shift_y", "shift_x", "heads", "height", "width", "rows", "columns", "qk_scale"),
]


@triton.jit
def _span(index, size, parts):
    """Start and extent of window `index` along an axis: larger windows first, as torch.tensor_split."""
    small = size // parts
    larger = size % parts
    start = index * small + tl.minimum(index, larger)
    return start, small + (index < larger).to(tl.int32)


@triton.jit
def _wrapped_start(start, shift, size):
    """Where a window starts in the unrolled grid. The remainder of a negative shift is negative."""
    start = (start + shift) % size
    return (start + size) % size


@triton.jit
def _tokens(row, column, top, left, height, width):
    """Row-major tokens of the places (row, column) of a window. At most one wrap, for row and top are below height."""
    y = top + row
    y = tl.where(y >= height, y - height, y)
    x = left + column
    x = tl.where(x >= width, x - width, x)
    return y * width + x


@triton.jit
def _load(base, token, stride, keep, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GUARD: tl.constexpr):
    """Rows of `HEAD_DIM` elements, padded with zeros to `BLOCK_D`; rows not kept are zero when guarded."""
    dim = tl.arange(0, BLOCK_D)
    pointers = base + token.to(tl.int64)[:, None] * stride + dim[None, :]
    if GUARD:
        wanted = keep[:, None]
        if HEAD_DIM != BLOCK_D:
            wanted = wanted & (dim < HEAD_DIM)[None, :]
        rows = tl.load(pointers, mask=wanted, other=0.0)
    else:
        if HEAD_DIM != BLOCK_D:
            rows = tl.load(pointers, mask=(dim < HEAD_DIM)[None, :], other=0.0)
        else:
            rows = tl.load(pointers)
    return rows


@triton.jit
def _attend(
    acc, peak, total, q, place, row, column, top, left, height, width, length, k_base, v_base, mask_base,
    stride_ks, stride_vs, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """One key tile of the online softmax, in powers of two."""
    token = _tokens(row, column, top, left, height, width)
    keep = place < length
    if HAS_MASK:
        keep = tl.load(mask_base + token, mask=keep, other=0) != 0
    k = _load(k_base, token, stride_ks, keep, HEAD_DIM, BLOCK_D, TAIL or HAS_MASK)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if TAIL or HAS_MASK:
        scores = tl.where(keep[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * qk_scale)
    # While every key was masked the peak is -inf; 0 in its place keeps -inf - (-inf) out.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if HAS_MASK else new_peak
    p = tl.exp2(tl.fma(scores, qk_scale, -base[:, None]))
    decay = tl.exp2(peak - base)
    total = total * decay + tl.sum(p, 1)
    v = _load(v_base, token, stride_vs, keep, HEAD_DIM, BLOCK_D, TAIL or HAS_MASK)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit(do_not_specialize=UNSPECIALISED)
def window_attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, shift_ptr, out_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    shift_y, shift_x, heads, height, width, rows, columns, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr, SHIFT_IN_MEMORY: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """One query tile of one window of one head. Programs of a window follow each other, to share its keys in L2."""
    longest = tl.cdiv(height, rows) * tl.cdiv(width, columns)
    tiles = tl.cdiv(longest, BLOCK_M)
    program = tl.program_id(0)
    tile = program % tiles
    window = (program // tiles) % (rows * columns)
    head = (program // tiles // (rows * columns)) % heads
    image = (program // tiles // (rows * columns) // heads).to(tl.int64)

    top, window_height = _span(window // columns, height, rows)
    left, window_width = _span(window % columns, width, columns)
    length = window_height * window_width
    if tile * BLOCK_M >= length:
        return
    if SHIFT_IN_MEMORY:
        shift_y = (tl.load(shift_ptr) % height).to(tl.int32)
        shift_x = (tl.load(shift_ptr + 1) % width).to(tl.int32)
    top = _wrapped_start(top, shift_y, height)
    left = _wrapped_start(left, shift_x, width)

    q_base = q_ptr + (image * stride_qb + head.to(tl.int64) * stride_qh) * ALIGNMENT
    k_base = k_ptr + (image * stride_kb + head.to(tl.int64) * stride_kh) * ALIGNMENT
    v_base = v_ptr + (image * stride_vb + head.to(tl.int64) * stride_vh) * ALIGNMENT
    mask_base = mask_ptr
    if HAS_MASK:
        mask_base += image * height * width

    q_place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_token = _tokens(q_place // window_width, q_place % window_width, top, left, height, width)
    q_inside = q_place < length
    q = _load(q_base, q_token, stride_qs * ALIGNMENT, q_inside, HEAD_DIM, BLOCK_D, True)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    # The last tile goes first: it may be cut short, and alone needs a guard.
    place = tl.arange(0, BLOCK_N)
    full = (length - 1) // BLOCK_N * BLOCK_N
    acc, peak, total = _attend(
        acc, peak, total, q, place + full, (place + full) // window_width, (place + full) % window_width, top, left,
        height, width, length, k_base, v_base, mask_base, stride_ks * ALIGNMENT, stride_vs * ALIGNMENT, qk_scale,
        HEAD_DIM, BLOCK_D, True, HAS_MASK,
    )  # fmt: skip
    # (row, column) of the tile's keys move on by addition: a division for each key would cost more than the rest.
    row = place // window_width
    column = place % window_width
    row_step = BLOCK_N // window_width
    column_step = BLOCK_N % window_width
    for _ in range(0, full, BLOCK_N):
        acc, peak, total = _attend(
            acc, peak, total, q, place, row, column, top, left, height, width, length, k_base, v_base, mask_base,
            stride_ks * ALIGNMENT, stride_vs * ALIGNMENT, qk_scale, HEAD_DIM, BLOCK_D, False, HAS_MASK,
        )  # fmt: skip
        column += column_step
        row += row_step + (column >= window_width).to(tl.int32)
        column = tl.where(column >= window_width, column - window_width, column)

    if HAS_MASK:
        total = tl.where(total == 0.0, 1.0, total)  # a row with no key left is 0, not 0 / 0
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    dim = tl.arange(0, BLOCK_D)
    out_base = out_ptr + (image * height * width * heads + head) * HEAD_DIM
    out_pointers = out_base + q_token.to(tl.int64)[:, None] * (heads * HEAD_DIM) + dim[None, :]
    tl.store(out_pointers, out, mask=q_inside[:, None] & (dim < HEAD_DIM)[None, :])


# Tiles by target, element size and padded head dimension. They were chosen to spill nothing on their target
# (kernels/aot.py), not by timing.
WIDE_MMA = {  # sm_80 and sm_120 keep all operands in registers
    (2, 64): Config(128, 64, 8, 3),
    (2, 128): Config(128, 16, 8, 2),
    (2, 256): Config(32, 32, 8, 2),
}
FP32 = {  # multiplied without tensor cores, to be exact
    (4, 64): Config(32, 32, 4, 2),
    (4, 128): Config(32, 32, 8, 2),
    (4, 256): Config(16, 16, 8, 2),
}
CONFIGS = {
    "sm_80": WIDE_MMA | FP32,
    "sm_90": {(2, 64): Config(128, 64, 8, 3), (2, 128): Config(128, 64, 8, 2), (2, 256): Config(64, 32, 8, 2)} | FP32,
    "sm_100": {(2, 64): Config(128, 64, 8, 2), (2, 128): Config(128, 64, 8, 2), (2, 256): Config(64, 32, 8, 2)} | FP32,
    "sm_120": WIDE_MMA | FP32,
    "gfx942": {(2, 64): Config(128, 64, 8, 2), (2, 128): Config(128, 32, 8, 2), (2, 256): Config(64, 16, 8, 2)} | FP32,
}


def configuration(target: Target, element_size: int, head_dim: int, masked: bool) -> tuple[int, Config]:
    """The padded head dimension and the tiles for a call."""
    block_d = max(64, triton.next_power_of_2(head_dim))
    config = CONFIGS[target.name][element_size, block_d]
    if masked:  # the mask is one more value for each score
        config = replace(config, block_n=max(16, config.block_n // 2))
    return block_d, config


def constants(block_d: int, config: Config, head_dim: int, masked: bool) -> dict[str, Any]:
    """The constants of the kernel that a call and its ahead-of-time check share."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "HAS_MASK": masked,
    }


def shipped() -> list[Shipped]:
    """For kernels/aot.py: every tile configuration, the head dimensions that need padding, and the key mask."""
    calls = [(dtype, head_dim, False) for dtype in ("fp16", "bf16", "fp32") for head_dim in (64, 128, 256)]
    calls += [("bf16", head_dim, False) for head_dim in (40, 80, 160)]
    calls += [(dtype, head_dim, True) for dtype in ("bf16", "fp32") for head_dim in (64, 128, 256)]
    return [_shipped(target, *call) for target in TARGETS for call in calls]


def _shipped(target: Target, dtype: str, head_dim: int, masked: bool) -> Shipped:
    element_size = 4 if dtype == "fp32" else 2
    block_d, config = configuration(target, element_size, head_dim, masked)
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}")
    signature |= dict.fromkeys(UNSPECIALISED, "i32") | {"qk_scale": "fp32", "shift_ptr": "*i64"}
    fixed = constants(block_d, config, head_dim, masked) | {"SHIFT_IN_MEMORY": True, "ALIGNMENT": 16 // element_size}
    if masked:
        signature["mask_ptr"] = "*u8"
    else:
        fixed["mask_ptr"] = None
    variant = f"D {head_dim}, key mask" if masked else f"D {head_dim}"
    return Shipped(window_attention_kernel, target, dtype, variant, config, signature, fixed)


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
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    batch, _, heads, head_dim = query.shape
    (height, width), (rows, columns) = grid, windows
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    element_size = query.element_size()
    masked = key_mask is not None
    block_d, config = configuration(target_of(query.device), element_size, head_dim, masked)
    strides = [stride for x in (query, key, value) for stride in x.stride()[:3]]
    elements = 16 // element_size
    alignment = elements if all(stride % elements == 0 for stride in (*strides, head_dim)) else 1
    # A shift beside the query is read by the kernel, and nobody waits for it here; one left on the CPU goes by value.
    in_memory = shift.device == query.device
    shift_y, shift_x = (0, 0) if in_memory else (int(shift[0]) % height, int(shift[1]) % width)
    longest = -(-height // rows) * -(-width // columns)
    programs = triton.cdiv(longest, config.block_m) * rows * columns * heads * batch
    with torch.cuda.device_of(query):
        window_attention_kernel[(programs,)](
            query, key, value, None if key_mask is None else key_mask.contiguous().view(torch.uint8),
            shift if in_memory else None, out,
            *(stride // alignment for stride in strides),
            shift_y, shift_x, heads, height, width, rows, columns, scale * math.log2(math.e),
            **constants(block_d, config, head_dim, masked), SHIFT_IN_MEMORY=in_memory, ALIGNMENT=alignment,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out
