"""The four operations of adaptive block-sparse attention: public functions, PyTorch operators, registration.

Each backend (`reference`, `eager`, `triton`) has one function of the same name for each operation, which takes the
checked call of `checks.py` by keyword: tensors, a `BlockMask` or a `block`, `kv_lengths` and the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..dispatch import Implementation, Verdict
from . import checks
from .mask import MAX_LISTED, BlockMask

DENSE = "dense_attention"
SCORES = "block_scores"
DENSE_WITH_SCORES = "dense_attention_with_scores"
SPARSE = "block_sparse_attention"
MAX_TRITON_HEAD_DIM = 128
TRITON_BLOCKS = (16, 32, 64, 128)

# A change of what an operator returns, strides included, needs a new name: compilers cache by it.
QKV = "Tensor query, Tensor key, Tensor value"
REST = "Tensor? kv_lengths, float scale"
BLOCK = "SymInt block_q, SymInt block_k"


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention that can return its log-sum-exp. No gradient.

    Args:
        query, key, value: `[B, S, H, D]`; any strides; fp16, bf16, fp32 (fp64 on the reference and eager backends).
        kv_lengths: integers `[B]`, 0 to S each, on the CPU or with the query. Keys from there on are not seen, whatever
            they hold; their queries attend to the seen keys as all others do.
        scale: positive factor on the scores, D ** -0.5 by default.
        return_lse: return the natural logarithm of the softmax denominators too.

    Returns:
        `[B, S, H, D]`, contiguous, in the dtype of `query`; with `return_lse` also fp32 `[B, H, S]` (fp64 for fp64).
        Without any key the output is 0 and its log-sum-exp -inf.

    Raises:
        ValueError: for shapes, dtypes, devices or lengths that do not fit, and for a backend asked for by name
            (`use_backend`, ``ATTNSWAP_BACKEND``) that cannot run the call.
    """
    call = checks.dense_attention(query, key, value, kv_lengths=kv_lengths, scale=scale)
    out, lse = _dense(query, key, value, call["kv_lengths"], call["scale"])
    return (out, lse) if return_lse else out


def block_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    *,
    block: Sequence[int] = (64, 64),
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention weights summed over tiles, without the values: the search of AdaSpa (arXiv 2502.21079, algorithm 2).

    The score of a tile is the sum over its queries and keys of exp(q·k * scale - lse[query]). With the log-sum-exp of
    these very tensors the scores of a row of tiles sum to its number of queries. With that of an earlier denoising
    step one pass is enough as well: a row is weighted by exp(its present log-sum-exp - `lse`), and the present one is
    returned.

    Args:
        query, key: as in `dense_attention`.
        lse: fp32 `[B, H, S]` (fp64 for fp64), the reference; None for the present one, at the cost of a second pass.
            A row whose reference is not finite has its present one. Exponents are clamped to -80 and 60: a row is
            exact if its returned log-sum-exp is less than 59 above the reference and less than 60 below it.
        block: (queries, keys) of a tile, at least 1 each; the last ones may be shorter.
        kv_lengths: as in `dense_attention`; the queries from there on count for nothing in the scores.
        scale: as in `dense_attention`.

    Returns:
        Scores `[B, H, ceil(S / block[0]), ceil(S / block[1])]` and the present log-sum-exp `[B, H, S]`, both fp32
        (fp64 for fp64).

    Raises:
        ValueError: as `dense_attention`; for a `block` that is not two positive integers.
    """
    call = checks.block_scores(query, key, lse, block=block, kv_lengths=kv_lengths, scale=scale)
    scores, present = _scores(query, key, lse, *call["block"], call["kv_lengths"], call["scale"])
    return scores, present


def dense_attention_with_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse_ref: Tensor,
    *,
    block: Sequence[int] = (64, 64),
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dense_attention` and `block_scores` together: one pass where the backend and the dtype allow it.

    Args:
        query, key, value, kv_lengths, scale: as in `dense_attention`.
        lse_ref, block: as `lse` and `block` in `block_scores`.

    Returns:
        The output `[B, S, H, D]` and its log-sum-exp `[B, H, S]`, and the scores as `block_scores` gives them.

    Raises:
        ValueError: as `block_scores`.
    """
    call = checks.dense_attention_with_scores(
        query, key, value, lse_ref, block=block, kv_lengths=kv_lengths, scale=scale
    )
    out, lse, scores = _dense_with_scores(query, key, value, lse_ref, *call["block"], call["kv_lengths"], call["scale"])
    return out, lse, scores


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the key blocks that `mask` keeps for each block of queries. No gradient.

    Args:
        query, key, value, kv_lengths, scale, return_lse: as in `dense_attention`.
        mask: which key blocks each block of queries sees, for each batch entry and head; on the device of `query`.

    Returns:
        As `dense_attention`. A query that sees no key is 0, its log-sum-exp -inf. Outputs over two masks that share
        no block can be merged through the log-sum-exp.

    Raises:
        ValueError: as `dense_attention`; for a mask of another batch, heads, length or device.
    """
    call = checks.block_sparse_attention(query, key, value, mask, kv_lengths=kv_lengths, scale=scale)
    out, lse = _sparse(
        query, key, value, mask.bits, mask.counts, *mask.block, mask.capacity, call["kv_lengths"], call["scale"]
    )
    return (out, lse) if return_lse else out


# Operators. The backend is chosen inside, out of the compiler's sight: choosing another one needs no new graph.


@torch.library.custom_op("attnswap::dense_attention_v1", mutates_args=(), schema=f"({QKV}, {REST}) -> (Tensor, Tensor)")
def _dense(query: Tensor, key: Tensor, value: Tensor, kv_lengths: Tensor | None, scale: float) -> Any:
    return _run(DENSE, {"query": query, "key": key, "value": value, "kv_lengths": kv_lengths, "scale": scale})


@torch.library.custom_op(
    "attnswap::block_scores_v1",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor? lse, {BLOCK}, {REST}) -> (Tensor, Tensor)",
)
def _scores(
    query: Tensor, key: Tensor, lse: Tensor | None, block_q: int, block_k: int, kv_lengths: Tensor | None, scale: float
) -> Any:
    call = {"query": query, "key": key, "lse": lse, "block": (block_q, block_k)}
    return _run(SCORES, call | {"kv_lengths": kv_lengths, "scale": scale})


@torch.library.custom_op(
    "attnswap::dense_attention_with_scores_v1",
    mutates_args=(),
    schema=f"({QKV}, Tensor lse_ref, {BLOCK}, {REST}) -> (Tensor, Tensor, Tensor)",
)
def _dense_with_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse_ref: Tensor,
    block_q: int,
    block_k: int,
    kv_lengths: Tensor | None,
    scale: float,
) -> Any:
    call = {"query": query, "key": key, "value": value, "lse_ref": lse_ref, "block": (block_q, block_k)}
    return _run(DENSE_WITH_SCORES, call | {"kv_lengths": kv_lengths, "scale": scale})


@torch.library.custom_op(
    "attnswap::block_sparse_attention_v1",
    mutates_args=(),
    schema=f"({QKV}, Tensor bits, Tensor counts, {BLOCK}, SymInt capacity, {REST}) -> (Tensor, Tensor)",
)
def _sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bits: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    capacity: int,
    kv_lengths: Tensor | None,
    scale: float,
) -> Any:
    mask = BlockMask(bits, counts, -(-key.shape[1] // block_k), (block_q, block_k), capacity)
    call = {"query": query, "key": key, "value": value, "mask": mask}
    return _run(SPARSE, call | {"kv_lengths": kv_lengths, "scale": scale})


def _run(name: str, call: dict[str, Any]) -> Any:
    # Values are looked at here and not in the public function, where a compiler would have to look too.
    checks.lengths_within(call["kv_lengths"], call["query"].shape[1])
    return dispatch.run(name, call)


def _like_lse(query: Tensor) -> Tensor:
    batch, tokens, heads, _ = query.shape
    return query.new_empty((batch, heads, tokens), dtype=torch.promote_types(query.dtype, torch.float32))


def _like_scores(query: Tensor, block_q: int, block_k: int) -> Tensor:
    batch, tokens, heads, _ = query.shape
    shape = (batch, heads, -(-tokens // block_q), -(-tokens // block_k))
    return query.new_empty(shape, dtype=torch.promote_types(query.dtype, torch.float32))


@_dense.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), _like_lse(query)


@_scores.register_fake
def _(query: Tensor, key: Tensor, lse: Tensor | None, block_q: int, block_k: int, *rest: Any) -> tuple[Tensor, Tensor]:
    return _like_scores(query, block_q, block_k), _like_lse(query)


@_dense_with_scores.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, lse_ref: Tensor, block_q: int, block_k: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), _like_lse(query), _like_scores(query, block_q, block_k)


@_sparse.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), _like_lse(query)


def _triton_can_run(query: Tensor, key: Tensor, **rest: Any) -> Verdict:
    if query.dtype == torch.float64:
        return Verdict(False, "float64 is for the reference and eager backends")
    if query.shape[-1] > MAX_TRITON_HEAD_DIM:
        return Verdict(False, f"head dimension {query.shape[-1]} is above {MAX_TRITON_HEAD_DIM}")
    block = rest["mask"].block if "mask" in rest else rest.get("block", (64, 64))
    if not all(side in TRITON_BLOCKS for side in block):
        sides = ", ".join(map(str, TRITON_BLOCKS))
        return Verdict(False, f"the sides of a block must be of {sides}, got {block[0]} x {block[1]}")
    if "mask" in rest and rest["mask"].capacity > MAX_LISTED:
        return Verdict(False, f"the mask may keep {rest['mask'].capacity} pairs of blocks, more than {MAX_LISTED}")
    tensors = {"query": query, "key": key} | ({"value": rest["value"]} if "value" in rest else {})
    copied = [name for name, x in tensors.items() if x.stride(-1) != 1]
    if copied:
        return Verdict(True, f"{', '.join(copied)} copied first: head dimension not contiguous")
    return Verdict(True, "reads the tensors in place")


def _prefer_triton_dense(kv_lengths: Tensor | None = None, **rest: Any) -> Verdict:
    if kv_lengths is not None and kv_lengths.device.type != "cpu":
        return Verdict(
            True, "the lengths of the keys are on the GPU, where PyTorch's kernels take them as a dense bias"
        )
    return Verdict(False, "PyTorch's own kernels return the log-sum-exp and are the faster dense attention")


_PACKAGE = __name__.rpartition(".")[0]
for _name, _check in (
    (DENSE, checks.dense_attention),
    (SCORES, checks.block_scores),
    (DENSE_WITH_SCORES, checks.dense_attention_with_scores),
    (SPARSE, checks.block_sparse_attention),
):
    _preference = {"prefer": _prefer_triton_dense} if _name == DENSE else {}
    dispatch.register(
        _name,
        check=_check,
        implementations=(
            Implementation("triton", f"{_PACKAGE}.triton:{_name}", can_run=_triton_can_run, **_preference),
            Implementation("eager", f"{_PACKAGE}.eager:{_name}"),
            Implementation("reference", f"{_PACKAGE}.reference:{_name}"),
        ),
        part_of=None if _name == SPARSE else SPARSE,
    )
