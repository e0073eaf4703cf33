"""The operations under torch.compile, and PyTorch's own checks of their operators."""

from __future__ import annotations

import pytest
import torch
from attnswap import kernels
from attnswap.kernels.block_sparse import op
from torch._dynamo.testing import CompileCounterWithBackend

BLOCK = (16, 32)


@pytest.fixture
def counter():
    """Counts the graphs; the graphs run through AOTAutograd, which compares the operator with its declared result."""
    torch._dynamo.reset()
    return CompileCounterWithBackend("aot_eager")


@pytest.mark.parametrize("lengths", [None, torch.tensor([70, 40], dtype=torch.int32)], ids=["all keys", "lengths"])
def test_the_operators_keep_pytorchs_rules(tensors, random_mask, lengths):
    query, key, value = tensors(70, batch=2)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    mask, lse = random_mask(query, BLOCK), torch.zeros(2, 2, 70)
    rest = lengths, 0.25
    for operator, arguments in (
        (op._dense, (query, key, value, *rest)),
        (op._scores, (query, key, lse, *BLOCK, *rest)),
        (op._scores, (query, key, None, *BLOCK, *rest)),
        (op._dense_with_scores, (query, key, value, lse, *BLOCK, *rest)),
        (op._sparse, (query, key, value, mask.bits, mask.counts, *BLOCK, mask.capacity, *rest)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_search_and_the_sparse_attention_it_leads_to_are_one_graph(tensors, counter):
    """Whatever the backend: it is chosen when the graph runs."""

    def search_and_attend(query, key, value):
        out, lse = kernels.dense_attention(query, key, value, return_lse=True)
        dense, lse, scores = kernels.dense_attention_with_scores(query, key, value, lse, block=BLOCK)
        mask = kernels.select_blocks(scores, sparsity=0.5, block=BLOCK, text=((60, 70),)).mask
        sparse = kernels.block_sparse_attention(query, key, value, mask)
        return out, dense, sparse, kernels.block_scores(query, key, lse, block=BLOCK)[0]

    qkv = tensors(70)
    expected = search_and_attend(*qkv)
    compiled = torch.compile(search_and_attend, backend=counter, fullgraph=True)
    for backend in ("auto", "reference"):
        with kernels.use_backend(backend):
            found = compiled(*qkv)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


def test_a_mask_from_before_is_an_input_and_a_new_one_needs_no_new_graph(tensors, random_mask, counter):
    qkv = tensors(70)
    compiled = torch.compile(
        lambda *qkv, mask: kernels.block_sparse_attention(*qkv, mask) * 2, backend=counter, fullgraph=True
    )
    mask = random_mask(qkv[0], BLOCK)
    torch.testing.assert_close(compiled(*qkv, mask=mask), kernels.block_sparse_attention(*qkv, mask) * 2)
    other = kernels.BlockMask.from_dense(mask.to_dense().flip(-1), BLOCK)
    torch.testing.assert_close(compiled(*qkv, mask=other), kernels.block_sparse_attention(*qkv, other) * 2)
    assert counter.frame_count == 1


def test_a_gradient_that_is_not_there_is_not_zero(tensors, random_mask):
    qkv = [x.requires_grad_() for x in tensors(40)]
    out = kernels.block_sparse_attention(*qkv, random_mask(qkv[0], BLOCK))
    with pytest.raises(RuntimeError, match=r"autograd formula|backward"):
        out.sum().backward()
