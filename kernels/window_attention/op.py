"""`kernels.window_attention`: the public function, the PyTorch operator behind it, and its registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks, dispatch
from ..dispatch import Implementation, Verdict
from . import eager

NAME = "window_attention"
MAX_TRITON_HEAD_DIM = 256

# A change of what the operator returns, strides included, needs a new name: compilers cache by it.
OPERATOR = "attnswap::window_attention_v1"
SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor shift, "
    "SymInt height, SymInt width, SymInt rows, SymInt columns, float scale) -> Tensor"
)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Sequence[int],
    windows: Sequence[int] = (2, 2),
    shift: Sequence[int] | Tensor = (0, 0),
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Self-attention inside shifted windows of a token grid (MSW-MSA of HiDiffusion, arXiv 2311.17528).

    The grid is rolled cyclically by `shift` and cut into `windows`; each token attends to the tokens of its window.
    No mask is laid across the wrap: tokens from opposite borders that meet in a window attend to each other.

    Args:
        query, key, value: `[B, S, H, D]`, S = h * w row-major tokens; any strides; fp16, bf16, fp32 (fp64 on the
            reference and eager backends).
        grid: (h, w) in tokens.
        windows: (a, b), windows along each axis. An axis that does not divide gives uneven windows as
            `torch.tensor_split` does: larger ones first, sizes differing by at most one. (1, 1) is dense attention.
        shift: (shift_y, shift_x) in tokens, any integers: rolled position (y, x) holds token
            ((y + shift_y) mod h, (x + shift_x) mod w). Give an int64 tensor `[2]`, on the CPU or on the device of
            `query`, to change it in a compiled graph without recompiling. Neither form waits for the device.
        scale: positive factor on the scores, D ** -0.5 by default.
        key_mask: bool `[B, S]`, True for tokens that may be attended to, in the order of `key`. A masked token has
            no influence, whatever it holds. A row with no key left is 0.

    Returns:
        `[B, S, H, D]`, contiguous, in the dtype of `query`.

    Raises:
        ValueError: for shapes, dtypes, devices, grids or windows that do not fit, and for a backend asked for by
            name (`use_backend`, ``ATTNSWAP_BACKEND``) that cannot run the call.
    """
    call = checks.window_attention(
        query, key, value, grid=grid, windows=windows, shift=shift, scale=scale, key_mask=key_mask
    )
    out: Tensor = _operator(
        query, key, value, call["key_mask"], call["shift"], *call["grid"], *call["windows"], call["scale"]
    )
    return out


def _call(*arguments: Any) -> dict[str, Any]:
    """The operator's flat arguments as the checked call the implementations take."""
    query, key, value, key_mask, shift, height, width, rows, columns, scale = arguments
    return {
        "query": query,
        "key": key,
        "value": value,
        "grid": (height, width),
        "windows": (rows, columns),
        "shift": shift,
        "scale": scale,
        "key_mask": key_mask,
    }


@torch.library.custom_op(OPERATOR, mutates_args=(), schema=SCHEMA)
def _operator(*arguments: Any) -> Tensor:
    # The backend is chosen here, out of the compiler's sight: choosing another one needs no new graph.
    out: Tensor = dispatch.run(NAME, _call(*arguments))
    return out


@_operator.register_fake
def _(query: Tensor, *arguments: Any) -> Tensor:
    return query.new_empty(query.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, key_mask, shift, *ctx.numbers = inputs
    ctx.save_for_backward(query, key, value, key_mask, shift)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients by eager recomputation, whichever backend ran forward."""
    query, key, value, key_mask, shift = ctx.saved_tensors
    with torch.enable_grad():
        tensors = [x.detach().requires_grad_() for x in (query, key, value)]
        out = eager.window_attention(**_call(*tensors, key_mask, shift, *ctx.numbers))
        gradients = torch.autograd.grad(out, tensors, grad)
    return *gradients, *([None] * (len(ctx.numbers) + 2))


_operator.register_autograd(_backward, setup_context=_setup_context)


def _triton_can_run(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Verdict:
    if query.dtype == torch.float64:
        return Verdict(False, "float64 is for the reference and eager backends")
    if query.shape[-1] > MAX_TRITON_HEAD_DIM:
        return Verdict(False, f"head dimension {query.shape[-1]} is above {MAX_TRITON_HEAD_DIM}")
    copied = [name for name, x in (("query", query), ("key", key), ("value", value)) if x.stride(-1) != 1]
    if copied:
        return Verdict(True, f"{', '.join(copied)} copied first: head dimension not contiguous")
    return Verdict(True, "reads the tensors in place")


_PACKAGE = __name__.rpartition(".")[0]
dispatch.register(
    NAME,
    check=checks.window_attention,
    implementations=(
        Implementation("triton", f"{_PACKAGE}.triton:{NAME}", can_run=_triton_can_run),
        Implementation("eager", f"{_PACKAGE}.eager:{NAME}"),
        Implementation("reference", f"{_PACKAGE}.reference:{NAME}"),
    ),
)
