"""The Triton kernel of the search: attention weights against a fixed reference, summed over tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import LN_2, LOG2_E, UNSPECIALISED, load_tile, offset, place_of, seen_keys, store_rows, tile_pointers

# As in reference.py, in powers of two.
LOWEST = tl.constexpr(-80.0 * 1.4426950408889634)
HIGHEST = tl.constexpr(60.0 * 1.4426950408889634)


@triton.jit
def _weights(q, k, reference, qk_scale):
    """exp(score - reference), with a clamp that lets NaN through."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    exponent = tl.fma(scores, qk_scale, -reference[:, None])
    return tl.exp2(tl.clamp(exponent, LOWEST, HIGHEST, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _accumulate(acc, rounded, weights, v):
    """The output, and its denominator: the sum of the weights as they are multiplied, which is nearer the truth."""
    weights = weights.to(v.dtype)
    rounded += tl.sum(weights.to(tl.float32), 1)
    return tl.dot(weights, v, acc, input_precision="ieee"), rounded


@triton.jit
def _store_scores(pointers, sums, counts, wanted, SCORE_ROWS: tl.constexpr):
    """The scores of one tile: `SCORE_ROWS` blocks of queries and one of keys."""
    per_block = tl.reshape(tl.where(counts, sums, 0.0), [SCORE_ROWS, sums.shape[0] // SCORE_ROWS])
    tl.store(pointers, tl.sum(per_block, 1), mask=wanted)


@triton.jit(do_not_specialize=UNSPECIALISED)
def block_scores_kernel(
    q_ptr, k_ptr, v_ptr, reference_ptr, lengths_ptr, scores_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    heads, tokens, score_rows, key_tiles, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SCORE_ROWS: tl.constexpr, HAS_VALUE: tl.constexpr, HAS_LENGTHS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: its rows of scores, its log-sum-exp, and with values its output.

    No maximum is looked for and nothing is rescaled: the weights of all tiles are relative to the same reference.
    Scores of tiles past the seen keys are left as they are.
    """
    sample, head, first_query = place_of(tl.program_id(0), tokens, heads, BLOCK_M)
    token = first_query + tl.arange(0, BLOCK_M)
    inside = token < tokens
    row = (sample * heads + head).to(tl.int64) * tokens + token
    length = seen_keys(lengths_ptr, sample, tokens, HAS_LENGTHS)
    counts = token < length  # queries past the seen keys are padding, which must not steer the selection

    q_base = q_ptr + offset(sample, stride_qb, ALIGNMENT) + offset(head, stride_qh, ALIGNMENT)
    k_base = k_ptr + offset(sample, stride_kb, ALIGNMENT) + offset(head, stride_kh, ALIGNMENT)
    q_tile = tile_pointers(q_base, stride_qs, BLOCK_M, BLOCK_D, ALIGNMENT) + offset(first_query, stride_qs, ALIGNMENT)
    k_tile = tile_pointers(k_base, stride_ks, BLOCK_N, BLOCK_D, ALIGNMENT)
    q = load_tile(q_tile, inside, HEAD_DIM, BLOCK_D, True)
    reference = tl.load(reference_ptr + row, mask=inside, other=0.0) * LOG2_E
    # Not finite only where there is no key, or NaN in the row itself.
    reference = tl.where(tl.abs(reference) < float("inf"), reference, 0.0)
    score_row = first_query // (BLOCK_M // SCORE_ROWS) + tl.arange(0, SCORE_ROWS)
    score_wanted = score_row < score_rows
    score_pointers = scores_ptr + ((sample * heads + head).to(tl.int64) * score_rows + score_row) * key_tiles

    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_VALUE:
        v_base = v_ptr + offset(sample, stride_vb, ALIGNMENT) + offset(head, stride_vh, ALIGNMENT)
        v_tile = tile_pointers(v_base, stride_vs, BLOCK_N, BLOCK_D, ALIGNMENT)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        rounded = tl.zeros([BLOCK_M], tl.float32)
    place = tl.arange(0, BLOCK_N)
    full = length // BLOCK_N
    for tile in range(0, full):
        first = tile * BLOCK_N
        k = load_tile(k_tile + offset(first, stride_ks, ALIGNMENT), place < BLOCK_N, HEAD_DIM, BLOCK_D, False)
        weights = _weights(q, k, reference, qk_scale)
        sums = tl.sum(weights, 1)
        total += sums
        _store_scores(score_pointers + tile, sums, counts, score_wanted, SCORE_ROWS)
        if HAS_VALUE:
            v = load_tile(v_tile + offset(first, stride_vs, ALIGNMENT), place < BLOCK_N, HEAD_DIM, BLOCK_D, False)
            acc, rounded = _accumulate(acc, rounded, weights, v)
    for tile in tl.range(full, tl.cdiv(length, BLOCK_N), num_stages=1):  # the tail, if any: it alone needs a guard
        first = tile * BLOCK_N
        keep = first + place < length
        k = load_tile(k_tile + offset(first, stride_ks, ALIGNMENT), keep, HEAD_DIM, BLOCK_D, True)
        weights = tl.where(keep[None, :], _weights(q, k, reference, qk_scale), 0.0)
        sums = tl.sum(weights, 1)
        total += sums
        _store_scores(score_pointers + tile, sums, counts, score_wanted, SCORE_ROWS)
        if HAS_VALUE:
            v = load_tile(v_tile + offset(first, stride_vs, ALIGNMENT), keep, HEAD_DIM, BLOCK_D, True)
            acc, rounded = _accumulate(acc, rounded, weights, v)

    tl.store(lse_ptr + row, (reference + tl.log2(total)) * LN_2, mask=inside)
    if HAS_VALUE:
        store_rows(out_ptr, acc, rounded, sample, token, head, tokens, heads, inside, HEAD_DIM)
