"""Memory: the work grows with the number of tokens, and so does the memory; there is no mask of all pairs."""

from __future__ import annotations

import pytest
import torch
from attnswap import kernels
from attnswap.benchmarks.memory import peak_bytes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_eager():
    with kernels.use_backend("eager"):
        yield


def peak(tensors, side, *, backward=False):
    """Bytes beyond the inputs, per token."""
    tokens = 64 + side * side
    qkv = [x.requires_grad_(backward) for x in tensors(tokens, heads=2, head_dim=32)]

    def run():
        out = kernels.local_attention(*qkv, grid=(side, side), grid_offset=64, radius=6)
        if backward:
            out.backward(torch.ones_like(out))

    return peak_bytes(run, CPU) / tokens


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_memory_grows_with_the_tokens_and_not_with_their_square(tensors, backward):
    assert peak(tensors, 96, backward=backward) <= 1.1 * peak(tensors, 48, backward=backward)


def test_memory_of_a_forward_pass(tensors):
    """The output, and less than four times as much again: dense keys in fp32, strips and their results."""
    assert peak(tensors, 96) <= 5 * 2 * 32 * 4
