"""The sums of linear attention over the ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor


def all_reduce_sums(
    state: Tensor, key_sum: Tensor, count: int | Tensor, group: torch.distributed.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """State, key sum and count of all ranks, in one message; the count as int64 `[B]`."""
    batch = state.shape[0]
    if not isinstance(count, Tensor):
        count = torch.full((batch,), count, device=state.device)
    message = torch.cat((state.flatten(1), key_sum.flatten(1), count.to(state.dtype)[:, None]), dim=1)
    sums = _AllReduce.apply(message, group)
    sizes = [state[0].numel(), key_sum[0].numel(), 1]
    total_state, total_key_sum, total_count = sums.split(sizes, dim=1)
    return (
        total_state.reshape(state.shape),
        total_key_sum.reshape(key_sum.shape),
        total_count.detach()[:, 0].to(torch.int64),
    )


class _AllReduce(torch.autograd.Function):
    """A sum over ranks. Each rank's part goes into the result of every rank, so the gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, message: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        message = message.clone()
        torch.distributed.all_reduce(message, group=group)
        return message

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None
