"""Block-sparse attention in PyTorch: CPU, MPS and any GPU.

Dense attention is PyTorch's own, through the kernels that return the log-sum-exp. A search goes over the pairs once, in
tiles (`tiles.py`). Sparse attention copies the kept blocks of keys of a few rows side by side, rows of equally many
keys as one batch, and attends to these without any mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import library, tiles
from .mask import BlockMask, unpack
from .tiles import accumulator

# Bytes of gathered keys and values at once, for each thread of a CPU: what is gathered is read back from its cache.
CPU_GATHERED, DEVICE_GATHERED = 2**21, 2**28


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, *, kv_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The output and its log-sum-exp."""
    if query.device.type not in ("cpu", "cuda"):
        out, lse, _ = tiles.attend(query, key, value, kv_lengths=kv_lengths, scale=scale)
        return out, lse
    return library.dense_attention(query, key, value, kv_lengths, scale)


def block_scores(
    query: Tensor, key: Tensor, lse: Tensor | None, *, block: tuple[int, int], kv_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The scores and the present log-sum-exp."""
    _, present, scores = tiles.attend(query, key, None, kv_lengths=kv_lengths, scale=scale, block=block, reference=lse)
    return scores, present


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
    """The output and its log-sum-exp, and the scores."""
    return tiles.attend(query, key, value, kv_lengths=kv_lengths, scale=scale, block=block, reference=lse_ref)


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, kv_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The output and its log-sum-exp. The lists of blocks are made on the host, which waits for an accelerator."""
    batch, tokens, heads, _ = query.shape
    dtype = accumulator(query)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, heads, tokens), dtype=dtype)
    lengths = [tokens] * batch if kv_lengths is None else kv_lengths.clamp(0, tokens).tolist()
    mask = mask.to("cpu")
    for sample, length in enumerate(lengths):
        kept = unpack(mask.bits[sample], -(-length // mask.block[1]))
        for head in range(heads):
            q, k, v = query[sample, :, head], key[sample, :length, head], value[sample, :length, head]
            out[sample, :, head], lse[sample, head] = _attend_to_kept(q, k, v, kept[head], mask.block, scale)
    return out, lse


def _attend_to_kept(
    query: Tensor, key: Tensor, value: Tensor, kept: Tensor, block: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """One head, queries `[S, D]` and keys `[K, D]`, under bool `[nQ, nK]` on the CPU, both axes in blocks."""
    queries, keys, values = (_in_blocks(x, size) for x, size in ((query, block[0]), (key, block[1]), (value, block[1])))
    out, lse = torch.zeros_like(queries), queries.new_full(queries.shape[:2], float("-inf"))
    counts = kept.sum(-1)
    starts = counts.cumsum(0) - counts
    columns = kept.nonzero()[:, 1]
    # The last block, the only one that may be shorter, is the last of its row: cut off, it needs no mask.
    missing = -len(key) % block[1]
    lengths = counts * block[1] - kept[:, -1:].sum(-1) * missing
    for length in lengths[lengths > 0].unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        count = -(-length // block[1])
        lists = columns[starts[rows, None] + torch.arange(count)].to(query.device)
        rows = rows.to(query.device)
        if length == len(key):  # nothing to gather
            everything = (x.flatten(0, 1)[None, :length, None] for x in (keys, values))
            of_rows = queries[rows].flatten(0, 1)[None, :, None]
            attended, total = dense_attention(of_rows, *everything, kv_lengths=None, scale=scale)
            out[rows], lse[rows] = attended.view(len(rows), *out.shape[1:]), total.view(len(rows), block[0])
            continue
        step = _rows_at_once(keys, count)
        for some, chosen in zip(rows.split(step), lists.split(step), strict=True):
            gathered = (
                x.index_select(0, chosen.flatten()).view(len(some), -1, key.shape[1])[:, :length]
                for x in (keys, values)
            )
            attended, total = attend(queries.index_select(0, some), *gathered, scale=scale)
            out.index_copy_(0, some, attended)
            lse.index_copy_(0, some, total)
    return out.flatten(0, 1)[: len(query)], lse.flatten()[: len(query)]


def _in_blocks(x: Tensor, size: int) -> Tensor:
    """`[n, D]` as `[ceil(n / size), size, D]`, contiguous, in the dtype of sums and with zeros at the end."""
    blocks = x.new_zeros((-(-len(x) // size), size, x.shape[1]), dtype=accumulator(x))
    blocks.view(-1, x.shape[1])[: len(x)] = x
    return blocks


def _rows_at_once(keys: Tensor, count: int) -> int:
    """Rows that gather `count` blocks of keys and of values each, and stay within memory that is read fast."""
    most = CPU_GATHERED * torch.get_num_threads() if keys.device.type == "cpu" else DEVICE_GATHERED
    return max(1, most // (2 * count * keys[0].nbytes))


def attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of `[R, Q, D]` to `[R, K, D]`, R times, and its log-sum-exp `[R, Q]`."""
    if query.device.type == "cpu":
        q, k, v = (x[:, None] for x in (query, key, value))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        return out[:, 0], lse[:, 0]
    return attend_by_products(query, key, value, scale=scale)


def attend_by_products(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """`attend` by products of matrices, with all scores in memory."""
    scores = torch.bmm(query, key.mT).mul_(scale)
    lse = scores.logsumexp(-1)
    return torch.bmm(scores.sub_(lse[..., None]).exp_(), value), lse
