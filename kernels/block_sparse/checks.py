"""Validation of everything the operations of `block_sparse/` accept.

As in `kernels/checks.py`: each function takes the public arguments, raises `ValueError` with the numbers in the
message, and returns the arguments in the normal form every implementation receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import (
    heads_last_tensor,
    int_pair,
    same_dtype_and_device,
    scale_or_default,
    self_attention_tensors,
    shape_of,
)
from .mask import BlockMask

INTEGERS = (torch.int32, torch.int64)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> dict[str, Any]:
    """Normal form of `kernels.dense_attention`; `return_lse` is for the caller alone."""
    self_attention_tensors(query, key, value)
    return {
        "query": query,
        "key": key,
        "value": value,
        "kv_lengths": lengths_tensor(kv_lengths, query.shape[0], query.device),
        "scale": scale_or_default(scale, query.shape[-1]),
    }


def block_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    *,
    block: Sequence[int] = (64, 64),
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """Normal form of `kernels.block_scores`."""
    for name, tensor in (("query", query), ("key", key)):
        heads_last_tensor(name, tensor)
    if key.shape != query.shape:
        raise ValueError(f"query is {shape_of(query)} but key is {shape_of(key)}; the shapes must be equal")
    same_dtype_and_device("query", query, "key", key)
    if lse is not None:
        lse_tensor("lse", lse, query)
    return {
        "query": query,
        "key": key,
        "lse": lse,
        "block": int_pair("block", block, minimum=1),
        "kv_lengths": lengths_tensor(kv_lengths, query.shape[0], query.device),
        "scale": scale_or_default(scale, query.shape[-1]),
    }


def dense_attention_with_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse_ref: Tensor,
    *,
    block: Sequence[int] = (64, 64),
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """Normal form of `kernels.dense_attention_with_scores`."""
    call = dense_attention(query, key, value, kv_lengths=kv_lengths, scale=scale)
    lse_tensor("lse_ref", lse_ref, query)
    return call | {"lse_ref": lse_ref, "block": int_pair("block", block, minimum=1)}


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> dict[str, Any]:
    """Normal form of `kernels.block_sparse_attention`; `return_lse` is for the caller alone."""
    call = dense_attention(query, key, value, kv_lengths=kv_lengths, scale=scale)
    if not isinstance(mask, BlockMask):
        raise ValueError(f"mask must be a BlockMask, not {type(mask).__name__}; see BlockMask.from_dense")
    batch, tokens, heads, _ = query.shape
    needed = (batch, heads, -(-tokens // mask.block[0]), -(-tokens // mask.block[1]))
    if mask.shape != needed:
        raise ValueError(
            f"a query of {shape_of(query)} in blocks of {mask.block[0]} x {mask.block[1]} needs a mask of "
            f"[{', '.join(map(str, needed))}], got [{', '.join(map(str, mask.shape))}]"
        )
    if mask.device != query.device:
        raise ValueError(f"mask is on {mask.device} but query is on {query.device}")
    return call | {"mask": mask}


def lse_tensor(name: str, lse: Tensor, query: Tensor) -> None:
    """A log-sum-exp `[B, H, S]` for `query`, in the dtype of its sums."""
    batch, tokens, heads, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    if not isinstance(lse, Tensor):
        raise ValueError(f"{name} must be a tensor [batch, heads, tokens], not {type(lse).__name__}")
    if lse.shape != (batch, heads, tokens) or lse.dtype != dtype:
        raise ValueError(
            f"for a {query.dtype} query of {shape_of(query)}, {name} must be {dtype} [{batch}, {heads}, {tokens}], "
            f"got {lse.dtype} {shape_of(lse)}"
        )
    if lse.device != query.device:
        raise ValueError(f"{name} is on {lse.device} but query is on {query.device}")


def lengths_tensor(kv_lengths: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
    """Numbers of keys, int32 or int64 `[B]`, on the CPU or on `device`; or None. Their values: `lengths_within`."""
    if kv_lengths is None:
        return None
    if not isinstance(kv_lengths, Tensor):
        raise ValueError(f"kv_lengths must be an integer tensor [batch], not {type(kv_lengths).__name__}")
    if kv_lengths.dtype not in INTEGERS or kv_lengths.shape != (batch,):
        raise ValueError(
            f"kv_lengths must be int32 or int64 [batch] = [{batch}], got {kv_lengths.dtype} {shape_of(kv_lengths)}"
        )
    if kv_lengths.device.type != "cpu" and kv_lengths.device != device:
        raise ValueError(f"kv_lengths is on {kv_lengths.device}; it must be on the CPU or on {device}")
    return kv_lengths


def lengths_within(kv_lengths: Tensor | None, tokens: int) -> None:
    """Each length is 0 to `tokens`, where that can be read without waiting for an accelerator."""
    if kv_lengths is None or kv_lengths.device.type != "cpu":
        return
    for entry, length in enumerate(kv_lengths.tolist()):
        if not 0 <= length <= tokens:
            raise ValueError(f"kv_lengths must be 0 to {tokens}, the number of tokens; entry {entry} is {length}")
