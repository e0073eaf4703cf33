"""The PyTorch backend: what is particular to how it computes, and that it is sparse in work."""

from __future__ import annotations

import pytest
import torch
from attnswap import kernels
from attnswap.kernels import BlockMask
from attnswap.kernels.block_sparse import eager, library, reference, tiles
from torch.nn.attention import SDPBackend

CALL = {"kv_lengths": None, "scale": 0.25}
EXACT = {"atol": 1e-5, "rtol": 1e-5}


def close(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT | tolerance)


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles in each direction, the last ones ragged, several heads at once."""
    monkeypatch.setattr(tiles, "CPU_TILE", (64, 48))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.fixture
def lengths_on_the_device(monkeypatch):
    """As on an accelerator, whose tensors are not read by the host: lengths become a mask."""

    def seen(kv_lengths, key):
        return torch.arange(key.shape[1]) < kv_lengths[:, None], [key.shape[1]] * len(key)

    monkeypatch.setattr(tiles, "seen_and_lengths", seen)
    monkeypatch.setattr(library, "seen_and_lengths", seen)


@pytest.mark.parametrize("block", [(16, 16), (32, 48), (100, 7)])
def test_one_pass_over_many_tiles_is_attention_and_its_scores(small_tiles, tensors, block):
    qkv = tensors(170, batch=2, heads=3)
    old = torch.randn(2, 3, 170, generator=torch.Generator().manual_seed(1)) + 5
    expected = reference.dense_attention_with_scores(*qkv, old, block=block, **CALL)
    close(eager.dense_attention_with_scores(*qkv, old, block=block, **CALL), expected, rtol=1e-4)


def test_a_head_of_huge_scores_is_computed_beside_others(small_tiles, tensors):
    query, key, value = tensors(170)
    query[:, :, 0] *= 300
    expected = reference.dense_attention(query.double(), key.double(), value.double(), **CALL)
    out, lse, scores = tiles.attend(query, key, value, block=(16, 16), **CALL)
    torch.testing.assert_close(out.double(), expected[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(lse.double(), expected[1], atol=0, rtol=1e-5)
    torch.testing.assert_close(scores.sum((-2, -1)), torch.full((1, 2), 170.0), atol=1e-2, rtol=0)


@pytest.mark.parametrize("lengths", [(170, 50), (0, 97)])
def test_lengths_that_stay_on_the_device_are_those_that_are_read(small_tiles, lengths_on_the_device, tensors, lengths):
    query, key, value = tensors(170, batch=2)
    call = {"kv_lengths": torch.tensor(lengths), "scale": 0.25}
    old = torch.zeros(2, 2, 170)
    expected = reference.dense_attention_with_scores(query, key, value, old, block=(16, 32), **call)
    padding = torch.arange(170) >= call["kv_lengths"][:, None]
    key[padding], value[padding] = float("nan"), float("inf")
    close(eager.dense_attention_with_scores(query, key, value, old, block=(16, 32), **call), expected, rtol=1e-4)
    close(eager.dense_attention(query, key, value, **call), expected[:2])


@pytest.mark.parametrize(("wrong", "length"), [(270, 170), (-100, 0)])
def test_lengths_that_nobody_checked_are_cut_to_the_keys(tensors, random_mask, wrong, length):
    """Those on an accelerator."""
    qkv = tensors(170)
    mask = random_mask(qkv[0], (32, 32))
    found, expected = (
        eager.block_sparse_attention(*qkv, mask, kv_lengths=torch.tensor([x]), scale=0.25) for x in (wrong, length)
    )
    close(found, expected, atol=0, rtol=0)


def test_rows_gathered_together_are_those_gathered_alone(monkeypatch, tensors, random_mask):
    qkv = tensors(170, heads=3)
    mask = random_mask(qkv[0], (16, 32))
    expected = reference.block_sparse_attention(*qkv, mask, **CALL)
    for size in (1, 2**15, 2**20):
        monkeypatch.setattr(eager, "CPU_GATHERED", size)
        close(eager.block_sparse_attention(*qkv, mask, **CALL), expected)


def test_the_way_of_devices_without_such_a_fused_kernel(tensors):
    query, key, value = (x[0].transpose(0, 1) for x in tensors(40))
    expected = eager.attend(query, key, value, scale=0.25)
    close(eager.attend_by_products(query, key, value, scale=0.25), expected)
    qkv = tensors(40)
    out, lse, scores = tiles.attend(*qkv, **CALL)
    close((out, lse), library.dense_attention(*qkv, **CALL))
    assert scores is None


@pytest.mark.parametrize("density", [0.125, 0.5, 1.0])
def test_no_more_pairs_are_computed_than_kept(monkeypatch, tensors, density):
    """With other densities in other heads: 256 tokens, 16 x 16 blocks of 16, and one row that keeps all."""
    pairs = 0

    def counting(function):
        def counted(query, key, *rest, **call):
            nonlocal pairs
            pairs += query[..., 0].numel() * key.shape[1]
            return function(query, key, *rest, **call)

        return counted

    monkeypatch.setattr(eager, "attend", counting(eager.attend))
    monkeypatch.setattr(eager, "dense_attention", counting(eager.dense_attention))
    qkv = tensors(256)
    kept = torch.zeros(1, 2, 16, 16, dtype=torch.bool)
    kept[:, 0, :, : int(16 * density)] = True
    kept[:, 1, :, -1:] = True
    kept[:, 1, 3] = True
    mask = BlockMask.from_dense(kept, (16, 16))
    eager.block_sparse_attention(*qkv, mask, **CALL)
    assert pairs == int(kept.sum()) * 256


@pytest.mark.parametrize("lengths", [None, (77, 20)])
@pytest.mark.parametrize(
    "kernel",
    [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    ids=lambda kernel: kernel.name,
)
def test_pytorchs_gpu_kernels_are_called_as_they_are_declared(monkeypatch, kernel, lengths):
    """On tensors without memory, whose shapes PyTorch knows: the log-sum-exp comes in another form from each kernel."""
    if kernel == SDPBackend.FLASH_ATTENTION and lengths:
        pytest.skip("takes no bias, and PyTorch never chooses it with one")
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: kernel.value)
    query = torch.empty(2, 77, 3, 20, dtype=torch.bfloat16, device="meta")
    kv_lengths = None if lengths is None else torch.empty(2, dtype=torch.int64, device="meta")
    out, lse = library.dense_attention(query, query, query, kv_lengths, 0.25)
    assert (out.shape, out.dtype, out.is_contiguous()) == (query.shape, torch.bfloat16, True)
    assert (lse.shape, lse.dtype, lse.is_contiguous()) == ((2, 3, 77), torch.float32, True)


def test_explain_tells_why_dense_attention_is_left_to_pytorch(monkeypatch, tensors):
    from attnswap.kernels import dispatch

    monkeypatch.setattr(dispatch, "triton_ready", lambda device: dispatch.Verdict(True, "a GPU"))
    monkeypatch.setattr(dispatch, "device_of", lambda call: torch.device("cuda"))
    found = kernels.explain("dense_attention", *tensors(20))
    assert found.backend == "eager"
    assert "PyTorch's own kernels return the log-sum-exp" in found.reason
    mask = BlockMask.from_dense(torch.ones(1, 2, 1, 1, dtype=torch.bool))
    assert kernels.explain("block_sparse_attention", *tensors(20), mask).backend == "triton"
    odd = BlockMask.from_dense(torch.ones(1, 2, 1, 1, dtype=torch.bool), (48, 64))
    assert (
        "must be of 16, 32, 64, 128, got 48 x 64" in kernels.explain("block_sparse_attention", *tensors(20), odd).reason
    )
