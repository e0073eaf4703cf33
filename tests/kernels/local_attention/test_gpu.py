"""Local attention on a CUDA device, at realistic shapes. `benchmarks/gpu.py` runs these before it times anything."""

from __future__ import annotations

import pytest
import torch
from attnswap import kernels

pytestmark = pytest.mark.gpu

SHAPES = [  # grid, dense tokens, pooled keys, heads, head_dim, radius
    pytest.param((64, 64), 512, 0, 4, 128, 8, id="FLUX, 1024 px"),
    pytest.param((64, 64), 512, 256, 4, 128, 8, id="FLUX, 1024 px, pooled"),
    pytest.param((48, 80), 333, 0, 4, 64, 16, id="SD3, wide"),
    pytest.param((61, 43), 77, 0, 2, 128, 32, id="ragged"),
    pytest.param((9, 7), 0, 5, 2, 40, 3, id="a few tokens"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def on(backend, tensors, call):
    query, key, value, *pooled = tensors
    if pooled:
        call = call | {"pooled_key": pooled[0], "pooled_value": pooled[1]}
    with kernels.use_backend(backend):
        return kernels.local_attention(query, key, value, **call)


def error(out, truth):
    return (out.double() - truth).abs().max()


@DTYPES
@pytest.mark.parametrize(("grid", "dense", "pooled", "heads", "head_dim", "radius"), SHAPES)
def test_the_error_is_at_most_twice_that_of_pytorch(tensors, grid, dense, pooled, heads, head_dim, radius, dtype):
    from attnswap.kernels.local_attention import reference

    tokens = dense + grid[0] * grid[1]
    inputs = tensors(tokens, pooled=pooled, batch=2, heads=heads, head_dim=head_dim, dtype=dtype, device="cuda")
    call = {"grid": grid, "grid_offset": dense, "radius": radius}
    truth = on("eager", [x.double() for x in inputs], call)
    mask = reference.visible(tokens, grid, dense, radius, device="cuda")
    query, key, value, *far = inputs
    if far:
        key, value = torch.cat((key, far[0]), 1), torch.cat((value, far[1]), 1)
        of_grid = reference.grid_tokens(tokens, grid, dense, device="cuda")
        mask = torch.cat((mask, of_grid[:, None].expand(-1, pooled)), 1)
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    pytorch = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
    assert error(on("triton", inputs, call), truth) <= 2 * error(pytorch, truth) + 1e-6


@DTYPES
def test_masked_keys_have_no_influence_and_samples_without_keys_are_zero(tensors, dtype):
    query, key, value = tensors(64 + 40 * 33, batch=2, heads=2, head_dim=64, dtype=dtype, device="cuda")
    call = {"grid": (40, 33), "grid_offset": 64, "radius": 8}
    mask = torch.rand(2, query.shape[1], device="cuda") > 0.3
    mask[1] = False
    clean = [query, *(x.masked_fill(~mask[:, :, None, None], 0) for x in (key, value))]
    dirty = [query, *(x.masked_fill(~mask[:, :, None, None], float("nan")) for x in (key, value))]
    out = on("triton", dirty, call | {"key_mask": mask})
    assert (out[1] == 0).all()
    assert torch.equal(out, on("triton", clean, call | {"key_mask": mask}))
    expected = on("eager", dirty, call | {"key_mask": mask})
    torch.testing.assert_close(out, expected, atol=2e-5 if dtype == torch.float32 else 2e-2, rtol=0)


def test_gradients_of_the_eager_road_after_a_triton_forward(tensors):
    def gradients(backend):
        inputs = [x.requires_grad_() for x in tensors(32 + 20 * 24, heads=2, head_dim=64, device="cuda")]
        on(backend, inputs, {"grid": (20, 24), "grid_offset": 32, "radius": 5}).square().sum().backward()
        return [x.grad for x in inputs]

    for found, expected in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_cuda_graphs_around_it_do_not_change_the_result(tensors):
    """The lists of tiles outlive a graph: they are made in the first compiled call, and read in later ones."""
    torch._dynamo.reset()
    call = {"grid": (23, 17), "grid_offset": 5, "radius": 4.5}  # of no other test, whose lists would be there already
    inputs = tensors(5 + 23 * 17, heads=2, head_dim=64, device="cuda")
    compiled = torch.compile(lambda *qkv: on("triton", [x * 2 for x in qkv], call) + 1, mode="reduce-overhead")
    for factor in (1.0, 0.5, 2.0, 1.5):
        qkv = [x * factor for x in inputs]
        expected = on("eager", [x * 2 for x in qkv], call) + 1
        torch.testing.assert_close(compiled(*qkv), expected, atol=1e-4, rtol=1e-3)
