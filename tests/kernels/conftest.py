"""Kernel tests run on the CPU, Triton in its interpreter; those marked `gpu` need a CUDA device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: runs on a CUDA device, skipped where there is none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def qkv() -> Callable[..., list[Tensor]]:
    """Seeded random query, key and value `[B, h * w, H, D]`."""

    def make(
        grid: tuple[int, int],
        *,
        batch: int = 1,
        heads: int = 1,
        head_dim: int = 8,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> list[Tensor]:
        generator = torch.Generator().manual_seed(grid[0] * 1000 + grid[1])
        shape = (batch, grid[0] * grid[1], heads, head_dim)
        return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]

    return make
