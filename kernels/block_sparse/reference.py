"""The definition of the four operations, with all scores in memory, in fp32 (fp64 stays fp64)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .mask import BlockMask

# Above, sums of fp32 would overflow; below, a term would vanish.
LOWEST, HIGHEST = -80.0, 60.0


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, *, kv_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The output and its log-sum-exp."""
    batch, tokens, heads, _ = query.shape
    seen = seen_keys(kv_lengths, key)[:, None, None].expand(batch, heads, 1, tokens)
    return _attend(query, key, value, seen, tokens, scale)


def block_scores(
    query: Tensor, key: Tensor, lse: Tensor | None, *, block: tuple[int, int], kv_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The scores and the present log-sum-exp."""
    seen = seen_keys(kv_lengths, key)
    logits = _logits(query, key, seen[:, None, None], scale)
    present = logits.logsumexp(-1)
    known = present if lse is None else torch.where(lse.isfinite(), lse, present)
    known = known.masked_fill(known.isneginf(), 0)  # a row without a key, all of whose weights are 0
    weights = (logits - known[..., None]).clamp(LOWEST, HIGHEST).exp().masked_fill(logits.isneginf(), 0)
    scores = tile_sums(weights.masked_fill(~seen[:, None, :, None], 0), block)
    return scores, known + weights.sum(-1).log()


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
    scores, _ = block_scores(query, key, lse_ref, block=block, kv_lengths=kv_lengths, scale=scale)
    return *dense_attention(query, key, value, kv_lengths=kv_lengths, scale=scale), scores


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, kv_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The output and its log-sum-exp."""
    kept = mask.to_dense().repeat_interleave(mask.block[1], -1)[..., : key.shape[1]]
    return _attend(query, key, value, kept & seen_keys(kv_lengths, key)[:, None, None], mask.block[0], scale)


def seen_keys(kv_lengths: Tensor | None, key: Tensor) -> Tensor:
    """bool `[B, S]`: the key may be attended to."""
    batch, tokens = key.shape[:2]
    if kv_lengths is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=key.device)
    return torch.arange(tokens, device=key.device) < kv_lengths.to(key.device)[:, None]


def tile_sums(x: Tensor, block: tuple[int, int]) -> Tensor:
    """`[..., S, S]` summed over tiles of `block`; the last ones may be smaller."""
    rows, columns = x.shape[-2:]
    padded = torch.nn.functional.pad(x, (0, -columns % block[1], 0, -rows % block[0]))
    return padded.unflatten(-1, (-1, block[1])).sum(-1).unflatten(-2, (-1, block[0])).sum(-2)


def _logits(query: Tensor, key: Tensor, seen: Tensor, scale: float) -> Tensor:
    """`[B, H, S, S]`, -inf where a key is not seen."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return (torch.einsum("bqhd,bkhd->bhqk", query.to(dtype), key.to(dtype)) * scale).masked_fill(~seen, float("-inf"))


def _attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, rows: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of each block of `rows` queries to the keys that `seen`, bool `[B, H, blocks, S]`, leaves it."""
    batch, tokens, heads, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, heads, tokens), dtype=dtype)
    for b, h, start in itertools.product(range(batch), range(heads), range(0, tokens, rows)):
        own, keys = slice(start, start + rows), seen[b, h, start // rows]
        logits = query[b, own, h].to(dtype) @ key[b, keys, h].to(dtype).mT * scale
        # Without a key this is a sum of nothing, 0, and the logarithm of 0, -inf.
        out[b, own, h] = (logits.softmax(-1) @ value[b, keys, h].to(dtype)).to(query.dtype)
        lse[b, h, own] = logits.logsumexp(-1)
    return out, lse
