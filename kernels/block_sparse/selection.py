"""Which key blocks to keep, from the scores of a search: AdaSpa's rule (arXiv 2502.21079, section 4), on the device.

Every row of a head keeps equally many blocks, those of the highest scores, and all blocks that hold text. How many
depends on the head: where few blocks hold most of the attention fewer will do, and as many heads, those that are
covered least, get what is saved. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import int_pair, shape_of
from .checks import lengths_tensor, lengths_within
from .mask import BlockMask, pack

# Scores looked at together: bounds the memory needed beside them.
CHUNK = 2**24
# In doubles (1 - 0.7) * 10 is a little more than 3, and its ceiling 4.
CEIL_GUARD = 1e-6


@dataclass(frozen=True, eq=False)
class Selection:
    """A mask, and how well it covers the scores it was made from.

    Attributes:
        mask: the kept blocks.
        recall: fp32 `[B, H]`, the share of all scores in the blocks kept at the base sparsity: what heads are ranked
            by. NaN for a head with NaN among its scores, 1 for one without any score.
        kept: fp32 `[B, H]`, the same for `mask`.
        level: int8 `[B, H]`, 1 for heads of higher sparsity, -1 for heads of lower sparsity, 0 for the others.
    """

    mask: BlockMask
    recall: Tensor
    kept: Tensor
    level: Tensor


def select_blocks(
    scores: Tensor,
    *,
    sparsity: float,
    block: Sequence[int],
    text: Iterable[tuple[int, int]] = (),
    kv_lengths: Tensor | None = None,
    head_adaptive: bool = True,
    recall_threshold: float = 0.8,
    row_uniform: bool = True,
) -> Selection:
    """The blocks to keep, by the scores of `block_scores` or `dense_attention_with_scores`.

    Args:
        scores: fp32 or fp64 `[B, H, nQ, nK]`. NaN counts as 0.
        sparsity: the share of video key blocks not kept, 0 <= sparsity < 1. A row keeps ceil((1 - sparsity) * n) of n,
            at least one.
        block: (queries, keys) of a block.
        text: (start, stop) token ranges outside the video. Key blocks that hold such a token are kept by every row, on
            top of the others, and query blocks that hold one keep every block.
        kv_lengths: as in `dense_attention`; key blocks from there on are not kept.
        head_adaptive: move blocks between heads, as `head_levels` says. Otherwise all heads have `sparsity`.
        recall_threshold: a head of which more than this share is covered at `sparsity` can do with less. The best
            min(n, H // 2) of n such heads get the higher sparsity, as many of the worst the lower.
        row_uniform: False lets the rows of a head compete for the same total; for comparison.

    Raises:
        ValueError: for scores, a sparsity, a block, text ranges or lengths that do not fit.
    """
    spans = _checked(scores, block, text, sparsity, recall_threshold, kv_lengths)
    batch, heads, query_blocks, key_blocks = scores.shape
    device = scores.device
    levels = head_levels(sparsity) if head_adaptive else (sparsity,)
    text_rows, text_keys = (_block_ranges(spans, size) for size in block)
    video_rows, video_keys = query_blocks - _total(text_rows), key_blocks - _total(text_keys)

    seen = torch.ones((batch, key_blocks), dtype=torch.bool, device=device)
    if kv_lengths is not None:
        starts = torch.arange(0, key_blocks * block[1], block[1], device=device)
        seen = starts < kv_lengths.to(device, non_blocking=True)[:, None]
    video = seen & ~_within(text_keys, key_blocks, device)
    wanted = _kept_counts(levels, key_blocks).to(device, non_blocking=True)[:, video.sum(-1)]
    most = max(kept_blocks(level, video_keys) for level in levels)

    # From here on batch and heads are one axis, of which a part is looked at at a time.
    flat = scores.flatten(0, 1)
    seen, video, wanted = (x.repeat_interleave(heads, -1 if x is wanted else 0) for x in (seen, video, wanted))
    full_rows = _within(text_rows, query_blocks, device)[:, None]
    step = max(1, CHUNK // (query_blocks * key_blocks))
    bits, counts, recalls = [], [], []
    for part in (slice(start, start + step) for start in range(0, batch * heads, step)):
        mass = flat[part].masked_fill(~seen[part, None], 0)
        sought = video[part, None] & ~full_rows
        always = seen[part, None] & ~sought
        if row_uniform:
            rank = _ranks(mass, sought, most)
            limits = wanted[:, part, None, None]
        else:
            rank = _ranks(mass.flatten(1), sought.flatten(1), most * video_rows).view_as(mass)
            limits = wanted[:, part, None, None] * video_rows
        kept = [((rank < limit) & sought) | always for limit in limits]
        bits.append(torch.stack([pack(x) for x in kept]))
        counts.append(torch.stack([x.sum(-1, dtype=torch.int32) for x in kept]))
        held = torch.stack([mass.masked_fill(~x, 0).sum((-2, -1)) for x in kept])
        total = mass.sum((-2, -1))
        recalls.append(torch.where(total == 0, 1, held / total))

    base = len(levels) // 2
    recall = torch.cat(recalls, 1)
    level = torch.zeros((batch, heads), dtype=torch.int8, device=device)
    if head_adaptive:
        level = _shifts(recall[base].view(batch, heads), recall_threshold)
    chosen = level.flatten().long() + base, torch.arange(batch * heads, device=device)
    mask = BlockMask(
        torch.cat(bits, 1)[chosen].unflatten(0, (batch, heads)),
        torch.cat(counts, 1)[chosen].unflatten(0, (batch, heads)),
        key_blocks,
        (block[0], block[1]),
        batch * _capacity(levels, heads, query_blocks, key_blocks, video_rows, video_keys),
    )
    recall, kept_share = recall[base].view(batch, heads), recall[chosen].view(batch, heads)
    return Selection(mask, recall.float(), kept_share.float(), level)


def head_levels(sparsity: float) -> tuple[float, float, float]:
    """The lower, base and higher sparsity of heads; the mean of lower and higher is the base."""
    lower = max(0.0, (3 * sparsity - 1) / 2)
    return lower, sparsity, 2 * sparsity - lower


def kept_blocks(sparsity: float, blocks: int) -> int:
    """How many of `blocks` key blocks a row keeps."""
    return min(max(math.ceil((1 - sparsity) * blocks - CEIL_GUARD), 1), blocks)


def _kept_counts(levels: Sequence[float], blocks: int) -> Tensor:
    """`kept_blocks` of 0 to `blocks`, int64 `[levels, blocks + 1]` on the CPU: not every device has doubles."""
    number = torch.arange(blocks + 1, dtype=torch.float64)
    shares = [((1 - level) * number - CEIL_GUARD).ceil().clamp(min=1).minimum(number) for level in levels]
    return torch.stack(shares).long()


def _ranks(mass: Tensor, sought: Tensor, most: int) -> Tensor:
    """The place of each score among those `sought` along the last axis, 0 for the largest; from `most` on any."""
    values = mass.nan_to_num(nan=0.0).masked_fill(~sought, float("-inf"))
    places = values.topk(most, -1).indices
    order = torch.arange(most, dtype=torch.int32, device=mass.device).expand(places.shape)
    return torch.full(mass.shape, mass.shape[-1], dtype=torch.int32, device=mass.device).scatter_(-1, places, order)


def _shifts(recall: Tensor, threshold: float) -> Tensor:
    """int8 `[B, H]`: 1 for the heads that can do with less, -1 for as many that are covered least; ties by number."""
    heads = recall.shape[1]
    shifted = (recall > threshold).sum(-1, keepdim=True).clamp(max=heads // 2)
    rank = recall.nan_to_num(nan=0.0).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (rank < shifted).to(torch.int8) - (rank >= heads - shifted).to(torch.int8)


def _capacity(
    levels: Sequence[float], heads: int, query_blocks: int, key_blocks: int, video_rows: int, video_keys: int
) -> int:
    """The most pairs of blocks that the heads of one batch entry keep together."""
    counts = [kept_blocks(level, video_keys) for level in levels]
    base, pair = counts[len(counts) // 2], counts[0] + counts[-1]
    of_heads = max(heads * base, heads // 2 * pair + heads % 2 * base)
    text_keys = key_blocks - video_keys
    return video_rows * (of_heads + heads * text_keys) + (query_blocks - video_rows) * heads * key_blocks


def _block_ranges(spans: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """The blocks that token ranges touch, as (first, stop) ranges that do not overlap."""
    ranges: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        first, last = start // size, -(-stop // size)
        if ranges and first <= ranges[-1][1]:
            first, last = ranges[-1][0], max(ranges.pop()[1], last)
        ranges.append((first, last))
    return ranges


def _total(ranges: Sequence[tuple[int, int]]) -> int:
    return sum(stop - first for first, stop in ranges)


def _within(ranges: Sequence[tuple[int, int]], count: int, device: torch.device) -> Tensor:
    """bool `[count]`: the number lies in one of the ranges."""
    number = torch.arange(count, device=device)
    inside = torch.zeros(count, dtype=torch.bool, device=device)
    for first, stop in ranges:
        inside |= (number >= first) & (number < stop)
    return inside


def _checked(
    scores: Tensor,
    block: Sequence[int],
    text: Iterable[tuple[int, int]],
    sparsity: float,
    recall_threshold: float,
    kv_lengths: Tensor | None,
) -> list[tuple[int, int]]:
    """Refuses what does not fit; the text ranges that are not empty."""
    if not isinstance(scores, Tensor) or scores.dim() != 4 or 0 in scores.shape:
        got = shape_of(scores) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"scores must be [batch, heads, query blocks, key blocks] and not empty, got {got}")
    if scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"scores must be float32 or float64, got {scores.dtype}")
    (block_q, block_k), (query_blocks, key_blocks) = int_pair("block", block, minimum=1), scores.shape[2:]
    tokens = min(query_blocks * block_q, key_blocks * block_k)
    if tokens <= max((query_blocks - 1) * block_q, (key_blocks - 1) * block_k):
        raise ValueError(
            f"{query_blocks} blocks of {block_q} queries and {key_blocks} blocks of {block_k} keys "
            "cannot be of the same number of tokens"
        )
    for name, number, end in (("sparsity", sparsity, "below 1"), ("recall_threshold", recall_threshold, "at most 1")):
        valid = isinstance(number, (int, float)) and not isinstance(number, bool) and 0 <= number <= 1
        if not valid or (number == 1 and name == "sparsity"):
            raise ValueError(f"{name} must be a number from 0 and {end}, got {number!r}")
    spans = [int_pair("a range of text", span, minimum=0) for span in text]
    for start, stop in spans:
        if start > stop or stop > tokens:
            raise ValueError(f"a range of text must lie within {tokens} tokens, got {start} to {stop}")
    lengths_tensor(kv_lengths, scores.shape[0], scores.device)
    if not torch.compiler.is_compiling():
        lengths_within(kv_lengths, tokens)
    return [span for span in spans if span[0] < span[1]]
