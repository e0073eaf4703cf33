"""`BlockMask`: which blocks of keys each block of queries sees, at a bit for each pair of blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import int_pair, shape_of

# Pairs of blocks expanded at once, so that positions in int64 stay below 128 MiB.
EXPANDED = 2**24
# Places in a list of kept blocks are int32.
MAX_LISTED = 2**31 - 1


@dataclass(frozen=True, eq=False)
class BlockMask:
    """The kept pairs of blocks, packed. Made by `select_blocks` or `from_dense`, the only places that fill it.

    Attributes:
        bits: uint8 `[B, H, nQ, ceil(nK / 8)]`; bit j % 8, from the lowest, of byte j // 8 is set where key block j is
            kept. Bits past nK are 0.
        counts: int32 `[B, H, nQ]`, the kept key blocks of each row.
        key_blocks: nK.
        block: (queries, keys) of a block; the last of each axis may be shorter.
        capacity: at least the number of kept pairs. Known without asking the device, so that lists can be allocated.
    """

    bits: Tensor
    counts: Tensor
    key_blocks: int
    block: tuple[int, int]
    capacity: int

    @classmethod
    def from_dense(cls, kept: Tensor, block: tuple[int, int] = (64, 64)) -> BlockMask:
        """The mask of a bool tensor `[B, H, nQ, nK]`; on an accelerator, the number of kept pairs is waited for.

        Raises:
            ValueError: for another dtype or shape, and for a block that is not two positive integers.
        """
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool or kept.dim() != 4 or 0 in kept.shape:
            got = f"{kept.dtype} {shape_of(kept)}" if isinstance(kept, Tensor) else type(kept).__name__
            raise ValueError(f"a dense mask must be bool [batch, heads, query blocks, key blocks], got {got}")
        counts = kept.sum(-1, dtype=torch.int32)
        return cls(pack(kept), counts, kept.shape[-1], int_pair("block", block, minimum=1), int(counts.sum()))

    def to_dense(self) -> Tensor:
        """bool `[B, H, nQ, nK]`."""
        return unpack(self.bits, self.key_blocks)

    def density(self) -> float:
        """The kept share of all pairs of blocks; waits for the device."""
        return float(self.counts.sum()) / (self.counts.numel() * self.key_blocks)

    def index(self) -> tuple[Tensor, Tensor]:
        """The kept key blocks of all rows in one list, without waiting for the device.

        Returns:
            (blocks int32 `[capacity]`, starts int32 `[B * H * nQ]`): row r, of all batch entries, heads and query
            blocks in order, keeps ``blocks[starts[r] : starts[r] + counts[r]]``, ascending. What is left of the
            capacity is 0.

        Raises:
            ValueError: if the capacity does not fit into int32.
        """
        if self.capacity > MAX_LISTED:
            raise ValueError(
                f"a list of blocks has at most {MAX_LISTED} entries, this mask may keep {self.capacity}; "
                f"use larger blocks than {self.block[0]} x {self.block[1]}"
            )
        counts = self.counts.flatten()
        ends = counts.cumsum(0)
        # One place more, which takes what is not kept.
        blocks = torch.zeros(self.capacity + 1, dtype=torch.int32, device=counts.device)
        number = torch.arange(self.key_blocks, dtype=torch.int32, device=counts.device)
        bits = self.bits.flatten(0, 2)
        step = max(1, EXPANDED // self.key_blocks)
        for rows in (slice(start, start + step) for start in range(0, len(bits), step)):
            kept = unpack(bits[rows], self.key_blocks)
            place = kept.cumsum(-1) + (ends[rows] - counts[rows] - 1)[:, None]
            place.masked_fill_(~kept, self.capacity)
            blocks.scatter_(0, place.flatten(), number.expand(kept.shape).flatten())
        return blocks[:-1], (ends - counts).int()

    def to(self, device: torch.device | str) -> BlockMask:
        return BlockMask(self.bits.to(device), self.counts.to(device), self.key_blocks, self.block, self.capacity)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, nQ, nK)."""
        batch, heads, query_blocks = self.counts.shape
        return batch, heads, query_blocks, self.key_blocks

    @property
    def device(self) -> torch.device:
        return self.bits.device

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + self.counts.nbytes

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.shape))
        return f"BlockMask({size}, block={self.block}, {self.nbytes / 2**20:.3g} MiB on {self.device})"


def pack(kept: Tensor) -> Tensor:
    """bool `[..., n]` as uint8 `[..., ceil(n / 8)]`, lowest bit first."""
    whole = torch.nn.functional.pad(kept.to(torch.uint8), (0, -kept.shape[-1] % 8))
    places = torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (whole.unflatten(-1, (-1, 8)) << places).sum(-1, dtype=torch.uint8)


def unpack(bits: Tensor, length: int) -> Tensor:
    """bool `[..., length]` from what `pack` made of it."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[..., None] >> places & 1).flatten(-2)[..., :length].bool()
