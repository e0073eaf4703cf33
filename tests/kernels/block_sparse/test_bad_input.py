"""Everything that does not fit is one `ValueError` with the numbers in it, from the function and from `explain`."""

from __future__ import annotations

import pytest
import torch
from attnswap import kernels
from attnswap.kernels import BlockMask

QUERY = torch.zeros(2, 50, 3, 16)
LSE = torch.zeros(2, 3, 50)
MASK = BlockMask.from_dense(torch.ones(2, 3, 4, 2, dtype=torch.bool), (16, 32))
OPS = {
    "dense_attention": (QUERY, QUERY, QUERY),
    "block_scores": (QUERY, QUERY, LSE),
    "dense_attention_with_scores": (QUERY, QUERY, QUERY, LSE),
    "block_sparse_attention": (QUERY, QUERY, QUERY, MASK),
}
WITH_LSE = ["block_scores", "dense_attention_with_scores"]


def refused(op, said, *arguments, **call):
    for function in (getattr(kernels, op), lambda *args, **kwargs: kernels.explain(op, *args, **kwargs)):
        with pytest.raises(ValueError, match=said):
            function(*arguments, **call)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("key", "said"),
    [
        (torch.zeros(2, 40, 3, 16), r"query is \[2, 50, 3, 16\] but key is \[2, 40, 3, 16\]"),
        (torch.zeros(2, 50, 3), r"key must be \[batch, tokens, heads, head_dim\] .* got \[2, 50, 3\]"),
        (torch.zeros(2, 50, 3, 16, dtype=torch.int32), "key has dtype torch.int32"),
        (torch.zeros(2, 50, 3, 16, dtype=torch.float16), "query is torch.float32 but key is torch.float16"),
        (torch.zeros(2, 50, 3, 16, device="meta"), "query is on cpu but key is on meta"),
        (None, "key must be a tensor .* not NoneType"),
    ],
    ids=["tokens", "axes", "integers", "dtype", "device", "none"],
)
def test_keys_that_do_not_go_with_the_queries(op, key, said):
    arguments = list(OPS[op])
    arguments[1] = key
    refused(op, said, *arguments)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ([50, 50], "kv_lengths must be an integer tensor .* not list"),
        (torch.tensor([50]), r"int32 or int64 \[batch\] = \[2\], got torch.int64 \[1\]"),
        (torch.tensor([50.0, 50.0]), r"got torch.float32 \[2\]"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "kv_lengths is on meta; it must be on the CPU or on cpu"),
    ],
)
def test_lengths_that_are_none(op, lengths, said):
    refused(op, said, *OPS[op], kv_lengths=lengths)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("lengths", "said"), [((50, 51), "0 to 50, .*; entry 1 is 51"), ((-1, 50), "0 to 50, .*; entry 0 is -1")]
)
def test_lengths_out_of_range(op, lengths, said):
    with pytest.raises(ValueError, match=said):
        getattr(kernels, op)(*OPS[op], kv_lengths=torch.tensor(lengths))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none(op, scale):
    refused(op, f"scale must be positive and finite, got {scale}", *OPS[op], scale=scale)


@pytest.mark.parametrize("op", WITH_LSE)
@pytest.mark.parametrize(
    ("lse", "said"),
    [
        (torch.zeros(2, 50, 3), r"must be torch.float32 \[2, 3, 50\], got torch.float32 \[2, 50, 3\]"),
        (torch.zeros(2, 3, 64), r"must be torch.float32 \[2, 3, 50\], got torch.float32 \[2, 3, 64\]"),
        (torch.zeros(2, 3, 50, dtype=torch.float16), "must be torch.float32 .* got torch.float16"),
        (torch.zeros(2, 3, 50, device="meta"), "is on meta but query is on cpu"),
        (1.0, "must be a tensor .* not float"),
    ],
)
def test_a_reference_that_does_not_fit(op, lse, said):
    refused(op, said, *OPS[op][:-1], lse)


@pytest.mark.parametrize("op", WITH_LSE)
@pytest.mark.parametrize(
    ("block", "said"),
    [
        ((64, 0), r"block must be at least 1 along each axis, got \(64, 0\)"),
        ((64,), r"block must be two integers, got \(64,\)"),
        (64, "block must be two integers, got 64"),
        ((64.0, 64), r"block must be two integers, got \(64.0, 64\)"),
    ],
)
def test_a_block_that_is_none(op, block, said):
    refused(op, said, *OPS[op], block=block)


@pytest.mark.parametrize(
    ("shape", "block"), [((2, 3, 4, 3), (16, 32)), ((1, 3, 4, 2), (16, 32)), ((2, 2, 4, 2), (16, 32))], ids=str
)
def test_a_mask_of_another_shape(shape, block):
    mask = BlockMask.from_dense(torch.ones(shape, dtype=torch.bool), block)
    got = ", ".join(map(str, shape))
    said = rf"query of \[2, 50, 3, 16\] in blocks of 16 x 32 needs a mask of \[2, 3, 4, 2\], got \[{got}\]"
    refused("block_sparse_attention", said, QUERY, QUERY, QUERY, mask)


def test_a_mask_of_another_kind_or_on_another_device():
    refused("block_sparse_attention", "must be a BlockMask, not Tensor", QUERY, QUERY, QUERY, MASK.to_dense())
    refused("block_sparse_attention", "mask is on meta but query is on cpu", QUERY, QUERY, QUERY, MASK.to("meta"))
