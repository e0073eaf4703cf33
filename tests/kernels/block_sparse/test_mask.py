"""BlockMask: what is kept survives packing, takes the memory it should, and can be listed."""

from __future__ import annotations

import pytest
import torch
from attnswap.kernels import BlockMask
from attnswap.kernels.block_sparse import mask as mask_file


def coins(*shape: int, share: float = 0.4) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1])) < share


@pytest.mark.parametrize("key_blocks", [1, 7, 8, 9, 64, 100])
def test_what_goes_in_comes_out(key_blocks):
    kept = coins(2, 3, 5, key_blocks)
    mask = BlockMask.from_dense(kept, (64, 32))
    assert torch.equal(mask.to_dense(), kept)
    assert torch.equal(mask.counts, kept.sum(-1, dtype=torch.int32))
    assert mask.shape == kept.shape
    assert mask.block == (64, 32)
    assert mask.capacity == int(kept.sum())
    assert mask.density() == pytest.approx(kept.float().mean().item())


def test_block_j_is_bit_j_from_the_lowest():
    kept = torch.zeros(1, 1, 1, 11, dtype=torch.bool)
    kept[..., [0, 3, 8, 10]] = True
    assert BlockMask.from_dense(kept).bits.flatten().tolist() == [0b1001, 0b101]


def test_it_takes_one_bit_for_a_pair_and_four_bytes_for_a_row():
    """Two heads of HunyuanVideo at 119,056 tokens; with 24 heads in 60 layers the bits take 0.58 GiB."""
    mask = BlockMask.from_dense(torch.zeros(1, 2, 1861, 1861, dtype=torch.bool))
    assert mask.nbytes == 2 * 1861 * (233 + 4)
    assert mask.bits.nbytes * 12 * 60 / 2**30 == pytest.approx(0.58, abs=0.005)


@pytest.mark.parametrize("expanded", [1, 40, 2**24], ids=["row by row", "some rows", "at once"])
@pytest.mark.parametrize("spare", [0, 9])
def test_the_list_of_a_row_is_its_kept_blocks_ascending(monkeypatch, expanded, spare):
    monkeypatch.setattr(mask_file, "EXPANDED", expanded)
    kept = coins(2, 3, 5, 13)
    kept[0, 1, 2] = False
    made = BlockMask.from_dense(kept)
    mask = BlockMask(made.bits, made.counts, 13, (64, 64), made.capacity + spare)
    blocks, starts = mask.index()
    assert blocks.dtype == starts.dtype == torch.int32
    assert blocks.shape == (mask.capacity,)
    assert starts.shape == (30,)
    for row, start, count in zip(kept.flatten(0, 2), starts.tolist(), mask.counts.flatten().tolist(), strict=True):
        assert blocks[start : start + count].tolist() == row.nonzero().flatten().tolist()


def test_a_list_longer_than_int32_can_count_is_refused():
    made = BlockMask.from_dense(coins(1, 2, 5, 5), (16, 16))
    mask = BlockMask(made.bits, made.counts, 5, made.block, 2**31)
    with pytest.raises(ValueError, match=r"at most 2147483647 .* may keep 2147483648; .* larger blocks than 16 x 16"):
        mask.index()


def test_it_says_its_size():
    assert repr(BlockMask.from_dense(coins(1, 2, 5, 5))) == (
        "BlockMask(1 x 2 x 5 x 5, block=(64, 64), 4.77e-05 MiB on cpu)"
    )


@pytest.mark.parametrize(
    ("kept", "block", "said"),
    [
        (torch.ones(1, 2, 3, 4), (64, 64), r"must be bool .* got torch.float32 \[1, 2, 3, 4\]"),
        (torch.ones(2, 3, 4, dtype=torch.bool), (64, 64), r"got torch.bool \[2, 3, 4\]"),
        ([[True]], (64, 64), "got list"),
        (torch.ones(1, 1, 1, 1, dtype=torch.bool), (64, 0), r"at least 1 .* got \(64, 0\)"),
        (torch.ones(1, 1, 1, 1, dtype=torch.bool), 64, "two integers, got 64"),
    ],
)
def test_what_is_no_mask_is_refused(kept, block, said):
    with pytest.raises(ValueError, match=said):
        BlockMask.from_dense(kept, block)
