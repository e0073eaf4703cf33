"""Linear attention in PyTorch, a chunk of tokens at a time.

A chunk is small enough to stay in the cache while it is turned to fp32, mapped and multiplied; no tensor of the size
of the inputs is made but the result. Heads stay last: a head of a chunk is a matrix with a stride between its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .counts import key_count, scaled_eps

# Elements of a chunk. On a CPU half a MiB of fp32 for each thread was fastest, of 2 ** 15 to 2 ** 20 elements tried.
# Elsewhere a chunk costs launches, and memory is the only limit.
CPU_CHUNK = 2**17
DEVICE_CHUNK = 2**24
# Within a chunk, a CPU's matrix product adds one token after the other.
CPU_CHUNK_TOKENS = 1024


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, eps: float, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the state and the key sum, which backward needs."""
    state, key_sum = linear_attention_state(key, value, key_mask=key_mask)
    return linear_attention_apply(query, state, key_sum, key_count(key, key_mask), eps=eps), state, key_sum


def linear_attention_state(key: Tensor, value: Tensor, *, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    batch, _, heads, head_dim = key.shape
    dtype = accumulator(key)
    state = key.new_empty((batch, heads, head_dim, head_dim), dtype=dtype)
    key_sum = key.new_empty((batch, heads, head_dim), dtype=dtype)
    for sample in range(batch):

        def sums(tokens: slice, sample: int = sample) -> tuple[Tensor, Tensor]:
            features = feature_map(key[sample, tokens].to(dtype))
            values = value[sample, tokens].to(dtype)
            if key_mask is not None:
                hidden = ~key_mask[sample, tokens, None, None]
                features.masked_fill_(hidden, 0)
                values = values.masked_fill(hidden, 0)
            return torch.bmm(features.permute(1, 2, 0), values.transpose(0, 1)), features.sum(0)

        state[sample], key_sum[sample] = pairwise(sums, list(chunks(key)))
    return state, key_sum


def pairwise(sums: Callable[[slice], tuple[Tensor, Tensor]], parts: list[slice]) -> tuple[Tensor, Tensor]:
    """The total over all parts, halves added to halves: the rounding error grows with the logarithm of the length."""
    if len(parts) == 1:
        return sums(parts[0])
    middle = len(parts) // 2
    (state, key_sum), (more_state, more_key_sum) = (pairwise(sums, half) for half in (parts[:middle], parts[middle:]))
    return state.add_(more_state), key_sum.add_(more_key_sum)


def linear_attention_apply(query: Tensor, state: Tensor, key_sum: Tensor, count: int | Tensor, *, eps: float) -> Tensor:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    bias = scaled_eps(count, eps, key_sum)
    for sample in range(query.shape[0]):
        for tokens in chunks(query):
            features = feature_map(query[sample, tokens].to(state.dtype))
            denominator = (features * key_sum[sample]).sum(-1, keepdim=True).add_(bias[sample])
            attended = torch.bmm(features.transpose(0, 1), state[sample]).transpose(0, 1)
            torch.div(attended, denominator, out=out[sample, tokens])
    return out


def feature_map(x: Tensor) -> Tensor:
    """ELU(x) + 1 as exp(min(x, 0)) + max(x, 0), which never subtracts what it adds."""
    return x.clamp(max=0).exp_().add_(x.relu())


def accumulator(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def chunks(x: Tensor) -> Iterator[slice]:
    """The tokens of `[B, S, H, D]` in pieces; not so few that adding up D x D products costs more than making them."""
    _, tokens, heads, head_dim = x.shape
    if x.device.type == "cpu":
        step = min(CPU_CHUNK * torch.get_num_threads() // (heads * head_dim), CPU_CHUNK_TOKENS)
    else:
        step = DEVICE_CHUNK // (heads * head_dim)
    step = max(step, 2 * head_dim)
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))
