"""How many keys there are: one number for all samples, or one for each where keys are masked."""

from __future__ import annotations

import torch
from torch import Tensor


def key_count(key: Tensor, key_mask: Tensor | None) -> int | Tensor:
    """The number of keys that may be attended to: an integer without a mask, else int64 `[B]`."""
    return key.shape[1] if key_mask is None else key_mask.sum(1)


def scaled_eps(count: int | Tensor, eps: float, like: Tensor) -> Tensor:
    """`eps` of the denominator of means, for a denominator of sums: `[B]`, where `like` is `[B, ...]`.

    A sample without keys counts as one key: its sums are 0, and 0 / eps is the 0 that it must give.
    """
    if not isinstance(count, Tensor):
        return torch.full(like.shape[:1], count * eps, dtype=like.dtype, device=like.device)
    return count.clamp(min=1).to(like.dtype) * eps
