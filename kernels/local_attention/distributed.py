"""Local attention of one grid whose rows are split over the ranks of a process group, exactly.

A rank needs the keys and values of a halo of rows, those within reach above and below its own, and the pooled tokens of
all ranks. Dense queries see everything: each rank attends with them over its own rows, and these parts are merged by
their log-sum-exp, T H (D + 1) numbers a rank. CLEAR itself (arXiv 2412.16112, eq. 7) averages them instead.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..checks import FLOAT_DTYPES
from . import eager
from .geometry import reach

# What must be the same on all ranks.
ALIKE = ("batch", "heads", "head_dim", "dtype", "grid width", "tokens before the grid", "tokens after it", "radius")
ALIKE += ("scale", "pooled_key (1 if given)")


class Rows(NamedTuple):
    """Rows `[start, stop)` of the whole grid."""

    start: int
    stop: int

    def __and__(self, other: Rows) -> Rows:
        return Rows(max(self.start, other.start), min(self.stop, other.stop))


class Share(NamedTuple):
    """What may differ between ranks: rows of the grid, pooled tokens, and whether there is a mask."""

    rows: int
    pooled: int
    masked: bool


@torch.compiler.disable
def local_attention(
    op: str, check: Callable[[], dict[str, Any]], device: torch.device, group: torch.distributed.ProcessGroup
) -> Tensor:
    """`kernels.local_attention` with a group.

    Args:
        op: its name.
        check: returns this rank's checked call, or raises `ValueError`. It is called here, because a rank whose
            arguments are refused must tell the others, which would wait for it.
        device: of the tensors.
    """
    refused: ValueError | None = None
    try:
        call = check()
        _refuse_gradients(call)
        halves = _halves_of(dispatch.choose(op, call))
        header = _header(call)
    except ValueError as error:
        refused, header = error, []
    shares = _agree(header, refused, device, group)
    with torch.autocast(device.type, enabled=False):
        return _attend(halves, shares=shares, group=group, **call)


def _halves_of(choice: dispatch.Explanation) -> Any:
    """The module with the two halves of the operation, `grid_queries` and `dense_queries`, of a backend."""
    if choice.backend == "reference":
        raise ValueError(f"{choice.op} over a process group cannot run on reference: eager and triton can")
    target = dispatch.get_op(choice.op).implementations[choice.backend].target
    return importlib.import_module(target.partition(":")[0])


def _refuse_gradients(call: dict[str, Any]) -> None:
    tensors = (x for x in call.values() if isinstance(x, Tensor))
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError("local_attention over a process group has no gradient: call it under torch.no_grad()")


def _header(call: dict[str, Any]) -> list[float]:
    """What a rank tells the others: `ALIKE`, then its `Share`."""
    batch, tokens, heads, head_dim = call["query"].shape
    (height, width), before = call["grid"], call["grid_offset"]
    dtype = FLOAT_DTYPES.index(call["query"].dtype)
    after = tokens - before - height * width
    pooled = 0 if call["pooled_key"] is None else call["pooled_key"].shape[1]
    alike = (batch, heads, head_dim, dtype, width, before, after, call["radius"], call["scale"], pooled > 0)
    return [float(x) for x in (*alike, height, pooled, call["key_mask"] is not None)]


def _agree(
    header: list[float], refused: ValueError | None, device: torch.device, group: torch.distributed.ProcessGroup
) -> list[Share]:
    """The shares of all ranks; raises on every rank where arguments were refused on one or do not go together."""
    length = 1 + len(ALIKE) + len(Share._fields)
    told = [0.0] * length if refused is not None else [1.0, *header]
    mine = torch.tensor(told, dtype=torch.float64, device=device)
    table = [mine.new_empty(length) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(table, mine, group=group)
    if refused is not None:
        raise refused
    ranks = torch.stack(table).tolist()
    for rank, (accepted, *_) in enumerate(ranks):
        if not accepted:
            raise ValueError(f"the arguments of rank {rank} of the group were refused; its own error says why")
    for rank, theirs in enumerate(ranks):
        for name, first, other in zip(ALIKE, ranks[0][1:], theirs[1:], strict=False):
            if first != other:
                first, other = (FLOAT_DTYPES[int(x)] if name == "dtype" else f"{x:g}" for x in (first, other))
                raise ValueError(f"{name} is {first} on rank 0 of the group but {other} on rank {rank}")
    return [Share(int(rows), int(pooled), bool(masked)) for *_, rows, pooled, masked in ranks]


def _attend(
    halves: Any,
    *,
    shares: list[Share],
    group: torch.distributed.ProcessGroup,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    grid_offset: int,
    radius: float,
    scale: float,
    pooled_key: Tensor | None,
    pooled_value: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    rank = torch.distributed.get_rank(group)
    first, last = grid_offset, grid_offset + grid[0] * grid[1]
    if key_mask is None and any(share.masked for share in shares):
        key_mask = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
    tensors = [key, value] if key_mask is None else [key, value, key_mask.to(torch.uint8)]
    rows = _rows(shares)
    slabs = [_slab(own, rows[-1].stop, radius) for own in rows]
    halo = _Halo([x[:, first:last] for x in tensors], rows, slabs, rank, grid[1], group)

    # While the halo is on its way. The first rank stands for all in what dense queries see of dense keys.
    seen = slice(None) if rank == 0 else slice(first, last)
    outside = torch.cat((query[:, :first], query[:, last:]), dim=1)
    dense = query.new_empty(outside.shape)
    if outside.shape[1]:
        mask = None if key_mask is None else key_mask[:, seen]
        part = halves.dense_queries(outside, key[:, seen], value[:, seen], scale=scale, key_mask=mask)
        dense = _merge_over_ranks(*part, group).to(query.dtype)
    if pooled_key is not None and pooled_value is not None:
        pooled_key, pooled_value = _gather_pooled(pooled_key, pooled_value, shares, group)

    arrived = zip(tensors, halo.wait(), strict=True)
    slab = [torch.cat((x[:, :first], *parts, x[:, last:]), dim=1) for x, parts in arrived]
    own, _ = halves.grid_queries(
        query[:, first:last],
        slab[0],
        slab[1],
        grid=(slabs[rank].stop - slabs[rank].start, grid[1]),
        query_rows=(rows[rank].start - slabs[rank].start, rows[rank].stop - slabs[rank].start),
        grid_offset=grid_offset,
        radius=radius,
        scale=scale,
        pooled_key=pooled_key,
        pooled_value=pooled_value,
        key_mask=None if key_mask is None else slab[2].bool(),
    )
    return torch.cat((dense[:, :first], own, dense[:, first:]), dim=1)


def _rows(shares: list[Share]) -> list[Rows]:
    stops = list(itertools.accumulate(share.rows for share in shares))
    return [Rows(stop - share.rows, stop) for share, stop in zip(shares, stops, strict=True)]


def _slab(own: Rows, height: int, radius: float) -> Rows:
    """The rows that queries of some rows see."""
    far = reach(radius)
    return Rows(max(own.start - far, 0), min(own.stop + far, height))


class _Halo:
    """Rows of `tensors` `[B, tokens, ...]` on their way from their ranks to those that see them."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        rows: list[Rows],
        slabs: list[Rows],
        rank: int,
        width: int,
        group: torch.distributed.ProcessGroup,
    ) -> None:
        #: For each tensor the parts of this rank's slab, from top to bottom.
        self._parts: list[list[Tensor]] = [[] for _ in tensors]
        messages: list[torch.distributed.P2POp] = []
        for other, theirs in enumerate(rows):
            wanted, given = slabs[rank] & theirs, slabs[other] & rows[rank]
            peer = torch.distributed.get_global_rank(group, other)
            send, receive = (
                functools.partial(torch.distributed.P2POp, call, peer=peer, group=group)
                for call in (torch.distributed.isend, torch.distributed.irecv)
            )
            for x, parts in zip(tensors, self._parts, strict=True):
                if other == rank:
                    parts.append(x)
                    continue
                if wanted.start < wanted.stop:
                    parts.append(x.new_empty((x.shape[0], (wanted.stop - wanted.start) * width, *x.shape[2:])))
                    messages.append(receive(parts[-1]))
                if given.start < given.stop:
                    start, stop = ((row - rows[rank].start) * width for row in given)
                    messages.append(send(x[:, start:stop].contiguous()))
        self._messages = messages  # what is being sent must stay in memory
        self._works = torch.distributed.batch_isend_irecv(messages) if messages else []

    def wait(self) -> list[list[Tensor]]:
        for work in self._works:
            work.wait()
        return self._parts


def _merge_over_ranks(out: Tensor, lse: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Attention `[B, T, H, D]` to the keys of all ranks, the same to the bit on each."""
    message = torch.cat((out, lse.transpose(1, 2)[..., None]), dim=-1)
    parts = [torch.empty_like(message) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, message, group=group)
    merged, _ = functools.reduce(
        lambda part, other: eager.merge(*part, *other), ((part[..., :-1], part[..., -1]) for part in parts)
    )
    return merged


def _gather_pooled(
    key: Tensor, value: Tensor, shares: list[Share], group: torch.distributed.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The pooled tokens of all ranks. Each may have another number of them, a message has the same size everywhere."""
    most = max(share.pooled for share in shares)
    message = F.pad(torch.stack((key, value)), (0, 0, 0, 0, 0, most - key.shape[1]))
    parts = [torch.empty_like(message) for _ in shares]
    torch.distributed.all_gather(parts, message, group=group)
    keys, values = torch.cat(
        [part[:, :, : share.pooled] for part, share in zip(parts, shares, strict=True)], dim=2
    ).unbind()
    return keys, values
