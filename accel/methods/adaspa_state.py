"""What AdaSpa remembers of a layer, in one guidance branch of one run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

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
        searched_at: step of the last search, counted from 1.
        checked: whether the last search was seen to have found numbers.
        dense: it did not, and the layer stays dense for the run.
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
    searched_at: int | None = None
    checked: bool = True
    dense: bool = False
    peak_bytes: int = 0

    def keep(self, found: Selection, lse: Tensor, clamped: Tensor | None, phase: Phase, *, tokens: int) -> None:
        """Take over what a search found; its log-sum-exp only for a search to come."""
        self.mask, self.recall, self.kept, self.level = found.mask, found.recall, found.kept, found.level
        self.lse = lse if phase.searches_again else None
        exact = torch.float32 if lse.device.type == "mps" else torch.float64
        self.pairs = found.mask.counts.to(exact).mean() * (tokens**2 / found.mask.key_blocks)
        self.clamped, self.searched_at, self.checked = clamped, phase.step, False
        self.peak_bytes = max(self.peak_bytes, found.mask.nbytes + lse.nbytes)

    def found_no_numbers(self) -> bool:
        """Whether the last search met NaN or infinity. Reads from the device, once after each search."""
        if self.checked or self.recall is None:
            return False
        self.checked = True
        return not bool(self.recall.isfinite().all())

    def give_up(self) -> None:
        """Stay dense for the run."""
        self.dense, self.mask, self.lse = True, None, None

    def put_away(self) -> None:
        """Leave the device: the run is over, and only a report may want to look at the mask."""
        self.lse = None
        if self.mask is not None and not torch.compiler.is_compiling():
            self.mask = self.mask.to("cpu")


@dataclass
class SparsePlan:
    """Attention of a layer in one call; `state` is of the layer, read and written by the call."""

    mode: Mode
    state: LayerState
    phase: Phase
    around: bool = False

    @property
    def searches(self) -> bool:
        return self.mode in (Mode.FIRST, Mode.AGAIN)

    @property
    def pairs(self) -> Tensor | None:
        """Query-key pairs an item that are computed; None for all of them, where the output is dense."""
        return self.state.pairs if self.mode in (Mode.AGAIN, Mode.SPARSE) else None
