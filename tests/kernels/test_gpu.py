"""Window attention on a CUDA device, at realistic shapes. `benchmarks/gpu.py` runs these before it times anything."""

from __future__ import annotations

import pytest
import torch
from attnswap import kernels
from torch.nn.functional import scaled_dot_product_attention

pytestmark = pytest.mark.gpu

SHAPES = [  # grid, windows, heads, head_dim
    pytest.param((32, 32), (2, 2), 20, 64, id="SDXL 2048 px, pooled level"),
    pytest.param((64, 64), (2, 2), 10, 64, id="SDXL 1024 px"),
    pytest.param((65, 63), (2, 2), 10, 64, id="SDXL, odd grid"),
    pytest.param((128, 96), (2, 2), 8, 40, id="SD 1.5 1024x768 px"),
    pytest.param((47, 33), (3, 2), 8, 80, id="SD 1.5 middle level, odd grid"),
    pytest.param((24, 25), (2, 2), 8, 160, id="SD 1.5 low level"),
    pytest.param((40, 40), (4, 2), 4, 128, id="head dimension 128"),
    pytest.param((20, 24), (2, 2), 2, 256, id="head dimension 256"),
    pytest.param((3, 5), (2, 2), 2, 24, id="windows of a few tokens"),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
TRITON_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def on(backend, *tensors, **call):
    with kernels.use_backend(backend):
        return kernels.window_attention(*tensors, **call)


def close_to_the_truth(out, tensors, **call):
    """Error against fp64 at most twice that of SDPA in the dtype of the tensors."""
    truth = on("eager", *(x.double() for x in tensors), **call)
    pytorch = on("eager", *tensors, **call)
    allowed = 2 * (pytorch.double() - truth).abs().max() + 1e-6
    assert (out.double() - truth).abs().max() <= allowed


@TRITON_DTYPES
@pytest.mark.parametrize(("grid", "windows", "heads", "head_dim"), SHAPES)
def test_the_error_is_at_most_twice_that_of_pytorch(qkv, grid, windows, heads, head_dim, dtype):
    tensors = qkv(grid, batch=2, heads=heads, head_dim=head_dim, dtype=dtype, device="cuda")
    call = {"grid": grid, "windows": windows, "shift": (grid[0] // 8 * 3, grid[1] // 8)}
    close_to_the_truth(on("triton", *tensors, **call), tensors, **call)


@TRITON_DTYPES
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
def test_masked_keys_have_no_influence_and_rows_without_keys_are_zero(qkv, head_dim, dtype):
    query, key, value = qkv((33, 30), batch=2, heads=2, head_dim=head_dim, dtype=dtype, device="cuda")
    mask = torch.rand(2, 990, device="cuda") > 0.3
    mask[1] = False
    call = {"grid": (33, 30), "shift": (5, 3), "key_mask": mask}
    dirty = [x.masked_fill(~mask[:, :, None, None], float("nan")) for x in (key, value)]
    out = on("triton", query, *dirty, **call)
    assert (out[1] == 0).all()
    close_to_the_truth(out, (query, key, value), **call)


@TRITON_DTYPES
def test_strided_inputs_equal_contiguous_ones(qkv, dtype):
    tensors = qkv((24, 24), batch=2, heads=4, head_dim=64, dtype=dtype, device="cuda")
    expected = on("triton", *tensors, grid=(24, 24), shift=(3, 6))
    fused = torch.stack(tensors, dim=2)
    assert torch.equal(on("triton", *fused.unbind(2), grid=(24, 24), shift=(3, 6)), expected)
    # Rows that start on any element, so that no load of 16 bytes is possible.
    loose = [torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in tensors]
    assert torch.equal(on("triton", *loose, grid=(24, 24), shift=(3, 6)), expected)


def test_one_window_equals_sdpa(qkv):
    tensors = qkv((48, 48), batch=1, heads=4, head_dim=64, dtype=torch.bfloat16, device="cuda")
    out = on("triton", *tensors, grid=(48, 48), windows=(1, 1), shift=(5, 5))
    dense = scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2)
    torch.testing.assert_close(out, dense, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_shift_never_waits_for_the_device(qkv, backend):
    tensors = qkv((16, 16), heads=2, head_dim=64, dtype=torch.float16, device="cuda")
    on_device = torch.tensor([4, 8], device="cuda")
    expected = on(backend, *tensors, grid=(16, 16), shift=(4, 8))  # compiles the kernel
    on(backend, *tensors, grid=(16, 16), shift=on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        by_integers = on(backend, *tensors, grid=(16, 16), shift=(4, 8))
        by_cpu_tensor = on(backend, *tensors, grid=(16, 16), shift=torch.tensor([4, 8]))
        by_device_tensor = on(backend, *tensors, grid=(16, 16), shift=on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for out in (by_integers, by_cpu_tensor, by_device_tensor):
        assert torch.equal(out, expected)


def test_a_cuda_graph_follows_a_shift_tensor(qkv):
    tensors = qkv((16, 16), heads=2, head_dim=64, dtype=torch.float16, device="cuda")
    shift = torch.tensor([0, 0], device="cuda")
    on("triton", *tensors, grid=(16, 16), shift=shift)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = on("triton", *tensors, grid=(16, 16), shift=shift)
    for step in range(3):
        shift.copy_(torch.tensor([step, 2 * step]))
        graph.replay()
        assert torch.equal(out, on("triton", *tensors, grid=(16, 16), shift=(step, 2 * step)))


def test_addresses_beyond_two_to_the_31_elements():
    """One head of a wide tensor: tokens lie so far apart that their offsets need 64 bits."""
    grid, width = (192, 192), 2**16
    wide = torch.empty(1, grid[0] * grid[1], 1, width, dtype=torch.float16, device="cuda")
    assert wide.numel() > 2**31
    tensors = [wide[..., i * 64 : (i + 1) * 64].normal_() for i in range(3)]
    call = {"grid": grid, "windows": (8, 8), "shift": (9, 11)}
    close_to_the_truth(on("triton", *tensors, **call), tensors, **call)


def test_gradients_follow_the_definition(qkv):
    def gradients(backend, dtype):
        tensors = [x.requires_grad_() for x in qkv((9, 10), heads=2, head_dim=64, dtype=dtype, device="cuda")]
        on(backend, *tensors, grid=(9, 10), shift=(1, 2)).square().sum().backward()
        return [x.grad for x in tensors]

    for found, truth in zip(gradients("triton", torch.float32), gradients("reference", torch.float64), strict=True):
        torch.testing.assert_close(found.double(), truth, atol=1e-4, rtol=1e-4)


def test_auto_takes_triton_and_explains(qkv):
    found = kernels.explain("window_attention", *qkv((8, 8), dtype=torch.float16, device="cuda"), grid=(8, 8))
    assert found.backend == "triton"
    assert "in place" in found.reason


def test_a_shift_tensor_in_a_compiled_model_does_not_recompile(qkv):
    torch._dynamo.reset()
    tensors = qkv((16, 16), heads=2, head_dim=64, dtype=torch.float16, device="cuda")
    attend = torch.compile(
        lambda *qkv, shift: kernels.window_attention(*qkv, grid=(16, 16), shift=shift),
        backend="aot_eager",
        fullgraph=True,
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(4):
            shift = torch.tensor([step, step], device="cuda")
            expected = kernels.window_attention(*tensors, grid=(16, 16), shift=shift)
            assert torch.equal(attend(*tensors, shift=shift), expected)
