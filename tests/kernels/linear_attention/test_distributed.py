"""Tokens split over ranks: two processes with unequal slices give what one process gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed
from attnswap import kernels
from torch import Tensor

SLICES = (5, 18)
CUTS = {"queries": 7, "keys": SLICES[0]}


def problem() -> tuple[list[Tensor], Tensor]:
    """Query, key and value, and a mask that leaves the second sample no key in the first slice."""
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(2, tokens, 2, 8, generator=generator) for tokens in (20, 23, 23)]
    mask = torch.rand(2, sum(SLICES), generator=generator) > 0.3
    mask[1, : SLICES[0]] = False
    return qkv, mask


def of_rank(rank: int, x: Tensor, cut: int) -> Tensor:
    return (x[:, :cut] if rank == 0 else x[:, cut:]).clone()


def attend(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    group = torch.distributed.group.WORLD
    qkv, mask = problem()
    cuts = (CUTS["queries"], CUTS["keys"], CUTS["keys"])
    local = [of_rank(rank, x, cut).requires_grad_() for x, cut in zip(qkv, cuts, strict=True)]
    out = kernels.linear_attention(*local, group=group)
    out.square().sum().backward()
    masked = kernels.linear_attention(*local, key_mask=of_rank(rank, mask, CUTS["keys"]), group=group)
    torch.save(
        {"out": out.detach(), "masked": masked.detach(), "gradients": [x.grad for x in local]}, f"{folder}/{rank}.pt"
    )
    torch.distributed.destroy_process_group()


def test_two_ranks_with_unequal_slices_equal_one_process(tmp_path: Path) -> None:
    # As a script: what a process of `multiprocessing` would import is not on its path.
    ranks_running = [subprocess.Popen([sys.executable, __file__, rank, tmp_path]) for rank in ("0", "1")]
    assert [process.wait(timeout=120) for process in ranks_running] == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    qkv, mask = problem()
    whole = [x.requires_grad_() for x in qkv]
    out = kernels.linear_attention(*whole)
    out.square().sum().backward()
    torch.testing.assert_close(torch.cat([rank["out"] for rank in ranks], dim=1), out, atol=1e-6, rtol=0)
    expected = kernels.linear_attention(*qkv, key_mask=mask)
    torch.testing.assert_close(torch.cat([rank["masked"] for rank in ranks], dim=1), expected, atol=1e-6, rtol=0)
    for i, x in enumerate(whole):
        found = torch.cat([rank["gradients"][i] for rank in ranks], dim=1)
        torch.testing.assert_close(found, x.grad, atol=1e-6, rtol=0)


if __name__ == "__main__":
    attend(int(sys.argv[1]), sys.argv[2])
