"""What the tests of local attention share: tensors, the mask by brute force, and a chosen backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from attnswap import kernels
from attnswap.kernels import dispatch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

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
    """Seeded normal query, key and value `[B, S, H, D]`; with `pooled`, that many pooled keys and values as well."""

    def make(
        tokens: int,
        *,
        pooled: int = 0,
        batch: int = 1,
        heads: int = 1,
        head_dim: int = 16,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> list[Tensor]:
        generator = torch.Generator().manual_seed(tokens * 1000 + head_dim)
        lengths = [tokens] * 3 + [pooled] * 2 * (pooled > 0)
        made = [torch.randn((batch, length, heads, head_dim), generator=generator) for length in lengths]
        return [x.to(device, dtype) for x in made]

    return make


@pytest.fixture
def masked() -> Callable[..., Tensor]:
    """PyTorch's attention under an explicit mask `[S, S + P]`, in the dtype of the tensors."""

    def attend(mask: Tensor, query: Tensor, key: Tensor, value: Tensor, *pooled: Tensor, **call: float) -> Tensor:
        if pooled:
            key, value = torch.cat((key, pooled[0]), 1), torch.cat((value, pooled[1]), 1)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, **call).transpose(1, 2)

    return attend


@pytest.fixture
def visible() -> Callable[..., Tensor]:
    """bool `[S, S + P]` token by token: the query of a row may attend to the key of a column."""

    def make(grid: tuple[int, int], radius: float, *, before: int = 0, after: int = 0, pooled: int = 0) -> Tensor:
        places: list[tuple[int, int] | None] = [None] * before
        places += [(y, x) for y in range(grid[0]) for x in range(grid[1])]
        places += [None] * after

        def sees(query: tuple[int, int] | None, key: tuple[int, int] | None) -> bool:
            if query is None or key is None:
                return True
            return (query[0] - key[0]) ** 2 + (query[1] - key[1]) ** 2 < radius**2

        return torch.tensor([[sees(query, key) for key in places] + [query is not None] * pooled for query in places])

    return make
