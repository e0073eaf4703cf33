"""Block-sparse attention on a CUDA device, at realistic shapes. `benchmarks/gpu.py` runs these before it times it."""

from __future__ import annotations

import pytest
import torch
from attnswap import kernels
from attnswap.kernels import BlockMask
from torch.nn.functional import scaled_dot_product_attention

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
SHAPES = [  # tokens, heads, head_dim, block
    pytest.param(2064, 4, 128, (64, 64), id="as HunyuanVideo, a short last block"),
    pytest.param(2064, 4, 128, (128, 64), id="two query blocks in one"),
    pytest.param(2048, 4, 64, (64, 64), id="as CogVideoX"),
    pytest.param(1000, 2, 64, (128, 128), id="large blocks"),
    pytest.param(777, 2, 128, (16, 32), id="small blocks"),
    pytest.param(300, 2, 40, (64, 16), id="a head dimension that is padded"),
]


def on(backend, function, *arguments, **call):
    with kernels.use_backend(backend):
        return function(*arguments, **call)


def heads_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def error(out, truth):
    return (out.double() - truth.double()).abs().max()


def on_device(made, dtype):
    return [x.to("cuda", dtype) for x in made]


def mixed_mask(mask):
    """With a row that keeps everything, and one that keeps nothing."""
    kept = mask.to_dense()
    kept[:, :, 1], kept[:, 0, 0] = True, False
    return BlockMask.from_dense(kept.cuda(), mask.block)


@DTYPES
@pytest.mark.parametrize(("tokens", "heads", "head_dim", "block"), SHAPES)
def test_the_error_is_at_most_twice_that_of_pytorch(
    tensors, random_mask, by_token, tokens, heads, head_dim, block, dtype
):
    qkv = on_device(tensors(tokens, batch=2, heads=heads, head_dim=head_dim), dtype)
    mask = mixed_mask(random_mask(qkv[0], block))
    truth = on("reference", kernels.block_sparse_attention, *(x.double() for x in qkv), mask, return_lse=True)
    seen = by_token(mask.to("cpu"), tokens).cuda()
    pytorch = scaled_dot_product_attention(*heads_first(*qkv), attn_mask=seen).transpose(1, 2).nan_to_num(0.0)
    out, lse = on("triton", kernels.block_sparse_attention, *qkv, mask, return_lse=True)
    assert error(out, truth[0]) <= 2 * error(pytorch, truth[0]) + 1e-5
    torch.testing.assert_close(lse.double(), truth[1], atol=1e-4, rtol=1e-4)


@DTYPES
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_dense_attention_and_its_log_sum_exp(tensors, backend, head_dim, dtype):
    """The eager backend calls PyTorch's kernels, whose log-sum-exps differ in shape."""
    qkv = on_device(tensors(1037, batch=2, heads=3, head_dim=head_dim), dtype)
    truth = on("reference", kernels.dense_attention, *(x.double() for x in qkv), return_lse=True)
    pytorch = scaled_dot_product_attention(*heads_first(*qkv)).transpose(1, 2)
    out, lse = on(backend, kernels.dense_attention, *qkv, return_lse=True)
    assert error(out, truth[0]) <= 2 * error(pytorch, truth[0]) + 1e-5
    torch.testing.assert_close(lse.double(), truth[1], atol=1e-4, rtol=1e-4)


@DTYPES
@pytest.mark.parametrize(("tokens", "heads", "head_dim", "block"), SHAPES)
def test_scores_against_a_reference_of_an_earlier_step(tensors, tokens, heads, head_dim, block, dtype):
    query, key, value = on_device(tensors(tokens, batch=2, heads=heads, head_dim=head_dim), dtype)
    doubles = [x.double() for x in (query, key, value)]
    dense, present = on("reference", kernels.dense_attention, *doubles, return_lse=True)
    earlier = present + torch.randn(present.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    earlier[0, 0, 70:75] = float("nan")
    earlier[1, 1, 5] -= 65  # too far off for one pass
    expected, _ = on("reference", kernels.block_scores, *doubles[:2], earlier, block=block)
    exact = torch.ones_like(present, dtype=torch.bool)
    exact[1, 1, 5] = False
    scores, lse = on("triton", kernels.block_scores, query, key, earlier.float(), block=block)
    torch.testing.assert_close(scores.double(), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(lse.double()[exact], present[exact], atol=1e-4, rtol=1e-4)

    call = {"block": block}
    out, lse, scores = on("triton", kernels.dense_attention_with_scores, query, key, value, earlier.float(), **call)
    pytorch = scaled_dot_product_attention(*heads_first(query, key, value)).transpose(1, 2)
    assert error(out, dense) <= 2 * error(pytorch, dense) + 1e-5
    torch.testing.assert_close(lse.double(), present, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores.double(), expected, atol=1e-3, rtol=1e-3)


@DTYPES
def test_without_a_reference_the_scores_of_a_row_sum_to_its_queries(tensors, dtype):
    query, key, _ = on_device(tensors(1037, heads=3, head_dim=128), dtype)
    scores, lse = on("triton", kernels.block_scores, query, key, None)
    rows = torch.full((17,), 64.0, device="cuda")
    rows[-1] = 1037 - 16 * 64
    torch.testing.assert_close(scores.sum(-1), rows.expand(1, 3, 17), atol=1e-2, rtol=1e-3)
    assert torch.allclose(on("triton", kernels.block_scores, query, key, lse)[0], scores, atol=1e-3, rtol=1e-3)


@DTYPES
def test_keys_past_the_length_are_not_seen_whatever_they_hold(tensors, random_mask, dtype):
    query, key, value = on_device(tensors(900, batch=3, heads=2, head_dim=128), dtype)
    lengths = torch.tensor([900, 333, 0], device="cuda")
    past = (torch.arange(900, device="cuda") >= lengths[:, None])[..., None, None]
    clean, dirty = ([query, *(x.masked_fill(past, hole) for x in (key, value))] for hole in (0.0, float("nan")))
    mask = mixed_mask(random_mask(query, (64, 64)))
    call = {"kv_lengths": lengths}
    for function, rest in ((kernels.block_sparse_attention, (mask,)), (kernels.dense_attention, ())):
        out = on("triton", function, *dirty, *rest, **call)
        assert torch.equal(out, on("triton", function, *clean, *rest, **call))
        assert (out[2] == 0).all()
        expected = on("reference", function, *clean, *rest, **call)
        torch.testing.assert_close(out, expected, atol=1e-4 if dtype == torch.float32 else 2e-2, rtol=1e-3)
    scores, lse = on("triton", kernels.block_scores, *dirty[:2], None, **call)
    expected = on("reference", kernels.block_scores, *clean[:2], None, **call)
    torch.testing.assert_close(scores, expected[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(lse, expected[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_nothing_waits_for_the_device(tensors, random_mask, dtype):
    query, key, value = on_device(tensors(500, heads=2, head_dim=64), dtype)
    mask = mixed_mask(random_mask(query, (64, 64)))
    lse = torch.zeros(1, 2, 500, device="cuda")
    call = {"kv_lengths": torch.tensor([450], device="cuda")}

    def all_four():
        on("triton", kernels.block_sparse_attention, query, key, value, mask, **call)
        on("triton", kernels.dense_attention, query, key, value, **call)
        on("triton", kernels.block_scores, query, key, lse, **call)
        on("triton", kernels.dense_attention_with_scores, query, key, value, lse, **call)

    all_four()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        all_four()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_follows_the_bits_of_a_mask(tensors, random_mask):
    qkv = on_device(tensors(500, heads=2, head_dim=64), torch.bfloat16)
    masks = [BlockMask.from_dense(random_mask(qkv[0], (64, 64), seed=seed).to_dense().cuda()) for seed in range(3)]
    static = BlockMask(masks[0].bits.clone(), masks[0].counts.clone(), 8, (64, 64), 2 * 8 * 8)
    on("triton", kernels.block_sparse_attention, *qkv, static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = on("triton", kernels.block_sparse_attention, *qkv, static)
    for mask in masks:
        static.bits.copy_(mask.bits)
        static.counts.copy_(mask.counts)
        graph.replay()
        assert torch.equal(out, on("triton", kernels.block_sparse_attention, *qkv, mask))


def test_addresses_beyond_two_to_the_31_elements(random_mask):
    """One head of a wide tensor: tokens lie so far apart that their offsets need 64 bits."""
    tokens, width = 36864, 2**16
    wide = torch.empty(1, tokens, 1, width, dtype=torch.float16, device="cuda")
    assert wide.numel() > 2**31
    tensors = [wide[..., i * 64 : (i + 1) * 64].normal_() for i in range(3)]
    mask = random_mask(tensors[0], (64, 64)).to("cuda")
    found = on("triton", kernels.block_sparse_attention, *tensors, mask)
    assert torch.equal(found, on("triton", kernels.block_sparse_attention, *(x.contiguous() for x in tensors), mask))


def test_auto_takes_triton_over_a_mask_and_pytorch_for_dense_attention(tensors, random_mask):
    qkv = on_device(tensors(100, head_dim=64), torch.bfloat16)
    mask = random_mask(qkv[0], (64, 64)).to("cuda")
    assert kernels.explain("block_sparse_attention", *qkv, mask).backend == "triton"
    assert kernels.explain("dense_attention", *qkv).backend == "eager"
