"""Attention over all pairs of tokens in tiles: the output, its log-sum-exp and the scores of blocks in one pass.

A tile is weighted relative to the largest score that its rows have met so far, as in flash attention. What each row of
it sums to is kept for every block of keys, and brought to the log-sum-exp of the row at the end, when that is known.
So nothing depends on a reference: it only sets how much a row counts in the scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from .reference import HIGHEST, LOWEST

# Queries and keys of a tile. On a CPU its scores are to stay in cache, and elsewhere a tile costs launches, so that
# as many heads are taken together as memory allows.
CPU_TILE, DEVICE_TILE = (1024, 512), (1024, 8192)
DEVICE_SCORES = 2**26
LOG2_E = math.log2(math.e)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    *,
    kv_lengths: Tensor | None,
    scale: float,
    block: tuple[int, int] | None = None,
    reference: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Attention of `[B, S, H, D]`.

    Args:
        query, key, value, kv_lengths, scale: as in `kernels.dense_attention`; without values there is no output.
        block: (queries, keys) of the scores; None for no scores.
        reference: the log-sum-exp that the scores are relative to; None for the present one.

    Returns:
        The output `[B, S, H, D]` in the dtype of `query`, the log-sum-exp `[B, H, S]`, the scores `[B, H, nQ, nK]`.
    """
    batch, tokens, heads, _ = query.shape
    dtype = accumulator(query)
    out = None if value is None else torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, heads, tokens), dtype=dtype)
    scores = None
    if block is not None:
        scores = query.new_zeros((batch, heads, -(-tokens // block[0]), -(-tokens // block[1])), dtype=dtype)
    tiles = Tiles(query, block)
    seen, lengths = seen_and_lengths(kv_lengths, key)
    for sample, length in enumerate(lengths):
        visible = None if seen is None else seen[sample]
        counted = torch.arange(tokens, device=query.device) < length if visible is None else visible
        for some in (slice(first, first + tiles.heads) for first in range(0, heads, tiles.heads)):
            q = heads_first(query[sample, :, some], dtype).mul_(scale * LOG2_E)
            k = heads_first(key[sample, :length, some], dtype)
            v = None if value is None else heads_first(value[sample, :length, some], dtype)
            if visible is not None:  # what is not seen may hold anything
                for x in (k,) if v is None else (k, v):
                    x.masked_fill_(~visible[:, None], 0)
            for rows in (slice(start, min(start + tiles.rows, tokens)) for start in range(0, tokens, tiles.rows)):
                attended, lse[sample, some, rows], shares = tiles.row(q[:, rows], k, v, visible)
                if out is not None and attended is not None:
                    out[sample, rows, some] = attended.transpose(0, 1)
                if scores is not None and block is not None:
                    if reference is not None:
                        shares *= row_weights(lse[sample, some, rows], reference[sample, some, rows])[..., None]
                    shares.masked_fill_(~counted[rows, None], 0)
                    sums = pad(shares, (0, 0, 0, -shares.shape[1] % block[0])).unflatten(1, (-1, block[0])).sum(2)
                    first_row = rows.start // block[0]
                    scores[sample, some, first_row : first_row + sums.shape[1], : sums.shape[2]] = sums
    return out, lse, scores


def row_weights(lse: Tensor, reference: Tensor) -> Tensor:
    """How much a row counts in the scores: exp(lse - reference), 1 where the reference is not finite."""
    return torch.where(reference.isfinite(), (lse - reference).clamp_(LOWEST, HIGHEST).exp_(), 1)


class Tiles:
    """The size of a tile, and the memory for its scores, used again for each."""

    def __init__(self, query: Tensor, block: tuple[int, int] | None) -> None:
        tokens, heads = query.shape[1:3]
        cpu = query.device.type == "cpu"
        self.rows, self.columns = (
            min(tokens, max(size, side // size * size))
            for side, size in zip(CPU_TILE if cpu else DEVICE_TILE, block or (1, 1), strict=True)
        )
        self.block = self.columns if block is None else block[1]
        most = math.prod(CPU_TILE) * torch.get_num_threads() if cpu else DEVICE_SCORES
        self.heads = min(heads, max(1, most // (self.rows * self.columns)))
        size = self.heads * self.rows * self.columns
        self.memory = torch.empty(size, dtype=accumulator(query), device=query.device)

    def row(
        self, query: Tensor, key: Tensor, value: Tensor | None, seen: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Queries `[G, Q, D]`, times log2(e), over keys `[G, K, D]`.

        Returns:
            The output `[G, Q, D]`, the natural log-sum-exp `[G, Q]`, and the weight of each block of keys
            `[G, Q, ceil(K / block)]`, which sums to 1; 0, -inf and 0 for a query without a key.
        """
        heads, queries, _ = query.shape
        keys = key.shape[1]
        top = query.new_full((heads, queries), float("-inf"))
        out = None if value is None else torch.zeros_like(query)
        sums, tops = [], []
        for start in range(0, keys, self.columns):
            columns = slice(start, min(start + self.columns, keys))
            logits = self.memory[: heads * queries * (columns.stop - start)].view(heads, queries, -1)
            torch.bmm(query, key[:, columns].mT, out=logits)
            if seen is not None:
                logits.masked_fill_(~seen[columns], float("-inf"))
            before, top = top, torch.maximum(top, logits.amax(-1))
            finite = top if seen is None else top.masked_fill(top.isneginf(), 0)
            weights = logits.sub_(finite[..., None]).exp2_()
            if out is not None and value is not None:
                torch.baddbmm(out.mul_((before - finite).exp2_()[..., None]), weights, value[:, columns], out=out)
            ragged = -weights.shape[-1] % self.block
            sums.append((pad(weights, (0, ragged)) if ragged else weights).unflatten(-1, (-1, self.block)).sum(-1))
            tops.append(finite)
        if not sums:
            return out, top, query.new_zeros((heads, queries, 0))
        finite = tops[-1]
        for part, reached in zip(sums, tops, strict=True):
            part.mul_((reached - finite).exp2_()[..., None])
        shares = torch.cat(sums, -1)
        total = shares.sum(-1)
        inverse = total.masked_fill(total == 0, 1).reciprocal()[..., None]
        out = None if out is None else out.mul_(inverse)
        return out, (finite + total.log2()) / LOG2_E, shares.mul_(inverse)


def seen_and_lengths(kv_lengths: Tensor | None, key: Tensor) -> tuple[Tensor | None, list[int]]:
    """(bool `[B, S]` or None, the keys to look at in each sample): lengths that lie on an accelerator stay there."""
    batch, tokens = key.shape[:2]
    if kv_lengths is None:
        return None, [tokens] * batch
    if kv_lengths.device.type == "cpu":
        return None, kv_lengths.tolist()
    return torch.arange(tokens, device=key.device) < kv_lengths[:, None], [tokens] * batch


def heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[..., H, D]` as `[H, ..., D]`, contiguous and in `dtype`, in one pass."""
    x = x.movedim(-2, 0)
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)


def accumulator(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)
