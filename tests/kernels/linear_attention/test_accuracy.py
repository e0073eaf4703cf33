"""Rounding: against plain PyTorch in the same dtype, for inputs that overflow fp16 inside, and for millions of keys."""

from __future__ import annotations

import pytest
import torch
from attnswap import kernels
from attnswap.kernels.linear_attention import eager


def exact(*tensors):
    with kernels.use_backend("reference"):
        return kernels.linear_attention(*(x.double() for x in tensors))


def error(out, truth):
    return (out.double() - truth).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 40])
def test_the_error_is_at_most_twice_that_of_pytorch_in_the_same_dtype(backend, tensors, published, head_dim, dtype):
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly; see the tests marked gpu")
    qkv = tensors(196, heads=2, head_dim=head_dim, dtype=dtype)
    truth = exact(*qkv)
    assert error(kernels.linear_attention(*qkv), truth) <= 2 * error(published(*qkv), truth)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the branch not taken, in the interpreter
@pytest.mark.parametrize("std", [100, 200])
def test_large_fp16_inputs_lose_no_more_than_the_rounding_of_the_output(backend, tensors, published, std):
    """The published form overflows here: sums of features times values pass 65504."""
    qkv = tensors(256, head_dim=40, std=std, dtype=torch.float16)
    assert not published(*qkv).isfinite().all()
    truth = exact(*qkv)
    assert error(kernels.linear_attention(*qkv), truth) <= 2 * error(truth.half(), truth)


@pytest.mark.parametrize("tokens", [2**12, 2**16, 2**20, 2**22], ids=["4K", "64K", "1M", "4M"])
def test_the_sums_are_as_precise_over_millions_of_keys(tokens):
    """All keys and values alike, the worst case: roundings do not cancel. Added in turn, they would reach 1e-4."""
    key, value = (torch.full((1, 1, 1, 8), x).expand(1, tokens, 1, 8) for x in (0.1, 0.3))
    with kernels.use_backend("eager"):
        state, key_sum, count = kernels.linear_attention_state(key, value)
    feature = key[0, 0, 0, 0].double() + 1
    product = feature * value[0, 0, 0, 0].double()
    assert count == tokens
    torch.testing.assert_close(key_sum.double(), (feature * tokens).expand(1, 1, 8), rtol=1e-6, atol=0)
    torch.testing.assert_close(state.double(), (product * tokens).expand(1, 1, 8, 8), rtol=1e-5, atol=0)


def test_the_output_is_as_precise_over_a_million_keys(tensors):
    query, key, value = tensors(64, keys=2**20)
    truth = torch.zeros(1, 1, 8, 8, dtype=torch.float64), torch.zeros(1, 1, 8, dtype=torch.float64)
    for keys, values in zip(key.double().split(2**17, dim=1), value.double().split(2**17, dim=1), strict=True):
        features = torch.where(keys > 0, keys + 1, keys.exp())
        truth[0].add_(torch.einsum("bnhd,bnhe->bhde", features, values))
        truth[1].add_(features.sum(1))
    expected = kernels.linear_attention_apply(query.double(), *truth, 2**20)
    with kernels.use_backend("eager"):
        out = kernels.linear_attention(query, key, value)
    # The means of a million random values are small, and their sums cancel: a relative error says nothing here.
    torch.testing.assert_close(out.double(), expected, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("excess", [-1, 0, 1], ids=["just below", "at", "just above"])
@pytest.mark.parametrize("chunks", [1, 4])
def test_chunks_meet_without_a_gap(tensors, monkeypatch, chunks, excess):
    monkeypatch.setattr(eager, "CPU_CHUNK", 32 * 16)
    qkv = tensors(32 * chunks + excess, heads=2, batch=2)
    assert len(list(eager.chunks(qkv[0]))) == chunks + (excess > 0)
    with kernels.use_backend("eager"):
        out = kernels.linear_attention(*qkv)
    torch.testing.assert_close(out.double(), exact(*qkv), atol=5e-7, rtol=0)
