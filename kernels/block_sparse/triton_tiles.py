"""What the Triton kernels of block-sparse attention share: tiles in memory, and a step of the online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes and strides change from call to call; left unspecialised, they never cause a second compilation. What matters
# of the strides is given by the constant ALIGNMENT, the unit they are counted in: rows known to start on 16 bytes are
# loaded 16 bytes at a time.
UNSPECIALISED = [
    *(f"stride_{tensor}{axis}" for tensor in "qkv" for axis in "bsh"),
    *("heads", "tokens", "query_blocks", "key_blocks", "score_rows", "key_tiles", "row_bytes", "qk_scale"),
]
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def offset(index, stride, ALIGNMENT: tl.constexpr):
    """In elements: tensors may have more than 2 ** 31."""
    return tl.cast(index, tl.int64) * stride * ALIGNMENT


@triton.jit
def tile_pointers(base, stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Those of the first `ROWS` tokens; a kernel computes them once and adds the offset of each tile."""
    return base + offset(tl.arange(0, ROWS), stride, ALIGNMENT)[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_tile(pointers, keep, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GUARD: tl.constexpr):
    """Rows of `HEAD_DIM` elements, padded with zeros to `BLOCK_D`; rows not kept are zero when guarded."""
    dim = tl.arange(0, BLOCK_D)
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
def softmax_step(scores, peak, total, qk_scale):
    """Weights of a tile of scores, in powers of two, the new peak and total, and the decay of what came before.

    Every row sees a key of every tile, so that the new peak is never -inf.
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1) * qk_scale)
    weights = tl.exp2(tl.fma(scores, qk_scale, -new_peak[:, None]))
    decay = tl.exp2(peak - new_peak)
    return weights, new_peak, total * decay + tl.sum(weights, 1), decay


@triton.jit
def attend(
    acc, peak, total, q, k_pointers, v_pointers, keep, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """One key tile of the online softmax."""
    k = load_tile(k_pointers, keep, HEAD_DIM, BLOCK_D, GUARD)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if GUARD:
        scores = tl.where(keep[None, :], scores, float("-inf"))
    weights, peak, total, decay = softmax_step(scores, peak, total, qk_scale)
    v = load_tile(v_pointers, keep, HEAD_DIM, BLOCK_D, GUARD)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, peak, total


@triton.jit
def natural_lse(peak, total):
    """-inf for a row without a key."""
    return (peak + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN_2


@triton.jit
def place_of(program, tokens, heads, BLOCK_M: tl.constexpr):
    """Sample, head and first query of a tile. Tiles of a head follow each other, to share its keys in L2."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    return program // tiles // heads, program // tiles % heads, program % tiles * BLOCK_M


@triton.jit
def seen_keys(lengths_ptr, sample, tokens, HAS_LENGTHS: tl.constexpr):
    """How many keys a sample sees, never more than there are: nobody waits for a device to check its lengths."""
    length = tokens
    if HAS_LENGTHS:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + sample), 0), tokens)
    return length


@triton.jit
def store_rows(out_ptr, acc, total, sample, token, head, tokens, heads, wanted, HEAD_DIM: tl.constexpr):
    """Rows of a contiguous output `[B, S, H, D]`; 0 for a row without a key."""
    dim = tl.arange(0, acc.shape[1])
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    row = (sample.to(tl.int64) * tokens + token) * heads + head
    pointers = out_ptr + row[:, None] * HEAD_DIM + dim[None, :]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=wanted[:, None] & (dim < HEAD_DIM)[None, :])
