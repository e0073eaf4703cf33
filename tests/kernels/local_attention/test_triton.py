"""How the Triton kernels cut up the work. In the interpreter."""

from __future__ import annotations

import pytest
import torch
from attnswap import kernels
from attnswap.kernels import dispatch
from attnswap.kernels.targets import TARGETS

triton_kernels = pytest.importorskip("attnswap.kernels.local_attention.triton")
pytestmark = pytest.mark.skipif(not dispatch.triton_interprets(), reason="TRITON_INTERPRET is not set")
CPU = torch.device("cpu")


def close_to_the_definition(qkv, *, atol=2e-6, **call):
    with kernels.use_backend("reference"):
        expected = kernels.local_attention(*(x.double() for x in qkv), **call)
    with kernels.use_backend("triton"):
        out = kernels.local_attention(*qkv, **call)
    torch.testing.assert_close(out.double(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("target", [target for target in TARGETS if target.name in ("sm_80", "sm_90", "sm_120")])
def test_the_tiles_of_every_target(monkeypatch, tensors, target):
    """In fp16 with 128 dimensions: 8 x 16 or 8 x 8 queries, 8 x 8 or 4 x 8 keys."""
    monkeypatch.setattr(triton_kernels, "target_of", lambda device: target)
    qkv = tensors(3 + 9 * 19, head_dim=128, dtype=torch.float16)
    close_to_the_definition(qkv, grid=(9, 19), grid_offset=3, radius=3, atol=2e-3)


@pytest.mark.parametrize("keys", [31, 32, 33, 95])
def test_keys_split_among_programs_meet_without_a_gap(monkeypatch, tensors, keys):
    monkeypatch.setattr(triton_kernels, "MIN_SPLIT", 16)
    monkeypatch.setattr(triton_kernels, "_multiprocessors", lambda device: 4)
    assert triton_kernels.divided(keys + 2, 1, CPU, 32)[0] > 1
    close_to_the_definition(tensors(2 + keys), grid=(1, keys), grid_offset=2, radius=1)


def test_masked_splits_may_be_empty(monkeypatch, tensors):
    monkeypatch.setattr(triton_kernels, "MIN_SPLIT", 16)
    monkeypatch.setattr(triton_kernels, "_multiprocessors", lambda device: 4)
    mask = torch.arange(98)[None] >= torch.tensor([[70], [98]])
    close_to_the_definition(tensors(98, batch=2), grid=(1, 96), grid_offset=2, radius=1, key_mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [7, 24])
def test_rows_that_start_on_any_element(tensors, head_dim, dtype):
    qkv = tensors(1 + 12, heads=2, head_dim=head_dim, dtype=dtype)
    close_to_the_definition(qkv, grid=(3, 4), grid_offset=1, radius=2, atol=2e-6 if dtype == torch.float32 else 2e-3)


def test_addresses_beyond_two_to_the_31_elements():
    """Tokens far apart in memory that is asked for and never touched in between."""
    step, tokens = 2**28, 9
    memory = torch.empty((tokens - 1) * step + 48, dtype=torch.float16)
    assert memory.numel() > 2**31
    far = [memory.as_strided((1, tokens, 1, 16), (0, step, 0, 1), offset) for offset in (0, 16, 32)]
    for x in far:
        x.copy_(torch.randn(x.shape))
    close_to_the_definition(far, grid=(2, 4), grid_offset=1, radius=2, atol=2e-3)


@pytest.mark.parametrize(
    ("tokens", "programs", "expected"),
    [
        (1500, 96, (1, 1536)),  # too short to divide
        (4608, 96, (3, 1536)),  # 2 x 132 programs
        (262_656, 96, (3, 87552)),
        (262_656, 4, (66, 4032)),  # a small batch: more splits
        (262_656, 300, (1, 262_656)),  # enough programs
    ],
)
def test_splits_fill_the_device_and_are_not_short(monkeypatch, tokens, programs, expected):
    monkeypatch.setattr(triton_kernels, "_multiprocessors", lambda device: 132)
    splits, size = triton_kernels.divided(tokens, programs, CPU, 64)
    assert (splits, size) == expected
    assert (splits - 1) * size < tokens <= splits * size


def test_head_dimensions_above_128_are_left_to_the_eager_backend(tensors):
    qkv = tensors(4, head_dim=136)
    with kernels.use_backend("triton"), pytest.raises(ValueError, match="head dimension 136 is above 128"):
        kernels.local_attention(*qkv, grid=(2, 2), radius=1)
