"""Diffusers' context parallelism (`enable_parallelism`): each rank holds a share of the tokens of every stream.

A method looks at whole sequences. So ranks exchange heads for tokens, as Ulysses does (arXiv 2309.14509): each attends
over all tokens with its share of the heads, and they exchange back. That is independent of the method and the same for
every degree of ring and Ulysses attention, which say how *dense* attention is shared out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from ..errors import UnsupportedModel
from .base import Place


@dataclass(frozen=True)
class ContextParallel:
    """The ranks over which the tokens of a model are split."""

    group: torch.distributed.ProcessGroup
    ranks: int
    rank: int

    @classmethod
    def of(cls, model: Any) -> ContextParallel | None:
        """Those of a model; None where tokens are not split.

        Raises:
            UnsupportedModel: where Diffusers has no plan for the model, so that only whoever wrote one knows which
                tokens a rank holds.
        """
        config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
        if config is None:
            return None
        if getattr(model, "_cp_plan", None) is None:
            raise UnsupportedModel(
                f"Diffusers has no plan for context parallelism of {type(model).__name__}, so which tokens a rank "
                "holds is not known: disable attnswap or do without enable_parallelism"
            )
        group = config._flattened_mesh.get_group()
        return cls(group, torch.distributed.get_world_size(group), torch.distributed.get_rank(group))

    def tokens(self, place: Place) -> int:
        """How many tokens of a sequence this rank holds."""
        return sum(self._shares(place)[self.rank])

    def gather(self, place: Place, *shards: Tensor) -> tuple[Tensor, ...]:
        """`[B, S / ranks, H, D]` each to `[B, S, H / ranks, D]`: all tokens in their order, this rank's heads.

        Raises:
            ValueError: where there are fewer heads than ranks.
        """
        heads = shards[0].shape[2]
        if heads < self.ranks:
            raise ValueError(f"{heads} attention heads cannot be shared out over {self.ranks} context parallel ranks")
        by_rank = zip(*(x.tensor_split(self.ranks, dim=2) for x in shards), strict=True)
        send = [torch.stack(parts) for parts in by_rank]
        count, batch, _, own, head_dim = send[self.rank].shape
        shares = self._shares(place)
        received = self._exchange(send, [(count, batch, sum(share), own, head_dim) for share in shares])
        streams = zip(*(x.split(share, dim=2) for x, share in zip(received, shares, strict=True)), strict=True)
        return torch.cat([part for stream in streams for part in stream], dim=2).unbind()

    def gather_mask(self, place: Place, mask: Tensor) -> Tensor:
        """`[B, S / ranks]` to `[B, S]`, on every rank."""
        (whole,) = self.gather(place, mask[:, :, None, None].expand(-1, -1, self.ranks, -1))
        return whole[:, :, 0, 0]

    def scatter(self, place: Place, attended: Tensor, heads: int) -> Tensor:
        """`[B, S, H / ranks, D]` back to `[B, S / ranks, H, D]`; `heads` is H."""
        shares = self._shares(place)
        parts = attended.split([share[stream] for stream in (0, 1) for share in shares], dim=1)
        send = [torch.cat((parts[rank], parts[self.ranks + rank]), dim=1) for rank in range(self.ranks)]
        batch, tokens, _, head_dim = send[self.rank].shape
        return torch.cat(
            self._exchange(send, [(batch, tokens, _share(heads, self.ranks, r), head_dim) for r in range(self.ranks)]),
            dim=2,
        )

    def _shares(self, place: Place) -> list[tuple[int, int]]:
        """Tokens of each rank in the two streams that Diffusers splits, each by itself: text, then images."""
        streams = (place.start, place.tokens - place.start)
        return [
            (_share(streams[0], self.ranks, rank), _share(streams[1], self.ranks, rank)) for rank in range(self.ranks)
        ]

    def _exchange(self, send: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        """Give each rank its tensor, and get one from each, of the shape given for it. Differentiable."""
        from torch.distributed._functional_collectives import all_to_all_single_autograd  # not in every build of torch

        sizes = [math.prod(shape) for shape in shapes]
        received = all_to_all_single_autograd(
            torch.cat([x.flatten() for x in send]), sizes, [x.numel() for x in send], self.group
        )
        return [x.view(shape) for x, shape in zip(received.split(sizes), shapes, strict=True)]


def _share(total: int, ranks: int, rank: int) -> int:
    """Of a number split as `torch.tensor_split` does: the first ranks get one more where it is not divisible."""
    return total // ranks + (rank < total % ranks)
