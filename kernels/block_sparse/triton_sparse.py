"""The Triton kernels over a mask: its bits as lists of kept blocks, and the attention over these."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import UNSPECIALISED, attend, load_tile, natural_lse, offset, seen_keys, store_rows, tile_pointers


@triton.jit(do_not_specialize=UNSPECIALISED)
def block_index_kernel(bits_ptr, starts_ptr, blocks_ptr, row_bytes, key_blocks, CHUNK: tl.constexpr):
    """The kept blocks of one row of a mask, ascending, written from `starts` of the row on."""
    row = tl.program_id(0)
    bytes_of_row = bits_ptr + row.to(tl.int64) * row_bytes
    at = tl.load(starts_ptr + row)
    for first in range(0, key_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        byte = tl.load(bytes_of_row + block // 8, mask=block < key_blocks, other=0).to(tl.int32)
        kept = (byte >> (block % 8)) & 1
        tl.store(blocks_ptr + at + tl.cumsum(kept, 0) - 1, block, mask=kept != 0)
        at += tl.sum(kept, 0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def block_sparse_kernel(
    q_ptr, k_ptr, v_ptr, blocks_ptr, starts_ptr, counts_ptr, order_ptr, lengths_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    heads, tokens, query_blocks, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROW_TILES: tl.constexpr, KEY_TILES: tl.constexpr, HAS_LENGTHS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head, over the key blocks of its row of the mask.

    A block of queries is `ROW_TILES` tiles, a block of keys `KEY_TILES`. Rows of the mask come in the order given.
    """
    program = tl.program_id(0)
    row = tl.load(order_ptr + program // ROW_TILES)
    head = row // query_blocks % heads
    sample = row // query_blocks // heads
    first_query = (row % query_blocks * ROW_TILES + program % ROW_TILES) * BLOCK_M
    token = first_query + tl.arange(0, BLOCK_M)
    inside = token < tokens

    q_base = q_ptr + offset(sample, stride_qb, ALIGNMENT) + offset(head, stride_qh, ALIGNMENT)
    k_base = k_ptr + offset(sample, stride_kb, ALIGNMENT) + offset(head, stride_kh, ALIGNMENT)
    v_base = v_ptr + offset(sample, stride_vb, ALIGNMENT) + offset(head, stride_vh, ALIGNMENT)
    q_tile = tile_pointers(q_base, stride_qs, BLOCK_M, BLOCK_D, ALIGNMENT) + offset(first_query, stride_qs, ALIGNMENT)
    k_tile = tile_pointers(k_base, stride_ks, BLOCK_N, BLOCK_D, ALIGNMENT)
    v_tile = tile_pointers(v_base, stride_vs, BLOCK_N, BLOCK_D, ALIGNMENT)
    q = load_tile(q_tile, inside, HEAD_DIM, BLOCK_D, True)

    # The list ascends. Blocks that start past the seen keys are cut off its end; then at most the last one is partial.
    BLOCK: tl.constexpr = BLOCK_N * KEY_TILES
    length = seen_keys(lengths_ptr, sample, tokens, HAS_LENGTHS)
    row_blocks = blocks_ptr + tl.load(starts_ptr + row)
    count = tl.load(counts_ptr + row)
    last = tl.load(row_blocks + count - 1, mask=count > 0, other=-1)
    while last * BLOCK >= length:
        count -= 1
        last = tl.load(row_blocks + count - 1, mask=count > 0, other=-1)
    partial = (last + 1) * BLOCK > length
    full = tl.where(partial, count - 1, count)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    place = tl.arange(0, BLOCK_N)
    # The list is read one step ahead: a load whose address comes from a load of the same step cannot start early.
    block = tl.load(row_blocks, mask=full > 0, other=0)
    for index in range(0, full * KEY_TILES):
        first = block * BLOCK + index % KEY_TILES * BLOCK_N
        acc, peak, total = attend(
            acc, peak, total, q, k_tile + offset(first, stride_ks, ALIGNMENT),
            v_tile + offset(first, stride_vs, ALIGNMENT), place < BLOCK_N, qk_scale, HEAD_DIM, BLOCK_D, False,
        )  # fmt: skip
        following = (index + 1) // KEY_TILES
        block = tl.load(row_blocks + following, mask=following < full, other=0)
    for first in tl.range(tl.where(partial, last * BLOCK, length), length, BLOCK_N, num_stages=1):
        acc, peak, total = attend(
            acc, peak, total, q, k_tile + offset(first, stride_ks, ALIGNMENT),
            v_tile + offset(first, stride_vs, ALIGNMENT), first + place < length, qk_scale, HEAD_DIM, BLOCK_D, True,
        )  # fmt: skip

    store_rows(out_ptr, acc, total, sample, token, head, tokens, heads, inside, HEAD_DIM)
    lse_row = lse_ptr + (sample * heads + head).to(tl.int64) * tokens
    tl.store(lse_row + token, natural_lse(peak, total), mask=inside)
