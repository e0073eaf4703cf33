"""What AdaSpa remembers of a layer, in one guidance branch of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ... import kernels
from ...kernels import BlockMask, Selection
from ..families.base import Place
from .adaspa_schedule import Phase


class Mode(Enum):
    """What a layer does in a call."""

    KEEP_LSE = "dense, keeping the log-sum-exp for a search in the next step"
    FIRST = "dense, and a search"
    AGAIN = "a search, and sparse with what it found"
    SPARSE = "sparse"


@dataclass(frozen=True)
class CallShape:
    """What a mask is good for: a call of another shape needs a new one."""

    batch: int
    place: Place
    device: torch.device
    dtype: torch.dtype

    @property
    def fuses(self) -> bool:
        """Whether a kernel makes output and scores in one pass, given an earlier log-sum-exp: the range of fp16 is too
        small for it, and where there are no fused kernels it saves nothing."""
        return self.device.type == "cuda" and self.dtype == torch.bfloat16


@dataclass
class LayerState:
    """Of one layer in one guidance branch of one run.

    Attributes:
        shape: of the calls it is about.
        lse: fp32 `[B, H, S]` of the last search, the reference of the next.
        mask: that later steps attend by.
        recall, level: fp32 and int8 `[B, H]` of the last search.
        kept: fp32 `[B, H]` share of the attention mass in the blocks of the mask when it was made.
        pairs: 0-d, query-key pairs an item and head that the mask keeps.
        clamped: 0-d, query rows whose scores left the range in which they are exact.
        finite: 0-d bool, query and key of the last search were numbers.
        searched_at: step of the last search, counted from 1.
        checked: whether somebody has looked at `finite` since.
        dense: they were not, and the layer stays dense for the run.
        peak_bytes: the most it held.
    """

    shape: CallShape
    lse: Tensor | None = None
    mask: BlockMask | None = None
    recall: Tensor | None = None
    kept: Tensor | None = None
    level: Tensor | None = None
    pairs: Tensor | None = None
    clamped: Tensor | None = None
    finite: Tensor | None = None
    searched_at: int | None = None
    checked: bool = True
    dense: bool = False
    peak_bytes: int = 0

    def keep(self, found: Selection, lse: Tensor, *, clamped: Tensor | None, finite: Tensor, phase: Phase) -> None:
        """Take over what a search found; its log-sum-exp only for a search to come."""
        self.mask, self.recall, self.kept, self.level = found.mask, found.recall, found.kept, found.level
        self.lse = lse if phase.searches_again else None
        self.pairs = pairs_of(found.mask, lse.shape[-1])
        self.clamped, self.finite = clamped, finite
        self.searched_at, self.checked = phase.step, False
        self.peak_bytes = max(self.peak_bytes, found.mask.nbytes + lse.nbytes)

    def mask_on(self, device: torch.device) -> BlockMask:
        """The mask, which may have been put away: what was taken for the end of a run need not have been it."""
        assert self.mask is not None
        if self.mask.device != device:
            self.mask = self.mask.to(device)
        return self.mask

    def give_up(self) -> None:
        """Stay dense for the run."""
        self.dense, self.mask, self.lse = True, None, None
        self.recall, self.kept, self.level = None, None, None

    def put_away(self) -> None:
        """Leave the device: the run is over, and only a report may want to look at the mask."""
        self.lse = None
        if self.mask is not None:
            self.mask = self.mask.to("cpu")


def pairs_of(mask: BlockMask, tokens: int) -> Tensor:
    """0-d, query-key pairs in the kept blocks of an item and head, in the mean; the last blocks may be shorter."""
    # Counts of pairs need more digits than fp32 has.
    exact = torch.float32 if mask.device.type == "mps" else torch.float64
    (rows, columns), (_, _, query_blocks, key_blocks) = mask.block, mask.shape
    keeps_last = (mask.bits[..., -1] >> (key_blocks - 1) % 8 & 1).to(exact)
    keys = mask.counts.to(exact) * columns - keeps_last * (key_blocks * columns - tokens)
    queries = torch.full((query_blocks,), rows, dtype=exact, device=mask.device)
    queries[-1] = tokens - (query_blocks - 1) * rows
    return (keys @ queries).mean()


def expected_pairs(tokens: int, block: tuple[int, int], sparsity: float, text: Sequence[tuple[int, int]]) -> Tensor:
    """`pairs_of` a mask that is yet to be searched: as many blocks are kept wherever attention lies, and a shorter last
    one has as much less of it.

    Args:
        text: ranges of tokens of which every block is kept.
    """
    rows, columns = (-(-tokens // side) for side in block)
    keys = torch.full((columns,), float(block[1]))
    keys[-1] -= -tokens % block[1]
    chance = torch.rand(1, 1, rows, columns, generator=torch.Generator().manual_seed(0))
    found = kernels.select_blocks(chance * keys, sparsity=sparsity, block=block, text=text, head_adaptive=False)
    return pairs_of(found.mask, tokens)


@dataclass
class SparsePlan:
    """Attention of a layer in one call; `state` is of the layer, read and written by the call, `seat` its place in
    compiled graphs, `ran` whether the layer came to it."""

    mode: Mode
    state: LayerState
    phase: Phase
    seat: Tensor
    around: bool = False
    ran: bool = False

    @property
    def searches(self) -> bool:
        return self.mode in (Mode.FIRST, Mode.AGAIN)

    @property
    def pairs(self) -> Tensor | None:
        """Query-key pairs an item that are computed; None for all of them, where the output is dense."""
        return self.state.pairs if self.mode in (Mode.AGAIN, Mode.SPARSE) else None
