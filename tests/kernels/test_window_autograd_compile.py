"""Window attention under autograd and torch.compile."""

from __future__ import annotations

import pytest
import torch
from attnswap import kernels
from attnswap.kernels import dispatch
from attnswap.kernels.window_attention.op import OPERATOR
from torch._dynamo.testing import CompileCounterWithBackend

GRID = (5, 6)


@pytest.fixture
def counter():
    """Counts the graphs; the graphs run through AOTAutograd, which compares the operator with its declared result."""
    torch._dynamo.reset()
    return CompileCounterWithBackend("aot_eager")


def test_gradients_are_right(qkv):
    tensors = [x.requires_grad_() for x in qkv((3, 4), head_dim=2, dtype=torch.float64)]
    shift = torch.tensor([1, 2])
    assert torch.autograd.gradcheck(lambda *qkv: kernels.window_attention(*qkv, grid=(3, 4), shift=shift), tensors)


def test_gradients_are_right_with_masked_keys_and_a_row_without_keys(qkv):
    tensors = [x.requires_grad_() for x in qkv((3, 4), head_dim=2, dtype=torch.float64)]
    mask = torch.tensor([[False, False, True, True] * 2 + [True] * 4])
    call = {"grid": (3, 4), "key_mask": mask}
    assert torch.autograd.gradcheck(lambda *qkv: kernels.window_attention(*qkv, **call), tensors)


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_every_backend_trains(qkv, backend):
    if backend == "triton" and not dispatch.triton_interprets():
        pytest.skip("TRITON_INTERPRET is not set")

    def gradients(name):
        tensors = [x.requires_grad_() for x in qkv(GRID)]
        with kernels.use_backend(name):
            kernels.window_attention(*tensors, grid=GRID, shift=(1, 1)).square().sum().backward()
        return [x.grad for x in tensors]

    for found, expected in zip(gradients(backend), gradients("eager"), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "key mask"])
def test_the_operator_keeps_pytorchs_rules(qkv, masked):
    """Schema, fake result, autograd registration and tracing, as PyTorch itself checks them."""
    tensors = [x.requires_grad_() for x in qkv((4, 3), heads=2)]
    tensors[1] = tensors[1].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    mask = torch.arange(12)[None] % 3 != 0 if masked else None
    operator = getattr(torch.ops.attnswap, OPERATOR.partition("::")[2]).default
    torch.library.opcheck(operator, (*tensors, mask, torch.tensor([1, 0]), 4, 3, 2, 2, 0.5))


def test_fullgraph_compiles_to_one_graph_and_a_shift_tensor_does_not_recompile(qkv, counter):
    tensors = qkv(GRID, heads=2)

    @torch.compile(backend=counter, fullgraph=True)
    def attend(query, key, value, shift):
        return kernels.window_attention(query, key, value, grid=GRID, shift=shift) * 2

    for step in range(10):
        out = attend(*tensors, torch.tensor([step, -step]))
        torch.testing.assert_close(out, 2 * kernels.window_attention(*tensors, grid=GRID, shift=(step, -step)))
    assert counter.frame_count == 1


def test_integer_shifts_recompile_once_at_most(qkv, counter):
    attend = torch.compile(
        lambda *qkv, shift: kernels.window_attention(*qkv, grid=GRID, shift=(shift, 0)), backend=counter, fullgraph=True
    )
    tensors = qkv(GRID)
    for step in range(2, 12):
        expected = kernels.window_attention(*tensors, grid=GRID, shift=(step, 0))
        torch.testing.assert_close(attend(*tensors, shift=step), expected)
    assert counter.frame_count <= 2


def test_choosing_another_backend_does_not_recompile(qkv, counter):
    attend = torch.compile(lambda *qkv: kernels.window_attention(*qkv, grid=GRID), backend=counter, fullgraph=True)
    tensors = qkv(GRID)
    auto = attend(*tensors)
    with kernels.use_backend("reference"):
        torch.testing.assert_close(attend(*tensors), auto, atol=2e-6, rtol=0)
    assert counter.frame_count == 1


def test_a_strided_query_compiles(qkv, counter):
    """The result is contiguous whatever the strides of the query, and the compiler is told so."""
    query, key, value = qkv(GRID, heads=2)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    attend = torch.compile(
        lambda *qkv: kernels.window_attention(*qkv, grid=GRID).view(1, 30, 16) + 1, backend=counter, fullgraph=True
    )
    expected = kernels.window_attention(query, key, value, grid=GRID).view(1, 30, 16) + 1
    torch.testing.assert_close(attend(query, key, value), expected)


def test_training_compiles(qkv, counter):
    attend = torch.compile(
        lambda *qkv: kernels.window_attention(*qkv, grid=GRID, shift=(1, 1)).square().sum(),
        backend=counter,
        fullgraph=True,
    )
    compiled = [x.requires_grad_() for x in qkv(GRID)]
    attend(*compiled).backward()
    eager = [x.requires_grad_() for x in qkv(GRID)]
    kernels.window_attention(*eager, grid=GRID, shift=(1, 1)).square().sum().backward()
    for found, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
