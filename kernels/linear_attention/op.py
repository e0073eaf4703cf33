"""The public functions of linear attention, the PyTorch operators behind them, and their registration."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .. import checks, dispatch
from ..dispatch import Implementation, Verdict
from . import gradient
from .counts import key_count
from .distributed import all_reduce_sums

NAME, STATE, APPLY = "linear_attention", "linear_attention_state", "linear_attention_apply"
MAX_TRITON_HEAD_DIM = 160

# A change of what an operator returns, strides included, needs a new name: compilers cache by it.
OPERATOR = "attnswap::linear_attention_v1"
STATE_OPERATOR = "attnswap::linear_attention_state_v1"
APPLY_OPERATOR = "attnswap::linear_attention_apply_v1"


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    eps: float = 1e-4,
    key_mask: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Attention without softmax, linear in the number of tokens, as in LinFusion (arXiv 2409.02097).

    With phi(x) = ELU(x) + 1 and N keys, the output of query q is
    (phi(q)·Σ phi(k) v^T / N) / (phi(q)·Σ phi(k) / N + eps). There is no scale. Sums are taken and the quotient is
    formed in fp32 (fp64 for fp64), so that fp16 inputs of any size give finite outputs.

    Args:
        query: `[B, Sq, H, D]`; any strides; fp16, bf16, fp32 (fp64 on the reference and eager backends).
        key, value: `[B, N, H, D]`. N may differ from Sq.
        eps: positive; added to the denominator of the means, as above.
        key_mask: bool `[B, N]`, True for keys that may be attended to. A masked key has no influence, whatever it
            holds, and does not count in N. A sample with no key left is 0.
        group: a process group over which the tokens are split: every rank gives its own tokens, at least one, and
            gets the output of its own queries over the keys of all ranks. Slices may have different lengths. One
            message of B (H D (D + 1) + 1) numbers is summed over the ranks forward, and one backward; so all ranks
            must call, and where gradients are wanted, all must run backward, of the sum of their losses.

    Returns:
        `[B, Sq, H, D]`, contiguous, in the dtype of `query`. A NaN stays in its batch entry and head.

    Raises:
        ValueError: for shapes, dtypes, devices or an eps that do not fit, and for a backend asked for by name
            (`use_backend`, ``ATTNSWAP_BACKEND``) that cannot run the call.
    """
    call = checks.linear_attention(query, key, value, eps=eps, key_mask=key_mask, group=group)
    if group is None:
        out: Tensor = _attend(query, key, value, key_mask, call["eps"])[0]
        return out
    state, key_sum = _state(key, value, key_mask)
    sums = all_reduce_sums(state, key_sum, key_count(key, key_mask), group)
    return linear_attention_apply(query, *sums, eps=eps)


def linear_attention_state(
    key: Tensor, value: Tensor, *, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, int | Tensor]:
    """The sums over keys that linear attention needs; those of parts of the keys add up to those of all.

    Args:
        key, value, key_mask: as in `linear_attention`.

    Returns:
        `(state, key_sum, count)`: Σ phi(k) v^T, `[B, H, D, D]`, and Σ phi(k), `[B, H, D]`, in fp32 (fp64 for fp64), and
        the number of keys: an integer without a mask, int64 `[B]` with one.

    Raises:
        ValueError: as `linear_attention`.
    """
    checks.linear_attention_state(key, value, key_mask=key_mask)
    state, key_sum = _state(key, value, key_mask)
    return state, key_sum, key_count(key, key_mask)


def linear_attention_apply(
    query: Tensor, state: Tensor, key_sum: Tensor, count: int | Tensor, *, eps: float = 1e-4
) -> Tensor:
    """Linear attention of queries to keys that are known by their sums alone.

    Args:
        query: `[B, Sq, H, D]`.
        state, key_sum, count: as `linear_attention_state` returns them, or sums of such; a count may be a tensor of
            one number, too.
        eps: as in `linear_attention`.

    Returns:
        `[B, Sq, H, D]`, contiguous, in the dtype of `query`; 0 where a tensor `count` is 0.

    Raises:
        ValueError: as `linear_attention`.
    """
    call = checks.linear_attention_apply(query, state, key_sum, count, eps=eps)
    keys = call["count"]
    if not isinstance(keys, Tensor):
        keys = torch.full(query.shape[:1], keys, dtype=torch.int64, device=query.device)
    out: Tensor = _apply(query, state, key_sum, keys, call["eps"])
    return out


# Operators. The backend is chosen inside, out of the compiler's sight: choosing another one needs no new graph. The
# gradients are operators too, so that a compiler sees one node and not every chunk.


@torch.library.custom_op(
    OPERATOR,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? key_mask, float eps) -> (Tensor, Tensor, Tensor)",
)
def _attend(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, eps: float) -> Any:
    """The output, and the sums for backward."""
    return dispatch.run(NAME, {"query": query, "key": key, "value": value, "eps": eps, "key_mask": key_mask})


@torch.library.custom_op(
    STATE_OPERATOR, mutates_args=(), schema="(Tensor key, Tensor value, Tensor? key_mask) -> (Tensor, Tensor)"
)
def _state(key: Tensor, value: Tensor, key_mask: Tensor | None) -> Any:
    return dispatch.run(STATE, {"key": key, "value": value, "key_mask": key_mask})


@torch.library.custom_op(
    APPLY_OPERATOR,
    mutates_args=(),
    schema="(Tensor query, Tensor state, Tensor key_sum, Tensor count, float eps) -> Tensor",
)
def _apply(query: Tensor, state: Tensor, key_sum: Tensor, count: Tensor, eps: float) -> Any:
    return dispatch.run(APPLY, {"query": query, "state": state, "key_sum": key_sum, "count": count, "eps": eps})


@torch.library.custom_op(
    "attnswap::linear_attention_backward_v1",
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor state, Tensor key_sum, "
    "float eps) -> (Tensor, Tensor, Tensor)",
)
def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    state: Tensor,
    key_sum: Tensor,
    eps: float,
) -> Any:
    with torch.autocast(grad.device.type, enabled=False):
        grad_query, *sums = gradient.apply_backward(grad, query, state, key_sum, key_count(key, key_mask), eps=eps)
        return grad_query, *gradient.state_backward(*sums, key, value, key_mask=key_mask)


@torch.library.custom_op(
    "attnswap::linear_attention_state_backward_v1",
    mutates_args=(),
    schema="(Tensor grad_state, Tensor grad_key_sum, Tensor key, Tensor value, Tensor? key_mask) -> (Tensor, Tensor)",
)
def _state_backward(
    grad_state: Tensor, grad_key_sum: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None
) -> Any:
    with torch.autocast(key.device.type, enabled=False):
        return gradient.state_backward(grad_state, grad_key_sum, key, value, key_mask=key_mask)


@torch.library.custom_op(
    "attnswap::linear_attention_apply_backward_v1",
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor state, Tensor key_sum, Tensor count, float eps) "
    "-> (Tensor, Tensor, Tensor)",
)
def _apply_backward(grad: Tensor, query: Tensor, state: Tensor, key_sum: Tensor, count: Tensor, eps: float) -> Any:
    with torch.autocast(grad.device.type, enabled=False):
        return gradient.apply_backward(grad, query, state, key_sum, count, eps=eps)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_state.register_fake
def _fake_state(key: Tensor, value: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, _, heads, head_dim = key.shape
    dtype = torch.promote_types(key.dtype, torch.float32)
    return (
        key.new_empty((batch, heads, head_dim, head_dim), dtype=dtype),
        key.new_empty((batch, heads, head_dim), dtype=dtype),
    )


@_attend.register_fake
def _fake_attend(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    return _like(query), *_fake_state(key, value, key_mask)


_apply.register_fake(lambda query, *rest: _like(query))
_attend_backward.register_fake(lambda grad, query, key, value, *rest: (_like(query), _like(key), _like(value)))
_state_backward.register_fake(lambda grad_state, grad_key_sum, key, value, key_mask: (_like(key), _like(value)))
_apply_backward.register_fake(lambda grad, query, state, key_sum, *rest: (_like(query), _like(state), _like(key_sum)))


def _keep_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _grad_attend(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    return *_attend_backward(grad, *ctx.saved_tensors, ctx.eps), None, None


def _keep_state(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _grad_state(ctx: Any, grad_state: Tensor, grad_key_sum: Tensor) -> tuple[Tensor | None, ...]:
    return *_state_backward(grad_state, grad_key_sum, *ctx.saved_tensors), None


def _keep_apply(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _grad_apply(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_apply_backward(grad, *ctx.saved_tensors, ctx.eps), None, None


_attend.register_autograd(_grad_attend, setup_context=_keep_attend)
_state.register_autograd(_grad_state, setup_context=_keep_state)
_apply.register_autograd(_grad_apply, setup_context=_keep_apply)


def _triton_can_run(**call: Any) -> Verdict:
    tensors = {name: call[name] for name in ("query", "key", "value") if name in call}
    first = next(iter(tensors.values()))
    if first.dtype == torch.float64:
        return Verdict(False, "float64 is for the reference and eager backends")
    if first.shape[-1] > MAX_TRITON_HEAD_DIM:
        return Verdict(False, f"head dimension {first.shape[-1]} is above {MAX_TRITON_HEAD_DIM}")
    copied = [name for name, x in tensors.items() if x.stride(-1) != 1]
    if copied:
        return Verdict(True, f"{', '.join(copied)} copied first: head dimension not contiguous")
    return Verdict(True, "reads the tensors in place")


_PACKAGE = __name__.rpartition(".")[0]
for _name, _check, _part_of in (
    (NAME, checks.linear_attention, None),
    (STATE, checks.linear_attention_state, NAME),
    (APPLY, checks.linear_attention_apply, NAME),
):
    dispatch.register(
        _name,
        check=_check,
        implementations=(
            Implementation("triton", f"{_PACKAGE}.triton:{_name}", can_run=_triton_can_run),
            Implementation("eager", f"{_PACKAGE}.eager:{_name}"),
            Implementation("reference", f"{_PACKAGE}.reference:{_name}"),
        ),
        part_of=_part_of,
    )
