"""PyTorch's dense attention kernels, called so that they return the log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import pad

from .tiles import accumulator, attend, seen_and_lengths

# Elements to which the memory-efficient kernel wants the rows of its bias aligned.
BIAS_ALIGNMENT = 16


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, kv_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of `[B, S, H, D]` on a CPU or a GPU, and its log-sum-exp `[B, H, S]`."""
    seen, lengths = seen_and_lengths(kv_lengths, key)
    if seen is not None:
        return _under_a_bias(query, key, value, seen, scale)
    batch, tokens, heads, _ = query.shape
    if len(set(lengths)) == 1:
        return _of_equal_length(query, key[:, : lengths[0]], value[:, : lengths[0]], scale)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, heads, tokens), dtype=accumulator(query))
    for sample, length in enumerate(lengths):
        one = slice(sample, sample + 1)
        out[one], lse[one] = _of_equal_length(query[one], key[one, :length], value[one, :length], scale)
    return out, lse


def _of_equal_length(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if key.shape[1] == 0:  # the kernels crash
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        batch, tokens, heads, _ = query.shape
        return out, query.new_full((batch, heads, tokens), float("-inf"), dtype=accumulator(query))
    return _fused(query, key, value, None, scale)


def _under_a_bias(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = query.shape
    key, value = (x.masked_fill(~seen[..., None, None], 0) for x in (key, value))
    bias = query.new_zeros((batch, tokens + -tokens % BIAS_ALIGNMENT))
    bias[:, :tokens].masked_fill_(~seen, float("-inf"))
    out, lse = _fused(query, key, value, bias[:, None, None, :tokens].expand(batch, heads, tokens, tokens), scale)
    empty = ~seen[:, 0]  # a sample without a key
    return out.masked_fill_(empty[:, None, None, None], 0), lse.masked_fill_(empty[:, None, None], float("-inf"))


def _fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """By the kernel that `scaled_dot_product_attention` would take."""
    aten, (tokens, head_dim) = torch.ops.aten, query.shape[1::2]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if query.device.type == "cpu":
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
        return out.transpose(1, 2).contiguous(), lse.contiguous()
    chosen = torch._fused_sdp_choice(q, k, v, bias, 0.0, False, scale=scale)
    q, k, v = (pad(x, (0, -head_dim % 8)) for x in (q, k, v))
    if chosen == SDPBackend.FLASH_ATTENTION.value:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    elif chosen == SDPBackend.CUDNN_ATTENTION.value:
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, scale=scale)[:2]
    elif chosen == SDPBackend.EFFICIENT_ATTENTION.value:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)[:2]
    else:
        lengths = None if bias is None else bias[:, 0, 0].isfinite().sum(-1)
        out, lse, _ = attend(query, key, value, kv_lengths=lengths, scale=scale)
        return out, lse
    # The log-sum-exp is [B, H, S], with one more axis from cuDNN, with more rows from the memory-efficient kernel.
    lse = lse.flatten(2)[..., :tokens]
    return out[..., :head_dim].transpose(1, 2).contiguous(), lse.contiguous()
