"""Linear attention under autograd and torch.compile."""

from __future__ import annotations

import pytest
import torch
from attnswap import kernels
from attnswap.kernels import dispatch
from attnswap.kernels.linear_attention import eager
from attnswap.kernels.linear_attention.op import APPLY_OPERATOR, OPERATOR, STATE_OPERATOR
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.fixture
def counter():
    """Counts the graphs; they run through AOTAutograd, which compares the operators with their declared results."""
    torch._dynamo.reset()
    return CompileCounterWithBackend("aot_eager")


def in_two_steps(query, key, value, *, key_mask=None):
    return kernels.linear_attention_apply(query, *kernels.linear_attention_state(key, value, key_mask=key_mask))


MASK = torch.tensor([[True, False, True, True, False, True, True], [False] * 7])
FORMS = pytest.mark.parametrize("attend", [kernels.linear_attention, in_two_steps], ids=["whole", "in two steps"])


@FORMS
@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "key mask, a sample without keys"])
def test_gradients_are_right(tensors, attend, mask):
    qkv = [x.requires_grad_() for x in tensors(5, keys=7, batch=2, heads=2, head_dim=3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *qkv: attend(*qkv, key_mask=mask), qkv)


def test_gradients_are_right_across_chunks(tensors, monkeypatch):
    monkeypatch.setattr(eager, "CPU_CHUNK", 4)
    qkv = [x.requires_grad_() for x in tensors(13, keys=9, head_dim=2, dtype=torch.float64)]
    assert len(list(eager.chunks(qkv[0]))) == 4
    assert torch.autograd.gradcheck(lambda *qkv: kernels.linear_attention(*qkv), qkv)


def test_masked_keys_get_no_gradient_whatever_they_hold(tensors):
    query, key, value = tensors(8, batch=2)
    mask = torch.arange(8)[None] < torch.tensor([[5], [8]])
    qkv = [query, *(x.masked_fill(~mask[:, :, None, None], float("nan")) for x in (key, value))]
    qkv = [x.requires_grad_() for x in qkv]
    kernels.linear_attention(*qkv, key_mask=mask).square().sum().backward()
    assert (qkv[1].grad[0, 5:] == 0).all()
    assert (qkv[2].grad[0, 5:] == 0).all()
    assert all(x.grad.isfinite().all() for x in qkv)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_in_half_precision_lose_little_more_than_their_rounding(tensors, dtype):
    def gradients(dtype_):
        qkv = [x.to(dtype_).requires_grad_() for x in tensors(120, head_dim=40, dtype=dtype)]
        kernels.linear_attention(*qkv).square().sum().backward()
        return [x.grad.double() for x in qkv]

    for found, truth in zip(gradients(dtype), gradients(torch.float64), strict=True):
        # The gradient that comes in is already rounded, once in the output and once in its square.
        assert (found - truth).norm() <= 4 * torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_every_backend_trains(tensors, backend):
    if backend == "triton" and not dispatch.triton_interprets():
        pytest.skip("TRITON_INTERPRET is not set")

    def gradients(name):
        qkv = [x.requires_grad_() for x in tensors(20, keys=30)]
        with kernels.use_backend(name):
            kernels.linear_attention(*qkv).square().sum().backward()
        return [x.grad for x in qkv]

    for found, expected in zip(gradients(backend), gradients("eager"), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "key mask"])
def test_the_operators_keep_pytorchs_rules(tensors, masked):
    """Schema, fake result, autograd registration and tracing, as PyTorch itself checks them."""
    query, key, value = (x.requires_grad_() for x in tensors(6, keys=9, heads=2))
    key = key.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    mask = torch.arange(9)[None] % 3 != 0 if masked else None
    with torch.no_grad():
        state, key_sum, _ = kernels.linear_attention_state(key, value)
    for name, arguments in (
        (OPERATOR, (query, key, value, mask, 1e-4)),
        (STATE_OPERATOR, (key, value, mask)),
        (APPLY_OPERATOR, (query, state.requires_grad_(), key_sum.requires_grad_(), torch.tensor([9]), 1e-4)),
    ):
        torch.library.opcheck(getattr(torch.ops.attnswap, name.partition("::")[2]).default, arguments)


@FORMS
def test_fullgraph_compiles_and_another_length_does_not_recompile(tensors, counter, attend):
    compiled = torch.compile(lambda *qkv: attend(*qkv) * 2, backend=counter, fullgraph=True, dynamic=True)
    compiled(*tensors(9, keys=10, heads=2))
    graphs = counter.frame_count
    for tokens in (14, 33):
        qkv = tensors(tokens, keys=tokens + 1, heads=2)
        torch.testing.assert_close(compiled(*qkv), 2 * attend(*qkv))
    assert counter.frame_count == graphs


def test_choosing_another_backend_does_not_recompile(tensors, counter):
    compiled = torch.compile(kernels.linear_attention, backend=counter, fullgraph=True)
    qkv = tensors(12)
    auto = compiled(*qkv)
    with kernels.use_backend("reference"):
        torch.testing.assert_close(compiled(*qkv), auto, atol=1e-6, rtol=0)
    assert counter.frame_count == 1


def test_a_strided_query_compiles(tensors, counter):
    query, key, value = tensors(12, heads=2)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    attend = torch.compile(
        lambda *qkv: kernels.linear_attention(*qkv).view(1, 12, 16) + 1, backend=counter, fullgraph=True
    )
    expected = kernels.linear_attention(query, key, value).view(1, 12, 16) + 1
    torch.testing.assert_close(attend(query, key, value), expected)


@FORMS
def test_training_compiles(tensors, counter, attend):
    mask = torch.arange(15)[None] < 11
    compiled = torch.compile(lambda *qkv: attend(*qkv, key_mask=mask).square().sum(), backend=counter, fullgraph=True)
    traced = [x.requires_grad_() for x in tensors(10, keys=15)]
    compiled(*traced).backward()
    plain = [x.requires_grad_() for x in tensors(10, keys=15)]
    attend(*plain, key_mask=mask).square().sum().backward()
    for found, expected in zip(traced, plain, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
