"""Memory: beyond inputs and result, a call needs a chunk, and a D x D matrix for each head and level of its sums."""

from __future__ import annotations

import pytest
import torch
from attnswap import kernels
from attnswap.benchmarks.memory import peak_bytes

CPU = torch.device("cpu")
TOKENS, MIB = 2**16, 2**20
EXTRA = 4 * MIB  # a tensor of the inputs' size has 32 MiB in fp16 and 64 in fp32


@pytest.fixture(autouse=True)
def on_eager():
    with kernels.use_backend("eager"):
        yield


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_64k_tokens_forward(dtype, tensors):
    qkv = tensors(TOKENS, heads=4, head_dim=64, dtype=dtype)
    peak = peak_bytes(lambda: kernels.linear_attention(*qkv), CPU)
    assert qkv[0].nbytes <= peak <= qkv[0].nbytes + EXTRA


def test_64k_tokens_of_strided_inputs_are_not_copied(tensors):
    fused = torch.stack(tensors(TOKENS, heads=4, head_dim=64, dtype=torch.float16), dim=2)
    peak = peak_bytes(lambda: kernels.linear_attention(*fused.unbind(2)), CPU)
    assert peak <= fused.nbytes // 3 + EXTRA


def test_64k_tokens_forward_and_backward(tensors):
    """The output, its gradient and three gradients; phi(k) v^T of every token would be 4 GiB."""
    qkv = [x.requires_grad_() for x in tensors(TOKENS, heads=4, head_dim=64, dtype=torch.float16)]
    grad = torch.ones_like(qkv[0])
    peak = peak_bytes(lambda: kernels.linear_attention(*qkv).backward(grad), CPU)
    assert peak <= 4 * qkv[0].nbytes + EXTRA


def test_the_extra_memory_does_not_grow_with_the_tokens(tensors):
    def extra(tokens):
        key, value = tensors(tokens, heads=4, head_dim=64, dtype=torch.float16)[1:]
        return peak_bytes(lambda: kernels.linear_attention_state(key, value), CPU)

    level = 4 * 64 * 65 * 4  # pairwise addition keeps one more state for every doubling
    assert extra(2**16) <= extra(2**13) + 4 * level
