"""Linear attention in Triton: one pass over keys and values, one over the queries.

The state pass is split over the tokens. Its parts lie side by side in memory and are added by a kernel of their own,
always in the same order, so that two runs give the same bits. Tensors are read where they lie, and what is written
beyond the output is a D x (D + 1) matrix for each part, head and sample.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..targets import TARGETS, Config, Shipped, Target, target_of
from .counts import key_count

# Sizes and strides change from call to call; left unspecialised, they never cause a second compilation. What matters
# of the strides is given by the constant ALIGNMENT, the unit they are counted in: rows known to start on 16 bytes are
# loaded 16 bytes at a time.
STATE_UNSPECIALISED = [
    *(f"stride_{tensor}{axis}" for tensor in "kv" for axis in "bsh"),
    *("heads", "length", "splits", "split_tokens", "part_stride"),
]
SUM_UNSPECIALISED = ["splits", "states", "elements"]
APPLY_UNSPECIALISED = [*(f"stride_q{axis}" for axis in "bsh"), "heads", "length", "ranges", "range_tokens", "bias"]

# Programs for each multiprocessor, and the tokens of a part: fewer do not pay for the second kernel, and more would
# let the tensor cores, which cut off digits as they accumulate, show in fp16.
PROGRAMS_PER_SM = 4
MIN_SPLIT, MAX_SPLIT = 2048, 8192
SUM_ELEMENTS, SUM_PARTS = 256, 16


@triton.jit
def _features(x):
    """ELU(x) + 1 in fp32."""
    x = x.to(tl.float32)
    return tl.where(x > 0.0, x + 1.0, tl.exp(x))


@triton.jit
def _offset(index, stride, ALIGNMENT: tl.constexpr):
    """In elements: tensors may have more than 2 ** 31."""
    return index.to(tl.int64) * stride * ALIGNMENT


@triton.jit(do_not_specialize=STATE_UNSPECIALISED)
def linear_attention_state_kernel(
    k_ptr, v_ptr, mask_ptr, state_ptr, key_sum_ptr,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    heads, length, splits, split_tokens, part_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Some columns of the state of one head, over a part of the tokens. Heads run first: they share memory sectors."""
    COLUMNS: tl.constexpr = (HEAD_DIM + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    head = program % heads
    column = program // heads % COLUMNS * BLOCK_N
    split = program // heads // COLUMNS % splits
    sample = program // heads // COLUMNS // splits

    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    value_dim = column + tl.arange(0, BLOCK_N)
    k_base = k_ptr + _offset(sample, stride_kb, ALIGNMENT) + _offset(head, stride_kh, ALIGNMENT)
    v_base = v_ptr + _offset(sample, stride_vb, ALIGNMENT) + _offset(head, stride_vh, ALIGNMENT)
    state = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    key_sum = tl.zeros([BLOCK_D], tl.float32)
    first = split * split_tokens
    for start in range(first, tl.minimum(first + split_tokens, length), BLOCK_M):
        token = start + row
        keep = token < length
        if HAS_MASK:
            keep = tl.load(mask_ptr + sample.to(tl.int64) * length + token, mask=keep, other=0) != 0
        k_wanted = keep[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_base + _offset(token, stride_ks, ALIGNMENT)[:, None] + dim[None, :], mask=k_wanted, other=0.0)
        v_wanted = keep[:, None] & (value_dim < HEAD_DIM)[None, :]
        v_pointers = v_base + _offset(token, stride_vs, ALIGNMENT)[:, None] + value_dim[None, :]
        v = tl.load(v_pointers, mask=v_wanted, other=0.0)
        # A row that is not kept is set to 0 only now: the features of 0 are 1.
        features = tl.where(keep[:, None], _features(k), 0.0).to(k.dtype)
        key_sum += tl.sum(features.to(tl.float32), 0)
        state = tl.dot(tl.trans(features), v, state, input_precision="ieee")

    part = split.to(tl.int64) * part_stride
    index = (sample * heads + head).to(tl.int64) * HEAD_DIM
    state_pointers = state_ptr + part + (index + dim)[:, None] * HEAD_DIM + value_dim[None, :]
    tl.store(state_pointers, state, mask=(dim < HEAD_DIM)[:, None] & (value_dim < HEAD_DIM)[None, :])
    tl.store(key_sum_ptr + part + index + dim, key_sum, mask=dim < tl.where(column == 0, HEAD_DIM, 0))


@triton.jit(do_not_specialize=SUM_UNSPECIALISED)
def linear_attention_sum_kernel(
    parts_ptr, state_ptr, key_sum_ptr, splits, states, elements, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Adds `splits` rows of `elements` numbers, of which the first `states` are the state and the rest the key sum."""
    element = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, splits, BLOCK_M):
        split = start + tl.arange(0, BLOCK_M)
        pointers = parts_ptr + split.to(tl.int64)[:, None] * elements + element[None, :]
        total += tl.sum(tl.load(pointers, mask=(split < splits)[:, None] & (element < elements)[None, :], other=0.0), 0)
    tl.store(state_ptr + element, total, mask=element < states)
    tl.store(key_sum_ptr + element - states, total, mask=(element >= states) & (element < elements))


@triton.jit(do_not_specialize=APPLY_UNSPECIALISED)
def linear_attention_apply_kernel(
    q_ptr, state_ptr, key_sum_ptr, count_ptr, out_ptr,
    stride_qb, stride_qs, stride_qh, heads, length, ranges, range_tokens, bias,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_COUNT: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Some columns of the output of one head over one range of queries. `bias` is eps, times the count if not given."""
    COLUMNS: tl.constexpr = (HEAD_DIM + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    head = program % heads
    column = program // heads % COLUMNS * BLOCK_N
    first = program // heads // COLUMNS % ranges * range_tokens
    sample = program // heads // COLUMNS // ranges

    dim = tl.arange(0, BLOCK_D)
    value_dim = column + tl.arange(0, BLOCK_N)
    inside = (dim < HEAD_DIM)[:, None] & (value_dim < HEAD_DIM)[None, :]
    index = (sample * heads + head).to(tl.int64) * HEAD_DIM
    state = tl.load(state_ptr + (index + dim)[:, None] * HEAD_DIM + value_dim[None, :], mask=inside, other=0.0)
    key_sum = tl.load(key_sum_ptr + index + dim, mask=dim < HEAD_DIM, other=0.0)
    if HAS_COUNT:
        bias *= tl.maximum(tl.load(count_ptr + sample), 1).to(tl.float32)
    HALF: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth == 16
    if HALF:
        # In two pieces of 16 bits the state keeps what fp32 holds of it, and its columns are scaled to fit.
        top = tl.max(tl.abs(state), 0)
        top = tl.where(top > 0.0, top, 1.0) / 16384.0
        state = state / top[None, :]
        high = state.to(q_ptr.dtype.element_ty)
        low = (state - high.to(tl.float32)).to(q_ptr.dtype.element_ty)

    q_base = q_ptr + _offset(sample, stride_qb, ALIGNMENT) + _offset(head, stride_qh, ALIGNMENT)
    out_base = out_ptr + (sample.to(tl.int64) * length * heads + head) * HEAD_DIM
    for start in range(first, tl.minimum(first + range_tokens, length), BLOCK_M):
        token = start + tl.arange(0, BLOCK_M)
        q_wanted = (token < length)[:, None] & (dim < HEAD_DIM)[None, :]
        q = tl.load(q_base + _offset(token, stride_qs, ALIGNMENT)[:, None] + dim[None, :], mask=q_wanted, other=0.0)
        features = _features(q).to(q.dtype)
        denominator = tl.sum(features.to(tl.float32) * key_sum[None, :], 1) + bias
        if HALF:
            out = tl.dot(features, low)
            out = tl.dot(features, high, out) * top[None, :]
        else:
            out = tl.dot(features, state, input_precision="ieee")
        out = (out / denominator[:, None]).to(q.dtype)
        out_pointers = out_base + (token.to(tl.int64) * (heads * HEAD_DIM))[:, None] + value_dim[None, :]
        tl.store(out_pointers, out, mask=(token < length)[:, None] & (value_dim < HEAD_DIM)[None, :])


# (tokens, columns of the state) of a tile by element size and padded head dimension, for the state pass and the output
# pass. They were chosen to spill nothing on any target (kernels/aot.py), not by timing.
STATE_CONFIGS = {
    (2, 64): Config(64, 64, 4, 3),
    (2, 128): Config(64, 64, 8, 2),
    (2, 256): Config(32, 64, 8, 2),
    (4, 64): Config(32, 64, 8, 2),
    (4, 128): Config(16, 64, 8, 2),
    (4, 256): Config(16, 32, 8, 2),
}
APPLY_CONFIGS = {
    (2, 64): Config(128, 64, 8, 3),
    (2, 128): Config(128, 64, 8, 2),
    (2, 256): Config(32, 32, 8, 2),
    (4, 64): Config(32, 64, 8, 2),
    (4, 128): Config(32, 32, 8, 2),
    (4, 256): Config(16, 32, 8, 2),
}
# On AMD each warp keeps the columns of the state in registers.
AMD_APPLY_CONFIGS = APPLY_CONFIGS | {
    (2, 128): Config(64, 32, 8, 1),
    (2, 256): Config(32, 16, 8, 1),
    (4, 256): Config(16, 16, 8, 2),
}
SUM_CONFIG = Config(SUM_PARTS, SUM_ELEMENTS, 4, 2)


def apply_configs(target: Target) -> dict[tuple[int, int], Config]:
    return AMD_APPLY_CONFIGS if target.backend == "hip" else APPLY_CONFIGS


def configuration(
    configs: dict[tuple[int, int], Config], element_size: int, head_dim: int
) -> tuple[Config, dict[str, Any]]:
    """The tiles for a call, and the constants that it shares with its ahead-of-time check."""
    block_d = max(64, triton.next_power_of_2(head_dim))
    config = configs[element_size, block_d]
    return config, {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }


def shipped() -> list[Shipped]:
    """For kernels/aot.py: every tile configuration, the head dimensions of SD 1.5 and SDXL, masks and counts."""
    calls = [("fp16", head_dim, False) for head_dim in (64, 128, 160)]
    calls += [("bf16", head_dim, False) for head_dim in (40, 64, 80, 128, 160)]
    calls += [("fp32", head_dim, False) for head_dim in (64, 128, 160)]
    masked = [("bf16", head_dim, True) for head_dim in (64, 128, 160)]
    return [
        *(_shipped_state(target, *call) for target in TARGETS for call in (*calls, *masked)),
        *(_shipped_sum(target) for target in TARGETS),
        *(_shipped_apply(target, *call) for target in TARGETS for call in (*calls, ("bf16", 64, True))),
    ]


def _shipped_state(target: Target, dtype: str, head_dim: int, masked: bool) -> Shipped:
    config, fixed = _fixed(STATE_CONFIGS, dtype, head_dim)
    signature = dict.fromkeys(("k_ptr", "v_ptr"), f"*{dtype}") | dict.fromkeys(("state_ptr", "key_sum_ptr"), "*fp32")
    signature |= dict.fromkeys(STATE_UNSPECIALISED, "i32")
    fixed |= {"HAS_MASK": masked}
    if masked:
        signature["mask_ptr"] = "*u8"
    else:
        fixed["mask_ptr"] = None
    variant = f"D {head_dim}, key mask" if masked else f"D {head_dim}"
    return Shipped(linear_attention_state_kernel, target, dtype, variant, config, signature, fixed)


def _shipped_sum(target: Target) -> Shipped:
    signature = dict.fromkeys(("parts_ptr", "state_ptr", "key_sum_ptr"), "*fp32")
    signature |= dict.fromkeys(SUM_UNSPECIALISED, "i32")
    fixed = {"BLOCK_M": SUM_CONFIG.block_m, "BLOCK_N": SUM_CONFIG.block_n}
    return Shipped(linear_attention_sum_kernel, target, "fp32", "any D", SUM_CONFIG, signature, fixed)


def _shipped_apply(target: Target, dtype: str, head_dim: int, counted: bool) -> Shipped:
    config, fixed = _fixed(apply_configs(target), dtype, head_dim)
    signature = dict.fromkeys(("q_ptr", "out_ptr"), f"*{dtype}") | dict.fromkeys(("state_ptr", "key_sum_ptr"), "*fp32")
    signature |= dict.fromkeys(APPLY_UNSPECIALISED, "i32") | {"bias": "fp32"}
    fixed |= {"HAS_COUNT": counted}
    if counted:
        signature["count_ptr"] = "*i64"
    else:
        fixed["count_ptr"] = None
    variant = f"D {head_dim}, counts" if counted else f"D {head_dim}"
    return Shipped(linear_attention_apply_kernel, target, dtype, variant, config, signature, fixed)


def _fixed(configs: dict[tuple[int, int], Config], dtype: str, head_dim: int) -> tuple[Config, dict[str, Any]]:
    element_size = 4 if dtype == "fp32" else 2
    config, fixed = configuration(configs, element_size, head_dim)
    return config, fixed | {"ALIGNMENT": 16 // element_size}


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, eps: float, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the state and the key sum, which backward needs."""
    state, key_sum = linear_attention_state(key, value, key_mask=key_mask)
    return linear_attention_apply(query, state, key_sum, key_count(key, key_mask), eps=eps), state, key_sum


def linear_attention_state(key: Tensor, value: Tensor, *, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    batch, length, heads, head_dim = key.shape
    config, fixed = configuration(STATE_CONFIGS, key.element_size(), head_dim)
    programs = batch * heads * triton.cdiv(head_dim, config.block_n)
    splits, split_tokens = divided(length, programs, key.device, config.block_m, MIN_SPLIT, MAX_SPLIT)
    state = key.new_empty((batch, heads, head_dim, head_dim), dtype=torch.float32)
    key_sum = key.new_empty((batch, heads, head_dim), dtype=torch.float32)
    elements = state.numel() + key_sum.numel()
    parts = key.new_empty((splits, elements), dtype=torch.float32) if splits > 1 else None
    strides, alignment = _counted_strides(key, value)
    with torch.cuda.device_of(key):
        linear_attention_state_kernel[(programs * splits,)](
            key, value, None if key_mask is None else key_mask.contiguous().view(torch.uint8),
            state if parts is None else parts, key_sum if parts is None else parts[:, state.numel() :],
            *strides, heads, length, splits, split_tokens, elements,
            **fixed, HAS_MASK=key_mask is not None, ALIGNMENT=alignment,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if parts is not None:
            linear_attention_sum_kernel[(triton.cdiv(elements, SUM_CONFIG.block_n),)](
                parts, state, key_sum, splits, state.numel(), elements,
                BLOCK_M=SUM_CONFIG.block_m, BLOCK_N=SUM_CONFIG.block_n,
                num_warps=SUM_CONFIG.num_warps, num_stages=SUM_CONFIG.num_stages,
            )  # fmt: skip
    return state, key_sum


def linear_attention_apply(query: Tensor, state: Tensor, key_sum: Tensor, count: int | Tensor, *, eps: float) -> Tensor:
    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, length, heads, head_dim = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    config, fixed = configuration(apply_configs(target_of(query.device)), query.element_size(), head_dim)
    programs = batch * heads * triton.cdiv(head_dim, config.block_n)
    ranges, range_tokens = divided(length, programs, query.device, config.block_m, config.block_m, length)
    strides, alignment = _counted_strides(query)
    counted = isinstance(count, Tensor)
    with torch.cuda.device_of(query):
        linear_attention_apply_kernel[(programs * ranges,)](
            query, state.contiguous(), key_sum.contiguous(), count.contiguous() if counted else None, out,
            *strides, heads, length, ranges, range_tokens, eps if counted else eps * count,
            **fixed, HAS_COUNT=counted, ALIGNMENT=alignment,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out


def divided(tokens: int, programs: int, device: torch.device, tile: int, least: int, most: int) -> tuple[int, int]:
    """(parts, tokens of each): `programs` for each part are to fill the device; parts have `least` to `most` tokens."""
    parts = min(triton.cdiv(PROGRAMS_PER_SM * _multiprocessors(device), programs), tokens // least)
    parts = max(parts, triton.cdiv(tokens, most), 1)
    size = triton.cdiv(triton.cdiv(tokens, parts), tile) * tile
    return triton.cdiv(tokens, size), size


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _counted_strides(*tensors: Tensor) -> tuple[list[int], int]:
    """The strides of batch, tokens and heads in units of the alignment, and the alignment in elements."""
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    elements = 16 // tensors[0].element_size()
    alignment = elements if all(stride % elements == 0 for stride in (*strides, tensors[0].shape[-1])) else 1
    return [stride // alignment for stride in strides], alignment
