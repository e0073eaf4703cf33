"""Block-sparse attention and its search in Triton.

A program attends for one tile of queries. The kernel over a mask (`triton_sparse.py`) walks a list of kept key blocks,
so that rows and heads of any density take the time of what they keep; rows with the longest lists come first. The
search (`triton_scores.py`) weighs keys against a log-sum-exp that is known beforehand, which takes no running maximum
and, without values, half the work of attention. What it cannot know, rows without a reference before and rows far off
it after, is for the kernels of `triton_dense.py`: they look at every tile and go on only where it is needed, so that
nothing waits for the device. Rows are found by pointers, so the tensors are read where they lie.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from .. import dispatch
from ..targets import target_of
from .mask import BlockMask
from .triton_configs import (
    ATTENTION,
    CHUNK,
    FUSED,
    MAX_ROWS,
    SEARCH,
    configuration,
    score_constants,
    sparse_constants,
)
from .triton_configs import shipped as shipped  # for kernels/aot.py
from .triton_dense import dense_attention_kernel, reference_kernel
from .triton_scores import block_scores_kernel
from .triton_sparse import block_index_kernel, block_sparse_kernel

# Rows of a mask are taken by their share of kept blocks, in steps of an eighth, and within a step as they lie: a finer
# order would scatter the rows of masks of uneven rows, and neighbouring rows share keys in L2.
DENSITIES = 8


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, *, kv_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and its log-sum-exp."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = _like_lse(query)
    _dense(query, key, value, kv_lengths, scale, None, out, lse)
    return out, lse


def block_scores(
    query: Tensor, key: Tensor, lse: Tensor | None, *, block: tuple[int, int], kv_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The scores, and the present log-sum-exp."""
    reference = _reference(query, key, lse, kv_lengths, scale)
    return _search(query, key, None, reference, block, kv_lengths, scale)[1:]


def dense_attention_with_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse_ref: Tensor,
    *,
    block: tuple[int, int],
    kv_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, its log-sum-exp and the scores: in one pass, and for fp16, which cannot hold the weights, in two."""
    if query.dtype == torch.float16:
        call = {"query": query, "key": key, "value": value, "kv_lengths": kv_lengths, "scale": scale}
        scores, _ = block_scores(query, key, lse_ref, block=block, kv_lengths=kv_lengths, scale=scale)
        return *dispatch.run("dense_attention", call), scores
    reference = _reference(query, key, lse_ref, kv_lengths, scale)
    out, scores, lse = _search(query, key, value, reference, block, kv_lengths, scale)
    _dense(query, key, value, kv_lengths, scale, reference, out, lse)
    return out, lse, scores


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, kv_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and its log-sum-exp."""
    query, key, value = (_rows_in_place(x) for x in (query, key, value))
    tokens, heads, head_dim = query.shape[1:]
    config, fixed = configuration(ATTENTION, target_of(query.device), query.element_size(), head_dim, mask.block)
    row_tiles = mask.block[0] // config.block_m
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = _like_lse(query)
    blocks, starts = block_index(mask)
    counts = mask.counts.flatten()
    order = (counts * DENSITIES // mask.key_blocks).argsort(descending=True, stable=True).int()
    strides, alignment = _counted_strides(query, key, value)
    with torch.cuda.device_of(query):
        block_sparse_kernel[(len(order) * row_tiles,)](
            query, key, value, blocks, starts, counts, order, _on_device(kv_lengths, query), out, lse,
            *strides, heads, tokens, mask.shape[2], scale * math.log2(math.e),
            **fixed, **sparse_constants(config, mask.block), HAS_LENGTHS=kv_lengths is not None, ALIGNMENT=alignment,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, lse


def block_index(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """As `BlockMask.index`; what is left of the capacity may hold anything."""
    counts = mask.counts.flatten()
    starts = counts.cumsum(0, dtype=torch.int32) - counts
    blocks = counts.new_empty(mask.capacity)
    with torch.cuda.device_of(counts):
        block_index_kernel[(len(counts),)](
            mask.bits.contiguous(), starts, blocks, mask.bits.shape[-1], mask.key_blocks, CHUNK=CHUNK
        )
    return blocks, starts


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_lengths: Tensor | None,
    scale: float,
    reference: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fills `out` and `lse`; with a reference, only tiles of queries that were too far from it."""
    query, key, value = (_rows_in_place(x) for x in (query, key, value))
    batch, tokens, heads, head_dim = query.shape
    config, fixed = configuration(ATTENTION, target_of(query.device), query.element_size(), head_dim)
    strides, alignment = _counted_strides(query, key, value)
    programs = triton.cdiv(tokens, config.block_m) * heads * batch
    with torch.cuda.device_of(query):
        dense_attention_kernel[(programs,)](
            query, key, value, reference, _on_device(kv_lengths, query), out, lse,
            *strides, heads, tokens, scale * math.log2(math.e),
            **fixed, REPAIR=reference is not None, HAS_LENGTHS=kv_lengths is not None, ALIGNMENT=alignment,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


def _reference(query: Tensor, key: Tensor, lse: Tensor | None, kv_lengths: Tensor | None, scale: float) -> Tensor:
    """`lse`, and the present log-sum-exp for rows where it is not finite; for all rows where there is none."""
    query, key = _rows_in_place(query), _rows_in_place(key)
    batch, tokens, heads, head_dim = query.shape
    config, fixed = configuration(ATTENTION, target_of(query.device), query.element_size(), head_dim)
    strides, alignment = _counted_strides(query, key)
    reference = _like_lse(query)
    programs = triton.cdiv(tokens, config.block_m) * heads * batch
    with torch.cuda.device_of(query):
        reference_kernel[(programs,)](
            query, key, None if lse is None else lse.contiguous(), _on_device(kv_lengths, query), reference,
            *strides, heads, tokens, scale * math.log2(math.e),
            **fixed, HAS_GIVEN=lse is not None, HAS_LENGTHS=kv_lengths is not None, ALIGNMENT=alignment,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return reference


def _search(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    reference: Tensor,
    block: tuple[int, int],
    kv_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, empty without values, the scores and the present log-sum-exp."""
    query, key = _rows_in_place(query), _rows_in_place(key)
    value = None if value is None else _rows_in_place(value)
    batch, tokens, heads, head_dim = query.shape
    kind = SEARCH if value is None else FUSED
    config, fixed = configuration(kind, target_of(query.device), query.element_size(), head_dim, (MAX_ROWS, block[1]))
    split = score_constants(config, block)
    # Without values those of the keys stand in for their strides, which are not used.
    strides, alignment = _counted_strides(query, key, key if value is None else value)
    out = query.new_empty(0 if value is None else query.shape)
    lse = _like_lse(query)
    rows = triton.cdiv(tokens, config.block_m // split["SCORE_ROWS"])
    columns = triton.cdiv(tokens, config.block_n)
    scores = query.new_zeros((batch, heads, rows, columns), dtype=torch.float32)
    programs = triton.cdiv(tokens, config.block_m) * heads * batch
    with torch.cuda.device_of(query):
        block_scores_kernel[(programs,)](
            query, key, value, reference, _on_device(kv_lengths, query), scores, out, lse,
            *strides, heads, tokens, rows, columns, scale * math.log2(math.e),
            **fixed, **split, HAS_VALUE=value is not None, HAS_LENGTHS=kv_lengths is not None, ALIGNMENT=alignment,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, _summed(scores, max(1, block[0] // config.block_m), block[1] // config.block_n), lse


def _summed(scores: Tensor, rows: int, columns: int) -> Tensor:
    """Scores of blocks from those of tiles, where a block is more than one."""
    if rows == columns == 1:
        return scores
    padded = torch.nn.functional.pad(scores, (0, -scores.shape[-1] % columns, 0, -scores.shape[-2] % rows))
    return padded.unflatten(-1, (-1, columns)).sum(-1).unflatten(-2, (-1, rows)).sum(-2)


def _like_lse(query: Tensor) -> Tensor:
    batch, tokens, heads, _ = query.shape
    return query.new_empty((batch, heads, tokens), dtype=torch.float32)


def _on_device(kv_lengths: Tensor | None, query: Tensor) -> Tensor | None:
    return None if kv_lengths is None else kv_lengths.to(query.device, torch.int32, non_blocking=True)


def _rows_in_place(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _counted_strides(*tensors: Tensor) -> tuple[list[int], int]:
    """The strides of batch, tokens and heads in units of the alignment, and the alignment in elements."""
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    elements = 16 // tensors[0].element_size()
    alignment = elements if all(stride % elements == 0 for stride in strides) else 1
    return [stride // alignment for stride in strides], alignment
