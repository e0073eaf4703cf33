"""Local attention under autograd and torch.compile."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from attnswap import kernels
from attnswap.kernels.local_attention.op import BACKWARD, OPERATOR
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

CALL = {"grid": (5, 6), "grid_offset": 2, "radius": 2.5}
TOKENS = 2 + 30 + 1


@pytest.fixture
def counter():
    """Counts the graphs; the graphs run through AOTAutograd, which compares the operator with its declared result."""
    torch._dynamo.reset()
    return CompileCounterWithBackend("aot_eager")


def attend(query, key, value, pooled_key=None, pooled_value=None, **call):
    call = CALL | {"pooled_key": pooled_key, "pooled_value": pooled_value} | call
    return kernels.local_attention(query, key, value, **call)


@pytest.mark.parametrize("pooled", [0, 2])
@pytest.mark.parametrize("radius", [1.5, 100])
def test_gradients_are_right(tensors, pooled, radius):
    call = {"grid": (2, 9), "grid_offset": 1, "radius": radius}
    inputs = [x.requires_grad_() for x in tensors(20, pooled=pooled, head_dim=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *tensors: attend(*tensors, **call), inputs)


def test_gradients_are_right_with_masked_keys_and_queries_without_keys(tensors):
    inputs = [x.requires_grad_() for x in tensors(12, head_dim=2, dtype=torch.float64)]
    mask = torch.tensor([[False] * 6 + [True] * 6])
    call = {"grid": (3, 4), "grid_offset": 0, "radius": 1.2, "key_mask": mask}
    assert (attend(*inputs, **call)[0, 0] == 0).all()
    assert torch.autograd.gradcheck(lambda *tensors: attend(*tensors, **call), inputs)


def test_a_masked_key_gets_no_gradient_and_spoils_none(tensors):
    query, key, value = tensors(TOKENS)
    mask = torch.arange(TOKENS)[None] % 3 != 0
    key[~mask], value[~mask] = float("nan"), float("inf")
    inputs = [x.requires_grad_() for x in (query, key, value)]
    attend(*inputs, key_mask=mask).sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)
    assert (key.grad[~mask] == 0).all()
    assert (value.grad[~mask] == 0).all()


@pytest.mark.parametrize(("grid", "radius"), [((20, 19), 5), ((9, 30), 8)], ids=str)
def test_gradients_over_many_tiles_are_those_of_the_definition(tensors, masked, visible, grid, radius):
    inputs = tensors(3 + grid[0] * grid[1] + 2, pooled=4, batch=2, heads=2)
    mask = visible(grid, radius, before=3, after=2, pooled=4)
    call = {"grid": grid, "grid_offset": 3, "radius": radius}

    def gradients(function):
        leaves = [x.clone().requires_grad_() for x in inputs]
        function(*leaves).square().sum().backward()
        return [x.grad for x in leaves]

    found = gradients(lambda *tensors: attend(*tensors, **call))
    expected = gradients(lambda *tensors: masked(mask, *tensors))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=5e-6, rtol=1e-5)


def test_every_backend_trains(backend, tensors):
    def gradients(name):
        inputs = [x.requires_grad_() for x in tensors(TOKENS, pooled=3)]
        with kernels.use_backend(name):
            attend(*inputs).square().sum().backward()
        return [x.grad for x in inputs]

    for found, expected in zip(gradients(backend), gradients("reference"), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooled", [0, 3])
def test_gradient_checkpointing_gives_the_same_gradients(tensors, pooled):
    def gradients(run):
        inputs = [x.requires_grad_() for x in tensors(TOKENS, pooled=pooled)]
        run(*inputs).square().sum().backward()
        return [x.grad for x in inputs]

    plain = gradients(attend)
    for found, expected in zip(gradients(partial(checkpoint, attend, use_reentrant=False)), plain, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("masked_keys", [False, True], ids=["no mask", "key mask"])
@pytest.mark.parametrize("pooled", [0, 3])
def test_the_operators_keep_pytorchs_rules(tensors, pooled, masked_keys):
    """Schema, fake result, autograd registration and tracing, as PyTorch itself checks them."""
    inputs = [x.requires_grad_() for x in tensors(TOKENS, pooled=pooled, heads=2)]
    inputs[1] = inputs[1].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    mask = torch.arange(TOKENS)[None] % 3 != 0 if masked_keys else None
    arguments = (*inputs, *[None] * (5 - len(inputs)), mask, 5, 6, 2, 2.5, 0.5)
    forward, backward = (getattr(torch.ops.attnswap, name.partition("::")[2]).default for name in (OPERATOR, BACKWARD))
    torch.library.opcheck(forward, arguments)
    with torch.no_grad():
        out, lse = forward(*arguments)
        torch.library.opcheck(backward, (out, out, lse, *arguments), test_utils="test_schema")
        torch.library.opcheck(backward, (out, out, lse, *arguments), test_utils="test_faketensor")


def test_fullgraph_compiles_to_one_graph_whatever_the_backend(tensors, counter):
    inputs = tensors(TOKENS, pooled=3, heads=2)
    compiled = torch.compile(lambda *tensors: attend(*tensors) * 2, backend=counter, fullgraph=True)
    expected = attend(*inputs) * 2
    torch.testing.assert_close(compiled(*inputs), expected)
    with kernels.use_backend("reference"):
        torch.testing.assert_close(compiled(*inputs), expected, atol=1e-5, rtol=0)
    assert counter.frame_count == 1


def test_inductor_compiles_to_one_graph(tensors):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    inputs = tensors(TOKENS, pooled=3, heads=2)
    compiled = torch.compile(lambda *tensors: attend(*tensors) * 2, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), attend(*inputs) * 2)
    assert counter.frame_count == 1


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch has no such tag")
def test_compilers_are_told_to_record_no_cuda_graph_of_it():
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.attnswap, OPERATOR.partition("::")[2]).default.tags


def test_a_strided_query_compiles(tensors, counter):
    """The result is contiguous whatever the strides of the query, and the compiler is told so."""
    query, key, value = tensors(TOKENS, heads=2)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    flat = torch.compile(lambda *qkv: attend(*qkv).view(1, TOKENS, 32) + 1, backend=counter, fullgraph=True)
    torch.testing.assert_close(flat(query, key, value), attend(query, key, value).view(1, TOKENS, 32) + 1)


def test_other_sizes_and_radii_recompile_once_at_most(tensors, counter):
    """With `dynamic=True` the grid is an input; a radius is a constant of the graph."""
    compiled = torch.compile(
        lambda *qkv, height: kernels.local_attention(*qkv, grid=(height, 5), radius=2),
        backend=counter,
        fullgraph=True,
        dynamic=True,
    )
    for height in (3, 4, 6, 7):
        qkv = tensors(height * 5)
        expected = kernels.local_attention(*qkv, grid=(height, 5), radius=2)
        torch.testing.assert_close(compiled(*qkv, height=height), expected)
    assert counter.frame_count <= 2


def test_training_compiles(tensors, counter):
    loss = torch.compile(lambda *tensors: attend(*tensors).square().sum(), backend=counter, fullgraph=True)
    compiled = [x.requires_grad_() for x in tensors(TOKENS, pooled=3)]
    loss(*compiled).backward()
    eager = [x.requires_grad_() for x in tensors(TOKENS, pooled=3)]
    attend(*eager).square().sum().backward()
    for found, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
