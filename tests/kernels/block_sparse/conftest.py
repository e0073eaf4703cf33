"""What the tests of block-sparse attention share: tensors, masks, and a chosen backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from attnswap import kernels
from attnswap.kernels import BlockMask, dispatch
from torch import Tensor

BACKENDS = [
    "reference",
    "eager",
    pytest.param(
        "triton", marks=pytest.mark.skipif(not dispatch.triton_interprets(), reason="TRITON_INTERPRET is not set")
    ),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use_backend(request.param):
        yield request.param


@pytest.fixture
def tensors() -> Callable[..., list[Tensor]]:
    """Seeded normal query, key and value `[B, S, H, D]`."""

    def make(
        tokens: int, *, batch: int = 1, heads: int = 2, head_dim: int = 16, dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        generator = torch.Generator().manual_seed(tokens * 1000 + head_dim)
        return [torch.randn((batch, tokens, heads, head_dim), generator=generator).to(dtype) for _ in range(3)]

    return make


@pytest.fixture
def random_mask() -> Callable[..., BlockMask]:
    """A mask that keeps each pair of blocks by the toss of a coin, at its own density in each head."""

    def make(query: Tensor, block: tuple[int, int], *, seed: int = 0) -> BlockMask:
        batch, tokens, heads, _ = query.shape
        shape = (batch, heads, -(-tokens // block[0]), -(-tokens // block[1]))
        shares = torch.linspace(0.2, 0.8, heads)[:, None, None]
        return BlockMask.from_dense(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < shares, block)

    return make


@pytest.fixture
def by_token() -> Callable[[BlockMask, int], Tensor]:
    """A mask token by token, bool `[B, H, S, S]`."""

    def make(mask: BlockMask, tokens: int) -> Tensor:
        place = torch.arange(tokens)
        return mask.to_dense()[:, :, place[:, None] // mask.block[0], place // mask.block[1]]

    return make
