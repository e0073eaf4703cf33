"""What the tests of linear attention share: tensors, the published form, and a chosen backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from attnswap import kernels
from attnswap.kernels import dispatch
from torch import Tensor
from torch.nn.functional import elu

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
    """Seeded normal query, key and value `[B, S, H, D]`; `keys` where there are more or fewer keys than queries."""

    def make(
        tokens: int,
        *,
        keys: int | None = None,
        batch: int = 1,
        heads: int = 1,
        head_dim: int = 8,
        std: float = 1.0,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> list[Tensor]:
        generator = torch.Generator().manual_seed(tokens * 1000 + head_dim)
        lengths = (tokens, keys or tokens, keys or tokens)
        made = [torch.randn((batch, length, heads, head_dim), generator=generator) for length in lengths]
        return [(x * std).to(device, dtype) for x in made]

    return make


@pytest.fixture
def published() -> Callable[..., Tensor]:
    """LinFusion's own form, in the dtype of the tensors: means by a factor N ** -0.5 on both sides of the product."""

    def attend(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-4) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        query, key = elu(query) + 1, elu(key) + 1
        scale = key.shape[2] ** -0.5
        denominator = query @ key.mean(dim=2, keepdim=True).transpose(-2, -1) + eps
        state = (key.transpose(-2, -1) * scale) @ (value * scale)
        return (query @ state / denominator).transpose(1, 2)

    return attend
