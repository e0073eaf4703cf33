"""The Triton kernels of local attention; `triton.py` says what they do together."""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes and strides change from call to call; left unspecialised, they never cause a second compilation. What matters
# of the strides is given by the constant ALIGNMENT, the unit they are counted in: rows known to start on 16 bytes are
# loaded 16 bytes at a time.
GRID_UNSPECIALISED = [
    *(f"stride_{tensor}{axis}" for tensor in ("q", "k", "v", "pk", "pv", "o") for axis in "bsh"),
    *("heads", "height", "width", "first_row", "rows", "grid_offset", "tokens", "pooled", "squared_reach", "qk_scale"),
]
DENSE_UNSPECIALISED = [
    *(f"stride_{tensor}{axis}" for tensor in "qkv" for axis in "bsh"),
    *("heads", "queries", "tokens", "splits", "split_tokens", "qk_scale"),
]
FAR = tl.constexpr(16384.0)  # more than any distance within a grid


@triton.jit
def _offset(index, stride, ALIGNMENT: tl.constexpr):
    """In elements: tensors may have more than 2 ** 31."""
    return index.to(tl.int64) * stride * ALIGNMENT


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
def _softmax_step(acc, peak, total, scores, v, qk_scale):
    """One key tile of the online softmax, in powers of two. Masked scores are -inf."""
    new_peak = tl.maximum(peak, tl.max(scores, 1) * qk_scale)
    # While every key was masked the peak is -inf; 0 in its place keeps -inf - (-inf) out.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2(tl.fma(scores, qk_scale, -base[:, None]))
    decay = tl.exp2(peak - base)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit
def _attend(
    acc, peak, total, q, token, keep, k_base, v_base, stride_k, stride_v, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    k = _load(k_base, token, stride_k, keep, HEAD_DIM, BLOCK_D, GUARD)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if GUARD:
        scores = tl.where(keep[None, :], scores, float("-inf"))
    v = _load(v_base, token, stride_v, keep, HEAD_DIM, BLOCK_D, GUARD)
    return _softmax_step(acc, peak, total, scores, v, qk_scale)


@triton.jit
def _attend_dense(
    acc, peak, total, q, first, last, gap_at, gap, k_base, v_base, mask_base, stride_k, stride_v, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Keys `[first, last)`; from the key `gap_at` on, `gap` tokens are left out."""
    place = tl.arange(0, BLOCK_N)
    full = first + (last - first) // BLOCK_N * BLOCK_N
    for start in range(first, full, BLOCK_N):
        index = start + place
        token = tl.where(index < gap_at, index, index + gap)
        keep = index < last
        if HAS_MASK:
            keep = tl.load(mask_base + token) != 0
        acc, peak, total = _attend(
            acc, peak, total, q, token, keep, k_base, v_base, stride_k, stride_v, qk_scale, HEAD_DIM, BLOCK_D, HAS_MASK
        )
    for start in range(full, last, BLOCK_N):  # the tail, if any: it alone needs a guard
        index = start + place
        token = tl.where(index < gap_at, index, index + gap)
        keep = index < last
        if HAS_MASK:
            keep = tl.load(mask_base + token, mask=keep, other=0) != 0
        acc, peak, total = _attend(
            acc, peak, total, q, token, keep, k_base, v_base, stride_k, stride_v, qk_scale, HEAD_DIM, BLOCK_D, True
        )
    return acc, peak, total


@triton.jit
def _finish(acc, peak, total):
    """The output, and its natural log-sum-exp; 0 and -inf for a query with no key."""
    lse = (peak + tl.log2(tl.where(total == 0.0, 1.0, total))) * 0.6931471805599453
    return acc / tl.where(total == 0.0, 1.0, total)[:, None], lse


@triton.jit(do_not_specialize=GRID_UNSPECIALISED)
def local_attention_grid_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, mask_ptr, starts_ptr, entries_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_pkb, stride_pks, stride_pkh, stride_pvb, stride_pvs, stride_pvh, stride_ob, stride_os, stride_oh,
    heads, height, width, first_row, rows, grid_offset, tokens, pooled, squared_reach, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE_W: tl.constexpr, KEY_TILE_W: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_POOLED: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """One tile of grid queries of one head. Tiles of a head follow each other, to share its keys in L2."""
    TILE_H: tl.constexpr = BLOCK_M // TILE_W
    KEY_TILE_H: tl.constexpr = BLOCK_N // KEY_TILE_W
    tiles_x = tl.cdiv(width, TILE_W)
    tiles = tl.cdiv(rows, TILE_H) * tiles_x
    program = tl.program_id(0)
    tile = program % tiles
    head = program // tiles % heads
    sample = program // tiles // heads

    m = tl.arange(0, BLOCK_M)
    row = tile // tiles_x * TILE_H + m // TILE_W
    x = tile % tiles_x * TILE_W + m % TILE_W
    q_inside = (row < rows) & (x < width)
    q_token = row * width + x
    q_base = q_ptr + _offset(sample, stride_qb, ALIGNMENT) + _offset(head, stride_qh, ALIGNMENT)
    k_base = k_ptr + _offset(sample, stride_kb, ALIGNMENT) + _offset(head, stride_kh, ALIGNMENT)
    v_base = v_ptr + _offset(sample, stride_vb, ALIGNMENT) + _offset(head, stride_vh, ALIGNMENT)
    mask_base = mask_ptr
    if HAS_MASK:
        mask_base += sample.to(tl.int64) * tokens
    q = _load(q_base, q_token, stride_qs * ALIGNMENT, q_inside, HEAD_DIM, BLOCK_D, True)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    in_grid = height * width
    acc, peak, total = _attend_dense(
        acc, peak, total, q, 0, tokens - in_grid, grid_offset, in_grid, k_base, v_base, mask_base,
        stride_ks * ALIGNMENT, stride_vs * ALIGNMENT, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_MASK,
    )  # fmt: skip
    if HAS_POOLED:
        pk_base = pk_ptr + _offset(sample, stride_pkb, ALIGNMENT) + _offset(head, stride_pkh, ALIGNMENT)
        pv_base = pv_ptr + _offset(sample, stride_pvb, ALIGNMENT) + _offset(head, stride_pvh, ALIGNMENT)
        acc, peak, total = _attend_dense(
            acc, peak, total, q, 0, pooled, pooled, 0, pk_base, pv_base, mask_base,
            stride_pks * ALIGNMENT, stride_pvs * ALIGNMENT, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_N, False,
        )  # fmt: skip

    n = tl.arange(0, BLOCK_N)
    q_y = (row + first_row).to(tl.float32)
    q_x = x.to(tl.float32)
    limit = squared_reach.to(tl.float32)
    for index in range(tl.load(starts_ptr + tile), tl.load(starts_ptr + tile + 1)):
        entry = tl.load(entries_ptr + index)
        k_y = (entry >> 16) * KEY_TILE_H + n // KEY_TILE_W
        k_x = (entry & 0xFFFF) * KEY_TILE_W + n % KEY_TILE_W
        token = grid_offset + k_y * width + k_x
        keep = (k_y < height) & (k_x < width)
        if HAS_MASK:
            keep = tl.load(mask_base + token, mask=keep, other=0) != 0
        k = _load(k_base, token, stride_ks * ALIGNMENT, keep, HEAD_DIM, BLOCK_D, True)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        # What is not kept lies far off. These are small whole numbers, exact in fp32.
        dy = q_y[:, None] - tl.where(keep, k_y.to(tl.float32), -FAR)[None, :]
        dx = q_x[:, None] - k_x.to(tl.float32)[None, :]
        scores = tl.where(tl.fma(dy, dy, dx * dx) < limit, scores, float("-inf"))
        v = _load(v_base, token, stride_vs * ALIGNMENT, keep, HEAD_DIM, BLOCK_D, True)
        acc, peak, total = _softmax_step(acc, peak, total, scores, v, qk_scale)

    out, lse = _finish(acc, peak, total)
    dim = tl.arange(0, BLOCK_D)
    out_base = out_ptr + _offset(sample, stride_ob, ALIGNMENT) + _offset(head, stride_oh, ALIGNMENT)
    out_pointers = out_base + _offset(q_token, stride_os, ALIGNMENT)[:, None] + dim[None, :]
    out_wanted = q_inside[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(out_pointers, out.to(out_ptr.dtype.element_ty), mask=out_wanted)
    lse_base = lse_ptr + (sample * heads + head).to(tl.int64) * rows * width
    tl.store(lse_base + q_token, lse, mask=q_inside)


@triton.jit(do_not_specialize=DENSE_UNSPECIALISED)
def local_attention_dense_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    heads, queries, tokens, splits, split_tokens, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """One tile of dense queries of one head over one part of the keys. Outputs are `[splits, B, Q, H, D]` in fp32."""
    tiles = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    tile = program % tiles
    head = program // tiles % heads
    split = program // tiles // heads % splits
    sample = program // tiles // heads // splits
    samples = tl.num_programs(0) // tiles // heads // splits

    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = token < queries
    q_base = q_ptr + _offset(sample, stride_qb, ALIGNMENT) + _offset(head, stride_qh, ALIGNMENT)
    k_base = k_ptr + _offset(sample, stride_kb, ALIGNMENT) + _offset(head, stride_kh, ALIGNMENT)
    v_base = v_ptr + _offset(sample, stride_vb, ALIGNMENT) + _offset(head, stride_vh, ALIGNMENT)
    mask_base = mask_ptr
    if HAS_MASK:
        mask_base += sample.to(tl.int64) * tokens
    q = _load(q_base, token, stride_qs * ALIGNMENT, inside, HEAD_DIM, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    first = split * split_tokens
    last = tl.minimum(first + split_tokens, tokens)
    acc, peak, total = _attend_dense(
        acc, peak, total, q, first, last, tokens, 0, k_base, v_base, mask_base,
        stride_ks * ALIGNMENT, stride_vs * ALIGNMENT, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_MASK,
    )  # fmt: skip
    out, lse = _finish(acc, peak, total)
    part = split * samples + sample
    dim = tl.arange(0, BLOCK_D)
    rows = (part.to(tl.int64) * queries + token) * heads + head
    tl.store(out_ptr + rows[:, None] * HEAD_DIM + dim[None, :], out, mask=inside[:, None] & (dim < HEAD_DIM)[None, :])
    tl.store(lse_ptr + (part * heads + head).to(tl.int64) * queries + token, lse, mask=inside)
