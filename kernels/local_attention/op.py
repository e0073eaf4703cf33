"""`kernels.local_attention`: the public function, the PyTorch operators behind it, and its registration."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .. import checks, dispatch
from ..dispatch import Implementation, Verdict
from . import distributed, gradient

NAME = "local_attention"
MAX_TRITON_HEAD_DIM = 128

# A change of what an operator returns, strides included, needs a new name: compilers cache by it.
OPERATOR = "attnswap::local_attention_v1"
BACKWARD = "attnswap::local_attention_backward_v1"
TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? pooled_key, Tensor? pooled_value, Tensor? key_mask"
NUMBERS = "SymInt height, SymInt width, SymInt grid_offset, float radius, float scale"
# The Triton backend keeps its lists of tiles from call to call: made while a CUDA graph is recorded, they would lie in
# memory that the graph reuses. Since torch 2.9 a compiler can be told to record what is before and after instead.
_NO_CUDA_GRAPH: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Sequence[int],
    radius: float,
    grid_offset: int = 0,
    pooled_key: Tensor | None = None,
    pooled_value: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Circular local attention of a token grid among dense tokens (CLEAR, arXiv 2412.16112).

    Tokens `[grid_offset, grid_offset + h * w)` are a row-major grid; all others, before and after it, are dense both
    ways: they attend to every token, and every token attends to them. A token of the grid attends to the dense tokens,
    to the grid tokens with dy ** 2 + dx ** 2 < radius ** 2, strictly, clipped at the borders, and to all pooled keys.

    Args:
        query, key, value: `[B, S, H, D]`; any strides; fp16, bf16, fp32 (fp64 on the reference and eager backends).
        grid: (h, w) in tokens.
        radius: in tokens, at least 1, whole or not. A radius of 1 is the token itself.
        grid_offset: the first token of the grid.
        pooled_key, pooled_value: `[B, P, H, D]`, both or neither; see `pool_tokens`. Dense queries do not see them.
        key_mask: bool `[B, S]`, True for tokens that may be attended to. A masked token has no influence, whatever it
            holds. A query with no key left is 0.
        scale: positive factor on the scores, D ** -0.5 by default.
        group: a process group over which the rows of one grid are split, in the order of the ranks, at least one row
            each: (h, w) and `key_mask` are those of the rank's own rows, and so are the pooled tokens, if any. Dense
            tokens are the same on every rank. All ranks must call; each gets the outputs of the dense tokens and of its
            own rows, exactly as one process would. Keys and values of the rows within reach go from rank to rank.

    Returns:
        `[B, S, H, D]`, contiguous, in the dtype of `query`.

    Raises:
        ValueError: for shapes, dtypes, devices, a grid or a radius that do not fit, and for a backend asked for by
            name (`use_backend`, ``ATTNSWAP_BACKEND``) that cannot run the call. With a group, on every rank where one
            refuses its arguments or they do not go together, and where a gradient is wanted: there is none.
    """
    check = functools.partial(
        checks.local_attention,
        query,
        key,
        value,
        grid=grid,
        radius=radius,
        grid_offset=grid_offset,
        pooled_key=pooled_key,
        pooled_value=pooled_value,
        key_mask=key_mask,
        scale=scale,
    )
    if group is not None:
        checks.process_group(group)
        return distributed.local_attention(NAME, check, getattr(query, "device", torch.device("cpu")), group)
    call = check()
    numbers = (*call["grid"], call["grid_offset"], call["radius"], call["scale"])
    out: Tensor = _attend(query, key, value, pooled_key, pooled_value, key_mask, *numbers)[0]
    return out


def _call(*arguments: Any) -> dict[str, Any]:
    """The operator's flat arguments as the checked call the implementations take."""
    query, key, value, pooled_key, pooled_value, key_mask, height, width, grid_offset, radius, scale = arguments
    return {
        "query": query,
        "key": key,
        "value": value,
        "grid": (height, width),
        "grid_offset": grid_offset,
        "radius": radius,
        "scale": scale,
        "pooled_key": pooled_key,
        "pooled_value": pooled_value,
        "key_mask": key_mask,
    }


@torch.library.custom_op(
    OPERATOR, mutates_args=(), schema=f"({TENSORS}, {NUMBERS}) -> (Tensor, Tensor)", **_NO_CUDA_GRAPH
)
def _attend(*arguments: Any) -> Any:
    """The output, and the natural logarithm of the softmax denominators, `[B, H, S]`, for backward."""
    # The backend is chosen here, out of the compiler's sight: choosing another one needs no new graph.
    return dispatch.run(NAME, _call(*arguments))


@torch.library.custom_op(
    BACKWARD,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor out, Tensor lse, {TENSORS}, {NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _attend_backward(grad: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> Any:
    """Gradients of query, key, value and the pooled keys and values; these are empty where there are none."""
    with torch.autocast(grad.device.type, enabled=False):
        return gradient.local_attention_backward(grad, out, lse, **_call(*arguments))


@_attend.register_fake
def _(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty((batch, heads, tokens), dtype=dtype)


@_attend_backward.register_fake
def _(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor | None,
    pooled_value: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return tuple(gradient.like(x, query) for x in (query, key, value, pooled_key, pooled_value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.height, ctx.width, ctx.grid_offset, ctx.radius, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _grad(ctx: Any, grad: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
    numbers = (ctx.height, ctx.width, ctx.grid_offset, ctx.radius, ctx.scale)
    saved = ctx.saved_tensors  # once: gradient checkpointing allows no more
    gradients = _attend_backward(grad, *saved, *numbers)
    pooled = saved[5] is not None
    return *(gradients if pooled else (*gradients[:3], None, None)), *([None] * 6)


_attend.register_autograd(_grad, setup_context=_keep)


def _triton_can_run(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Verdict:
    if query.dtype == torch.float64:
        return Verdict(False, "float64 is for the reference and eager backends")
    if query.shape[-1] > MAX_TRITON_HEAD_DIM:
        return Verdict(False, f"head dimension {query.shape[-1]} is above {MAX_TRITON_HEAD_DIM}")
    tensors = {"query": query, "key": key, "value": value}
    tensors |= {name: rest[name] for name in ("pooled_key", "pooled_value") if rest.get(name) is not None}
    copied = [name for name, x in tensors.items() if x.stride(-1) != 1]
    if copied:
        return Verdict(True, f"{', '.join(copied)} copied first: head dimension not contiguous")
    return Verdict(True, "reads the tensors in place")


_PACKAGE = __name__.rpartition(".")[0]
dispatch.register(
    NAME,
    check=checks.local_attention,
    implementations=(
        Implementation("triton", f"{_PACKAGE}.triton:{NAME}", can_run=_triton_can_run),
        Implementation("eager", f"{_PACKAGE}.eager:{NAME}"),
        Implementation("reference", f"{_PACKAGE}.reference:{NAME}"),
    ),
)
