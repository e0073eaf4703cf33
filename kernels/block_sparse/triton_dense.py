"""The Triton kernels over all keys with an online softmax: dense attention, and its log-sum-exp alone."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    UNSPECIALISED,
    attend,
    load_tile,
    natural_lse,
    offset,
    place_of,
    seen_keys,
    softmax_step,
    store_rows,
    tile_pointers,
)

# How far the log-sum-exp of a row may be from its reference for the output of one pass to stand: above, weights may
# have been cut off at e ** 60, which rounding can put below 60; below, those held up at e ** -80 could count among
# 2 ** 26 keys.
LOWEST_SHIFT = tl.constexpr(-40.0)
HIGHEST_SHIFT = tl.constexpr(59.0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def dense_attention_kernel(
    q_ptr, k_ptr, v_ptr, reference_ptr, lengths_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    heads, tokens, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    REPAIR: tl.constexpr, HAS_LENGTHS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head over all keys.

    To repair, it leaves what lies in `out` and `lse` unless the reference was too far off for a row of the tile.
    """
    sample, head, first_query = place_of(tl.program_id(0), tokens, heads, BLOCK_M)
    token = first_query + tl.arange(0, BLOCK_M)
    wanted = token < tokens
    row = (sample * heads + head).to(tl.int64) * tokens + token
    length = seen_keys(lengths_ptr, sample, tokens, HAS_LENGTHS)
    if REPAIR:
        shift = tl.load(lse_ptr + row, mask=wanted, other=0.0) - tl.load(reference_ptr + row, mask=wanted, other=0.0)
        # Written so that NaN is too far off.
        broken = tl.max(tl.where((shift > LOWEST_SHIFT) & (shift < HIGHEST_SHIFT), 0, 1)) > 0
        length = tl.where(broken, length, 0)
        wanted = token < tl.where(broken, tokens, 0)

    q_base = q_ptr + offset(sample, stride_qb, ALIGNMENT) + offset(head, stride_qh, ALIGNMENT)
    k_base = k_ptr + offset(sample, stride_kb, ALIGNMENT) + offset(head, stride_kh, ALIGNMENT)
    v_base = v_ptr + offset(sample, stride_vb, ALIGNMENT) + offset(head, stride_vh, ALIGNMENT)
    q_tile = tile_pointers(q_base, stride_qs, BLOCK_M, BLOCK_D, ALIGNMENT) + offset(first_query, stride_qs, ALIGNMENT)
    k_tile = tile_pointers(k_base, stride_ks, BLOCK_N, BLOCK_D, ALIGNMENT)
    v_tile = tile_pointers(v_base, stride_vs, BLOCK_N, BLOCK_D, ALIGNMENT)
    q = load_tile(q_tile, wanted, HEAD_DIM, BLOCK_D, True)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    place = tl.arange(0, BLOCK_N)
    full = length // BLOCK_N * BLOCK_N
    for first in range(0, full, BLOCK_N):
        acc, peak, total = attend(
            acc, peak, total, q, k_tile + offset(first, stride_ks, ALIGNMENT),
            v_tile + offset(first, stride_vs, ALIGNMENT), place < BLOCK_N, qk_scale, HEAD_DIM, BLOCK_D, False,
        )  # fmt: skip
    for first in tl.range(full, length, BLOCK_N, num_stages=1):  # the tail, if any: it alone needs a guard
        acc, peak, total = attend(
            acc, peak, total, q, k_tile + offset(first, stride_ks, ALIGNMENT),
            v_tile + offset(first, stride_vs, ALIGNMENT), first + place < length, qk_scale, HEAD_DIM, BLOCK_D, True,
        )  # fmt: skip

    store_rows(out_ptr, acc, total, sample, token, head, tokens, heads, wanted, HEAD_DIM)
    tl.store(lse_ptr + row, natural_lse(peak, total), mask=wanted)


@triton.jit(do_not_specialize=UNSPECIALISED)
def reference_kernel(
    q_ptr, k_ptr, given_ptr, lengths_ptr, reference_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    heads, tokens, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_GIVEN: tl.constexpr, HAS_LENGTHS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of one tile of queries; where one that is finite is given, that one. Without values."""
    sample, head, first_query = place_of(tl.program_id(0), tokens, heads, BLOCK_M)
    token = first_query + tl.arange(0, BLOCK_M)
    inside = token < tokens
    row = (sample * heads + head).to(tl.int64) * tokens + token
    length = seen_keys(lengths_ptr, sample, tokens, HAS_LENGTHS)
    given = tl.full([BLOCK_M], float("nan"), tl.float32)
    if HAS_GIVEN:
        given = tl.load(given_ptr + row, mask=inside, other=0.0)
        missing = tl.max(tl.where(tl.abs(given) < float("inf"), 0, 1)) > 0
        length = tl.where(missing, length, 0)

    q_base = q_ptr + offset(sample, stride_qb, ALIGNMENT) + offset(head, stride_qh, ALIGNMENT)
    k_base = k_ptr + offset(sample, stride_kb, ALIGNMENT) + offset(head, stride_kh, ALIGNMENT)
    q_tile = tile_pointers(q_base, stride_qs, BLOCK_M, BLOCK_D, ALIGNMENT) + offset(first_query, stride_qs, ALIGNMENT)
    k_tile = tile_pointers(k_base, stride_ks, BLOCK_N, BLOCK_D, ALIGNMENT)
    q = load_tile(q_tile, inside, HEAD_DIM, BLOCK_D, True)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    place = tl.arange(0, BLOCK_N)
    full = length // BLOCK_N * BLOCK_N
    for first in range(0, full, BLOCK_N):
        k = load_tile(k_tile + offset(first, stride_ks, ALIGNMENT), place < BLOCK_N, HEAD_DIM, BLOCK_D, False)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        _, peak, total, _ = softmax_step(scores, peak, total, qk_scale)
    for first in tl.range(full, length, BLOCK_N, num_stages=1):
        keep = first + place < length
        k = load_tile(k_tile + offset(first, stride_ks, ALIGNMENT), keep, HEAD_DIM, BLOCK_D, True)
        scores = tl.where(keep[None, :], tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))
        _, peak, total, _ = softmax_step(scores, peak, total, qk_scale)

    reference = tl.where(tl.abs(given) < float("inf"), given, natural_lse(peak, total))
    tl.store(reference_ptr + row, reference, mask=inside)
