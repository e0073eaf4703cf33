"""How the Triton kernels cut up the work: parts, tiles, addresses. In the interpreter."""

from __future__ import annotations

import pytest
import torch
from attnswap import kernels
from attnswap.kernels import dispatch

triton_kernels = pytest.importorskip("attnswap.kernels.linear_attention.triton")
pytestmark = pytest.mark.skipif(not dispatch.triton_interprets(), reason="TRITON_INTERPRET is not set")
TILE = triton_kernels.STATE_CONFIGS[4, 64].block_m
CPU = torch.device("cpu")


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of two tiles, so that a few tokens make several."""
    monkeypatch.setattr(triton_kernels, "MIN_SPLIT", 2 * TILE)
    monkeypatch.setattr(triton_kernels, "MAX_SPLIT", 2 * TILE)


def close_to_the_definition(qkv, **call):
    with kernels.use_backend("reference"):
        expected = kernels.linear_attention(*(x.double() for x in qkv), **call)
    with kernels.use_backend("triton"):
        out = kernels.linear_attention(*qkv, **call)
    torch.testing.assert_close(out.double(), expected, atol=1e-6 if out.dtype == torch.float32 else 2e-3, rtol=0)


@pytest.mark.parametrize("tokens", [1, TILE - 1, TILE, TILE + 1, 2 * TILE - 1, 2 * TILE, 2 * TILE + 1, 5 * TILE + 3])
def test_tiles_and_parts_meet_without_a_gap(tensors, small_parts, tokens):
    close_to_the_definition(tensors(3, keys=tokens))


def test_parts_of_several_samples_heads_and_columns_are_told_apart(tensors, small_parts):
    """Head dimension 80 is two column blocks in fp32."""
    assert triton_kernels.STATE_CONFIGS[4, 128].block_n < 80
    close_to_the_definition(tensors(3, keys=3 * TILE, batch=2, heads=2, head_dim=80))


def test_masked_parts_may_be_empty(tensors, small_parts):
    mask = torch.arange(4 * TILE)[None] >= torch.tensor([[3 * TILE], [0]])
    close_to_the_definition(tensors(3, keys=4 * TILE, batch=2), key_mask=mask)


def test_more_parts_than_the_summing_kernel_takes_at_once(tensors, monkeypatch):
    for name in ("MIN_SPLIT", "MAX_SPLIT"):
        monkeypatch.setattr(triton_kernels, name, TILE)
    close_to_the_definition(tensors(2, keys=TILE * (triton_kernels.SUM_PARTS + 1)))


def test_queries_of_several_ranges(tensors, monkeypatch):
    tile = triton_kernels.APPLY_CONFIGS[4, 64].block_m
    close_to_the_definition(tensors(2 * tile + 5, keys=8))
    monkeypatch.setattr(triton_kernels, "PROGRAMS_PER_SM", 1)  # one program walks over all tiles
    close_to_the_definition(tensors(2 * tile + 5, keys=8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [1, 7, 24])
def test_rows_that_start_on_any_element(tensors, head_dim, dtype):
    close_to_the_definition(tensors(9, heads=2, head_dim=head_dim, dtype=dtype))


def test_a_state_that_differs_widely_in_size_keeps_its_digits_in_fp16(tensors):
    """Rows of the state far below the largest of their column, met by queries that see nothing else."""
    query, key, value = tensors(16, dtype=torch.float16)
    key[..., :4] -= 9
    query[..., 4:] = -60
    value = value.abs()
    value[..., ::2] *= 300
    with kernels.use_backend("triton"):
        out = kernels.linear_attention(query, key, value)
    with kernels.use_backend("reference"):
        truth = kernels.linear_attention(*(x.double() for x in (query, key, value)))
    torch.testing.assert_close(out.double(), truth, rtol=4e-3, atol=1e-6)


def test_addresses_beyond_two_to_the_31_elements():
    """Tokens far apart in memory that is asked for and never touched in between."""
    step, tokens = 2**28, 9
    memory = torch.empty((tokens - 1) * step + 24, dtype=torch.float16)
    assert memory.numel() > 2**31
    far = [memory.as_strided((1, tokens, 1, 8), (0, step, 0, 1), offset) for offset in (0, 8, 16)]
    for x in far:
        x.copy_(torch.randn(x.shape))
    close_to_the_definition(far)


@pytest.mark.parametrize(
    ("tokens", "programs", "expected"),
    [
        (1000, 20, (1, 1024)),  # too short to divide
        (4096, 20, (2, 2048)),  # at least 2048 tokens in a part
        (65536, 20, (27, 2432)),  # 4 x 132 programs
        (1_048_576, 600, (128, 8192)),  # enough programs, but a part has 8192 tokens at most
        (1_048_577, 600, (129, 8192)),
    ],
)
def test_parts_fill_the_device_and_are_neither_short_nor_long(monkeypatch, tokens, programs, expected):
    monkeypatch.setattr(triton_kernels, "_multiprocessors", lambda device: 132)
    parts, size = triton_kernels.divided(tokens, programs, CPU, 64, 2048, 8192)
    assert (parts, size) == expected
    assert (parts - 1) * size < tokens <= parts * size
