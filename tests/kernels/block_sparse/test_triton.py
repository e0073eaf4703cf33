"""How the Triton kernels of block-sparse attention cut up the work. In the interpreter."""

from __future__ import annotations

import pytest
import torch
from attnswap import kernels
from attnswap.kernels import BlockMask, dispatch
from attnswap.kernels.block_sparse import reference
from attnswap.kernels.targets import TARGETS

triton = pytest.importorskip("triton")
triton_backend = pytest.importorskip("attnswap.kernels.block_sparse.triton")
tl, triton_tiles = triton.language, pytest.importorskip("attnswap.kernels.block_sparse.triton_tiles")
pytestmark = pytest.mark.skipif(not dispatch.triton_interprets(), reason="TRITON_INTERPRET is not set")

EXACT = {"atol": 2e-6, "rtol": 1e-5}
HALF = {"atol": 2e-3, "rtol": 1e-3}
TOKENS = 70


@triton.jit
def lengths_kernel(lengths_ptr, found_ptr, tokens):
    sample = tl.program_id(0)
    tl.store(found_ptr + sample, triton_tiles.seen_keys(lengths_ptr, sample, tokens, True))


def near(found, expected, tolerance=EXACT):
    torch.testing.assert_close(found.float(), expected.float(), **tolerance)


def sparse_as_defined(tensors, mask, tolerance=EXACT, **call):
    call = {"kv_lengths": None, "scale": tensors[0].shape[-1] ** -0.5} | call
    out, lse = triton_backend.block_sparse_attention(*tensors, mask, **call)
    expected = reference.block_sparse_attention(*(x.float() for x in tensors), mask, **call)
    near(out, expected[0], tolerance)
    near(lse, expected[1], tolerance)


def scores_as_defined(query, key, lse, block, tolerance=EXACT, **call):
    call = {"block": block, "kv_lengths": None, "scale": query.shape[-1] ** -0.5} | call
    scores, present = triton_backend.block_scores(query, key, lse, **call)
    expected = reference.block_scores(query.float(), key.float(), lse, **call)
    near(scores, expected[0], {"atol": block[0] * tolerance["atol"], "rtol": tolerance["rtol"]})
    near(present, expected[1], tolerance)


@pytest.mark.parametrize("block", [(16, 16), (16, 64), (64, 16), (128, 128)], ids=str)
def test_a_block_may_be_larger_or_smaller_than_a_tile(tensors, random_mask, block):
    """Tiles of fp32 have 32 x 32 tokens."""
    qkv = tensors(TOKENS, head_dim=24)
    sparse_as_defined(qkv, random_mask(qkv[0], block))
    scores_as_defined(*qkv[:2], None, block)


@pytest.mark.parametrize("target", [target for target in TARGETS if target.name in ("sm_80", "sm_90", "sm_120")])
def test_the_tiles_of_every_target(monkeypatch, tensors, random_mask, target):
    """In fp16 with 128 dimensions."""
    monkeypatch.setattr(triton_backend, "target_of", lambda device: target)
    qkv = tensors(TOKENS, head_dim=128, dtype=torch.float16)
    sparse_as_defined(qkv, random_mask(qkv[0], (64, 64)), HALF)
    scores_as_defined(*qkv[:2], None, (64, 64), HALF)


def test_rows_of_every_density_are_walked_to_their_end(tensors):
    """None, one and all blocks, the last of which is short."""
    qkv = tensors(TOKENS, heads=1)
    kept = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    kept[..., 1, 4] = kept[..., 2, 0] = kept[..., 3, :] = True
    sparse_as_defined(qkv, BlockMask.from_dense(kept, (16, 16)))


@pytest.mark.parametrize("lengths", [(0, 70), (16, 33)])
def test_blocks_past_the_seen_keys_are_cut_off_the_lists(tensors, random_mask, lengths):
    qkv = tensors(TOKENS, batch=2, heads=1)
    for sample, length in enumerate(lengths):
        for x in qkv[1:]:
            x[sample, length:] = float("nan")
    mask = random_mask(qkv[0], (16, 32))
    clean = [qkv[0], *(x.nan_to_num(0.0) for x in qkv[1:])]
    call = {"kv_lengths": torch.tensor(lengths), "scale": 0.25}
    found = triton_backend.block_sparse_attention(*qkv, mask, **call)
    for x, expected in zip(found, reference.block_sparse_attention(*clean, mask, **call), strict=True):
        near(x, expected)


def test_lengths_that_nobody_checked_are_cut_to_the_keys():
    """Those on a GPU. Below 0 the walk along a list would have no end."""
    lengths = torch.tensor([-200, -1, 0, 30, TOKENS, TOKENS + 100], dtype=torch.int32)
    found = torch.full_like(lengths, 7)
    lengths_kernel[(len(lengths),)](lengths, found, TOKENS)
    assert found.tolist() == [0, 0, 0, 30, TOKENS, TOKENS]


def test_no_kernel_looks_beyond_the_keys(tensors, random_mask):
    """Where others' memory lies; here, more of the same."""
    query, key, value = (x[:, :40] for x in tensors(240, heads=1))
    mask = random_mask(query, (16, 32))
    lse = reference.dense_attention(query, key, value, kv_lengths=None, scale=0.25)[1]

    def all_four(kv_lengths):
        call = {"kv_lengths": kv_lengths, "scale": 0.25}
        yield from triton_backend.dense_attention(query, key, value, **call)
        yield from triton_backend.block_scores(query, key, None, block=(16, 32), **call)
        yield from triton_backend.dense_attention_with_scores(query, key, value, lse, block=(16, 32), **call)
        yield from triton_backend.block_sparse_attention(query, key, value, mask, **call)

    for found, expected in zip(all_four(torch.tensor([140])), all_four(None), strict=True):
        assert torch.equal(found, expected)


def test_lists_are_those_of_the_mask(monkeypatch, tensors, random_mask):
    monkeypatch.setattr(triton_backend, "CHUNK", 16)  # several steps for a row of 44 blocks
    mask = random_mask(tensors(700)[0], (128, 16))
    for found, expected in zip(triton_backend.block_index(mask), mask.index(), strict=True):
        assert torch.equal(found, expected)


def test_a_mask_that_keeps_nothing_is_zero(tensors):
    qkv = tensors(TOKENS)
    mask = BlockMask.from_dense(torch.zeros(1, 2, 3, 3, dtype=torch.bool), (32, 32))
    out, lse = triton_backend.block_sparse_attention(*qkv, mask, kv_lengths=None, scale=1.0)
    assert (out == 0).all()
    assert lse.isneginf().all()


def test_only_rows_without_a_reference_get_their_own(tensors):
    query, key, _ = tensors(TOKENS)
    present = reference.block_scores(query, key, None, block=(16, 16), kv_lengths=None, scale=0.25)[1]
    given = present + 1.0
    given[0, 1, 40], given[0, 1, 41], given[0, 0, 3] = float("nan"), float("inf"), -float("inf")
    found = triton_backend._reference(query, key, given, None, 0.25)
    kept = given.isfinite()
    assert torch.equal(found[kept], given[kept])
    near(found[~kept], present[~kept])


@pytest.mark.parametrize("shift", [0.0, 58.0, 61.0, 70.0, -39.0, -200.0])
def test_one_pass_is_right_however_far_off_the_reference_is(tensors, shift):
    """Past 60 the weights are cut off, far below 0 they are held up; such tiles are attended to once more."""
    query, key, value = tensors(TOKENS, heads=1)
    call = {"kv_lengths": None, "scale": 0.25}
    expected, lse = reference.dense_attention(query, key, value, **call)
    given = lse.clone()
    given[..., 40:] -= shift
    found = triton_backend.dense_attention_with_scores(query, key, value, given, block=(32, 16), **call)
    near(found[0], expected)
    near(found[1], lse)
    scores = reference.block_scores(query, key, given, block=(32, 16), **call)[0]
    torch.testing.assert_close(found[2], scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shift", [61.0, 200.0])
def test_rows_cut_off_at_60_are_found_though_rounding_may_put_them_below(tensors, shift):
    """With a single key nothing but its cut weight, e ** 60, tells that the reference was too far off."""
    qkv = tensors(TOKENS)
    call = {"kv_lengths": torch.tensor([1]), "scale": 0.25}
    _, lse = reference.dense_attention(*qkv, **call)
    _, found, _ = triton_backend.dense_attention_with_scores(*qkv, lse - shift, block=(32, 16), **call)
    near(found, lse)


def test_tiles_near_their_reference_are_not_attended_to_once_more(tensors):
    qkv = tensors(TOKENS, heads=1)
    _, lse = reference.dense_attention(*qkv, kv_lengths=None, scale=0.25)
    given = lse.clone()
    given[..., 40] -= 61
    given[..., 10] -= 58
    out, found = torch.full_like(qkv[0], 7.0), lse.clone()
    triton_backend._dense(*qkv, None, 0.25, given, out, found)
    far = torch.arange(TOKENS) // 32 == 1  # the tile of query 40
    assert (out[:, ~far] == 7).all()
    assert (out[:, far] != 7).any(-1).all()


def test_fp16_takes_two_passes(monkeypatch, tensors):
    """A weight above 65504, which is e ** 11.1, does not fit."""
    query, key, value = tensors(TOKENS, dtype=torch.float16)
    call = {"kv_lengths": None, "scale": 0.25}
    searched = []
    search = triton_backend._search
    monkeypatch.setattr(triton_backend, "_search", lambda *a: (searched.append(a[2]), search(*a))[1])
    expected, lse = reference.dense_attention(query, key, value, **call)
    with kernels.use_backend("triton"):
        found = kernels.dense_attention_with_scores(query, key, value, lse - 12, block=(32, 32), scale=0.25)
    assert searched == [None]
    near(found[0], expected, HALF)
    near(found[1], lse, HALF)


def test_nan_in_a_query_shows_in_the_scores_of_its_block_alone(tensors):
    query, key, _ = tensors(TOKENS)
    query[0, 20, 1] = float("nan")
    scores, _ = triton_backend.block_scores(query, key, None, block=(16, 16), kv_lengths=None, scale=0.25)
    assert scores[0, 1, 1].isnan().all()
    assert scores.isnan().sum() == scores.shape[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_that_start_on_any_element(tensors, random_mask, dtype):
    loose = [torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in tensors(40, heads=1, head_dim=23, dtype=dtype)]
    tolerance = EXACT if dtype == torch.float32 else HALF
    sparse_as_defined(loose, random_mask(loose[0], (16, 16)), tolerance)
    scores_as_defined(*loose[:2], None, (16, 16), tolerance)


def test_addresses_beyond_two_to_the_31_elements(random_mask):
    """Tokens far apart in memory that is asked for and never touched in between."""
    step, tokens = 2**27, 20
    memory = torch.empty((tokens - 1) * step + 48, dtype=torch.float16)
    assert memory.numel() > 2**31
    far = [memory.as_strided((1, tokens, 1, 16), (0, step, 0, 1), offset) for offset in (0, 16, 32)]
    for x in far:
        x.copy_(torch.randn(x.shape))
    sparse_as_defined(far, random_mask(far[0], (16, 16), seed=3), HALF)
    scores_as_defined(*far[:2], None, (16, 16), HALF)


@pytest.mark.parametrize("block", [(48, 64), (64, 256)], ids=str)
def test_other_blocks_are_left_to_the_eager_backend(tensors, random_mask, block):
    qkv = tensors(TOKENS)
    with kernels.use_backend("triton"), pytest.raises(ValueError, match=f"got {block[0]} x {block[1]}"):
        kernels.block_sparse_attention(*qkv, random_mask(qkv[0], block))


def test_a_mask_too_large_for_its_lists_is_left_to_the_eager_backend(tensors, random_mask):
    qkv = tensors(TOKENS)
    made = random_mask(qkv[0], (16, 16))
    mask = BlockMask(made.bits, made.counts, made.key_blocks, made.block, 2**31)
    with kernels.use_backend("triton"), pytest.raises(ValueError, match="may keep 2147483648 pairs of blocks"):
        kernels.block_sparse_attention(*qkv, mask)
