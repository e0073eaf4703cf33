"""Linear attention on a CUDA device, at realistic shapes. `benchmarks/gpu.py` runs these before it times anything."""

from __future__ import annotations

import pytest
import torch
from attnswap import kernels

pytestmark = pytest.mark.gpu

SHAPES = [  # tokens, heads, head_dim
    pytest.param(16384, 8, 40, id="SD 1.5, 1024 px"),
    pytest.param(4096, 8, 80, id="SD 1.5, 1024 px, second level"),
    pytest.param(1024, 8, 160, id="SD 1.5, 1024 px, third level"),
    pytest.param(4096, 10, 64, id="SDXL, 1024 px"),
    pytest.param(8191, 4, 128, id="ragged, head dimension 128"),
    pytest.param(77, 2, 24, id="a few tokens"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def on(backend, *tensors, **call):
    with kernels.use_backend(backend):
        return kernels.linear_attention(*tensors, **call)


def exact(*tensors, **call):
    return on("eager", *(x.double() for x in tensors), **call)


def error(out, truth):
    return (out.double() - truth).abs().max()


@DTYPES
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), SHAPES)
def test_the_error_is_at_most_twice_that_of_pytorch(tensors, published, tokens, heads, head_dim, dtype):
    qkv = tensors(tokens, batch=2, heads=heads, head_dim=head_dim, dtype=dtype, device="cuda")
    truth = exact(*qkv)
    assert error(on("triton", *qkv), truth) <= 2 * error(published(*qkv), truth)


@pytest.mark.parametrize("std", [100, 200])
def test_large_fp16_inputs_lose_no_more_than_the_rounding_of_the_output(tensors, std):
    qkv = tensors(4096, heads=4, head_dim=64, std=std, dtype=torch.float16, device="cuda")
    truth = exact(*qkv)
    assert error(on("triton", *qkv), truth) <= 2 * error(truth.half(), truth)


@pytest.mark.parametrize("tokens", [2**14, 2**18, 2**22], ids=["16K", "256K", "4M"])
def test_the_sums_are_as_precise_over_millions_of_keys(tokens):
    """All keys and values alike, and powers of two: nothing is rounded but the sums."""
    key, value = (torch.full((1, 1, 1, 64), x, device="cuda").half().expand(1, tokens, 1, 64) for x in (0.5, 0.25))
    with kernels.use_backend("triton"):
        state, key_sum, _ = kernels.linear_attention_state(key, value)
    torch.testing.assert_close(key_sum, torch.full_like(key_sum, 1.5 * tokens), rtol=1e-6, atol=0)
    torch.testing.assert_close(state, torch.full_like(state, 0.375 * tokens), rtol=1e-4, atol=0)


@DTYPES
@pytest.mark.parametrize("head_dim", [40, 64, 128, 160])
def test_masked_keys_have_no_influence_and_samples_without_keys_are_zero(tensors, published, head_dim, dtype):
    query, key, value = tensors(990, keys=5000, batch=2, heads=2, head_dim=head_dim, dtype=dtype, device="cuda")
    mask = torch.rand(2, 5000, device="cuda") > 0.3
    mask[1] = False
    dirty = [x.masked_fill(~mask[:, :, None, None], float("nan")) for x in (key, value)]
    out = on("triton", query, *dirty, key_mask=mask)
    assert (out[1] == 0).all()
    first = [query[:1], key[:1, mask[0]], value[:1, mask[0]]]
    truth = exact(*first)
    assert error(out[:1], truth) <= 2 * error(published(*first), truth)


@DTYPES
def test_strided_inputs_equal_contiguous_ones(tensors, dtype):
    qkv = tensors(5000, batch=2, heads=4, head_dim=64, dtype=dtype, device="cuda")
    expected = on("triton", *qkv)
    fused = torch.stack(qkv, dim=2)
    assert torch.equal(on("triton", *fused.unbind(2)), expected)
    # Rows that start on any element, so that no load of 16 bytes is possible.
    loose = [torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in qkv]
    assert torch.equal(on("triton", *loose), expected)


@DTYPES
def test_two_runs_give_the_same_bits(tensors, dtype):
    qkv = tensors(60000, heads=2, head_dim=40, dtype=dtype, device="cuda")
    assert torch.equal(on("triton", *qkv), on("triton", *qkv))


def test_outputs_beyond_two_to_the_31_elements(tensors):
    """4 million tokens of SD 1.5 at 16384 x 16384 px with guidance: the last of them equal those of a short call."""
    tokens, heads, head_dim = 2**22, 8, 40
    if torch.cuda.mem_get_info()[0] < 8 * 2 * tokens * heads * head_dim * 2:
        pytest.skip("needs 43 GB of free memory")
    key, value = (torch.randn(2, tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    assert key.numel() > 2**31
    out = on("triton", key, key, value)
    with kernels.use_backend("triton"):
        sums = kernels.linear_attention_state(key, value)
        assert torch.equal(out[:, -1000:], kernels.linear_attention_apply(key[:, -1000:], *sums))
        # The same sums by halves: a wrong address in the second half would show.
        cuts = zip(key.chunk(2, dim=1), value.chunk(2, dim=1), strict=True)
        halves = [kernels.linear_attention_state(*pair) for pair in cuts]
    torch.testing.assert_close(sums[1], halves[0][1] + halves[1][1], rtol=1e-5, atol=0)
    # Sums of products are about 2000, and from a wrong address would differ by as much.
    torch.testing.assert_close(sums[0], halves[0][0] + halves[1][0], rtol=1e-4, atol=20)


def test_a_call_needs_little_beyond_its_output(tensors):
    from attnswap.benchmarks.memory import peak_bytes

    qkv = tensors(2**18, heads=8, head_dim=40, dtype=torch.float16, device="cuda")
    on("triton", *qkv)
    peak = peak_bytes(lambda: on("triton", *qkv), torch.device("cuda"))
    assert peak <= qkv[0].nbytes + 16 * 2**20


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_call_never_waits_for_the_device(tensors, backend, masked):
    qkv = tensors(3000, heads=2, head_dim=64, dtype=torch.float16, device="cuda")
    mask = (torch.arange(3000, device="cuda") % 3 > 0)[None] if masked else None
    expected = on(backend, *qkv, key_mask=mask)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = on(backend, *qkv, key_mask=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, expected)


def test_a_cuda_graph_follows_its_inputs(tensors):
    qkv = tensors(5000, heads=2, head_dim=64, dtype=torch.float16, device="cuda")
    on("triton", *qkv)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = on("triton", *qkv)
    for _ in range(2):
        qkv[2].normal_()
        graph.replay()
        assert torch.equal(out, on("triton", *qkv))


def test_another_length_does_not_compile_again(tensors):
    from attnswap.kernels.linear_attention import triton as implementation

    kernel = implementation.linear_attention_state_kernel
    lengths = (5000, 6007, 9999, 40001)
    on("triton", *tensors(lengths[0], heads=2, head_dim=64, dtype=torch.float16, device="cuda"))
    compiled = {device: len(caches[0]) for device, caches in kernel.device_caches.items()}
    for tokens in lengths[1:]:
        on("triton", *tensors(tokens, heads=2, head_dim=64, dtype=torch.float16, device="cuda"))
    assert {device: len(caches[0]) for device, caches in kernel.device_caches.items()} == compiled


def test_gradients_follow_the_definition(tensors):
    def gradients(backend, dtype):
        qkv = [x.requires_grad_() for x in tensors(90, heads=2, head_dim=64, dtype=dtype, device="cuda")]
        on(backend, *qkv).square().sum().backward()
        return [x.grad for x in qkv]

    for found, truth in zip(gradients("triton", torch.float32), gradients("reference", torch.float64), strict=True):
        torch.testing.assert_close(found.double(), truth, atol=1e-5, rtol=1e-4)


def test_auto_takes_triton_and_explains(tensors):
    found = kernels.explain("linear_attention", *tensors(8, dtype=torch.float16, device="cuda"))
    assert found.backend == "triton"
    assert "in place" in found.reason
