"""Pooled tokens: one weighted sum for each cell of the grid."""

from __future__ import annotations

import pytest
import torch
from attnswap import kernels


def by_loops(x, weights, grid, grid_offset):
    side = weights.shape[0]
    height, width = grid[0] // side, grid[1] // side
    pooled = torch.zeros(x.shape[0], height * width, *x.shape[2:], dtype=x.dtype)
    for y in range(grid[0]):
        for column in range(grid[1]):
            cell = (y // side) * width + column // side
            pooled[:, cell] += weights[y % side, column % side] * x[:, grid_offset + y * grid[1] + column]
    return pooled


@pytest.mark.parametrize(("grid", "side"), [((4, 6), 2), ((12, 8), 4), ((3, 5), 1), ((4, 4), 4)], ids=str)
def test_it_is_the_weighted_sum_of_each_cell(tensors, grid, side):
    x = tensors(3 + grid[0] * grid[1] + 2, batch=2, heads=2, dtype=torch.float64)[0]
    weights = torch.randn(side, side, dtype=torch.float64)
    pooled = kernels.pool_tokens(x, weights, grid=grid, grid_offset=3)
    torch.testing.assert_close(pooled, by_loops(x, weights, grid, 3))


def test_gradients_are_right(tensors):
    x = tensors(1 + 24, heads=2, head_dim=2, dtype=torch.float64)[0].requires_grad_()
    weights = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: kernels.pool_tokens(*a, grid=(4, 6), grid_offset=1), (x, weights))


def test_sums_are_taken_in_fp32(tensors):
    """16 times 1 + 1/1024 passes the 11 digits of fp16 at every step."""
    x = torch.full((1, 16, 1, 8), 1 + 2**-10, dtype=torch.float16)
    pooled = kernels.pool_tokens(x, torch.ones(4, 4), grid=(4, 4))
    assert pooled.dtype == torch.float16
    assert (pooled == torch.tensor(16 * (1 + 2**-10)).half()).all()


def test_the_weights_may_have_another_dtype(tensors):
    x = tensors(16, dtype=torch.bfloat16)[0]
    pooled = kernels.pool_tokens(x, torch.full((2, 2), 0.25, dtype=torch.float16), grid=(4, 4))
    assert pooled.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("grid", "weights", "message"),
    [
        ((4, 6), torch.ones(4, 4), "4x6 tokens cannot be cut into cells of 4x4"),
        ((5, 6), torch.ones(2, 2), "5x6 tokens cannot be cut into cells of 2x2"),
        ((4, 8), torch.ones(1, 1), "grid 4x8 at token 0 ends at token 32, but there are 30"),
        ((4, 6), torch.ones(2, 3), r"weights must be a tensor \[s, s\], got \[2, 3\]"),
        ((4, 6), torch.ones(2, 2, dtype=torch.int64), "must be floating point"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(tensors, grid, weights, message):
    with pytest.raises(ValueError, match=message):
        kernels.pool_tokens(tensors(30)[0], weights, grid=grid)
