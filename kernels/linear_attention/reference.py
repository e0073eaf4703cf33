"""The definition of linear attention, in fp32 (fp64 stays fp64)."""

from __future__ import annotations

import torch
from torch import Tensor

from .counts import key_count, scaled_eps


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, eps: float, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the state and the key sum, which backward needs."""
    state, key_sum = linear_attention_state(key, value, key_mask=key_mask)
    return linear_attention_apply(query, state, key_sum, key_count(key, key_mask), eps=eps), state, key_sum


def linear_attention_state(key: Tensor, value: Tensor, *, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    features, value = _features(key), value.to(_accumulator(value))
    if key_mask is not None:  # only now: a key of zeros has features of 1
        hidden = ~key_mask[:, :, None, None]
        features, value = features.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
    return torch.einsum("bnhd,bnhe->bhde", features, value), features.sum(1)


def linear_attention_apply(query: Tensor, state: Tensor, key_sum: Tensor, count: int | Tensor, *, eps: float) -> Tensor:
    features = _features(query)
    numerator = torch.einsum("bnhd,bhde->bnhe", features, state)
    denominator = torch.einsum("bnhd,bhd->bnh", features, key_sum) + scaled_eps(count, eps, key_sum)[:, None, None]
    return (numerator / denominator[..., None]).to(query.dtype).contiguous()


def _features(x: Tensor) -> Tensor:
    """ELU(x) + 1, without the digits that the sum of -1 and 1 would cost."""
    x = x.to(_accumulator(x))
    return torch.where(x > 0, x + 1, x.exp())


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
