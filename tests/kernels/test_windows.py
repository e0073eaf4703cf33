"""Geometry: which token is in which window."""

from __future__ import annotations

import pytest
import torch
from attnswap.kernels.window_attention import (
    from_windows,
    inverse_order,
    join_windows,
    split_windows,
    to_windows,
    window_groups,
    window_order,
)
from torch._dynamo.testing import CompileCounter

CPU = torch.device("cpu")
GRIDS = [
    pytest.param((8, 8), (2, 2), id="8x8 in 2x2, even"),
    pytest.param((7, 9), (2, 2), id="7x9 in 2x2, odd both ways"),
    pytest.param((6, 5), (2, 2), id="6x5 in 2x2, odd one way"),
    pytest.param((8, 11), (3, 4), id="8x11 in 3x4"),
    pytest.param((5, 1), (5, 1), id="a column, one token per window"),
    pytest.param((3, 4), (1, 1), id="one window"),
]


def rolled_and_cut(grid, windows, shift):
    """The definition: roll the picture of token numbers, then cut it."""
    picture = torch.arange(grid[0] * grid[1]).view(grid).roll((-shift[0], -shift[1]), (0, 1))
    return [
        window.flatten().tolist()
        for rows in picture.tensor_split(windows[0], 0)
        for window in rows.tensor_split(windows[1], 1)
    ]


@pytest.mark.parametrize(("grid", "windows"), GRIDS)
@pytest.mark.parametrize("shift", [(0, 0), (1, 2), (-3, 100)], ids=str)
def test_windows_hold_the_tokens_of_a_rolled_and_cut_picture(grid, windows, shift):
    numbers = torch.arange(grid[0] * grid[1])[None]
    found = [window for part in to_windows(numbers, grid, windows, shift) for window in part.tolist()]
    assert sorted(found) == sorted(rolled_and_cut(grid, windows, shift))


def test_equal_windows_come_row_major():
    numbers = torch.arange(48)[None]
    (part,) = to_windows(numbers, (6, 8), (3, 2), (1, 3))
    assert part.tolist() == rolled_and_cut((6, 8), (3, 2), (1, 3))


@pytest.mark.parametrize(("grid", "windows"), GRIDS)
def test_larger_windows_come_first_and_sizes_differ_by_at_most_one(grid, windows):
    groups = window_groups(grid, windows)
    assert sum(group.count for group in groups) == windows[0] * windows[1]
    assert sum(group.count * group.length for group in groups) == grid[0] * grid[1]
    heights, widths = [group.height for group in groups], [group.width for group in groups]
    assert max(heights) - min(heights) <= 1
    assert max(widths) - min(widths) <= 1
    assert (heights[0], widths[0]) == (-(-grid[0] // windows[0]), -(-grid[1] // windows[1]))


def test_windows_of_a_batch_are_image_major():
    images = torch.stack([torch.zeros(16), torch.ones(16)])
    (part,) = to_windows(images, (4, 4))
    assert part[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(("grid", "windows"), GRIDS)
def test_from_windows_undoes_to_windows(grid, windows):
    x = torch.randn(3, grid[0] * grid[1], 2, 5)
    back = from_windows(to_windows(x, grid, windows, (2, 1)), grid, windows, (2, 1))
    assert torch.equal(back, x)
    assert back.is_contiguous()


@pytest.mark.parametrize(("grid", "windows"), GRIDS)
def test_hidden_states_can_stay_in_window_order(grid, windows):
    x = torch.randn(2, grid[0] * grid[1], 3)
    order = window_order(grid, windows, (1, 1), device=CPU)
    ordered = x[:, order]
    parts = split_windows(ordered, grid, windows)
    for part, cut in zip(parts, to_windows(x, grid, windows, (1, 1)), strict=True):
        assert torch.equal(part, cut)
    assert torch.equal(join_windows(parts, grid, windows)[:, inverse_order(order)], x)


def test_a_shift_tensor_gives_the_same_order_as_integers():
    tensor = window_order((7, 6), (2, 2), torch.tensor([3, -2]), device=CPU)
    assert torch.equal(tensor, window_order((7, 6), (2, 2), (3, -2), device=CPU))


def test_a_mask_is_cut_like_the_tokens():
    mask = torch.tensor([[True, False] * 8])
    (part,) = to_windows(mask, (4, 4))
    assert part.dtype == torch.bool
    assert part.shape == (4, 4)


@pytest.mark.parametrize(
    ("grid", "windows", "message"),
    [((4, 4), (5, 1), "4x4 tokens cannot be cut into 5x1"), ((4, 5), (2, 2), "holds 20 tokens, but there are 16")],
    ids=["too many windows", "wrong grid"],
)
def test_a_grid_that_does_not_fit_is_refused(grid, windows, message):
    with pytest.raises(ValueError, match=message):
        to_windows(torch.zeros(1, 16, 2), grid, windows)


def test_cutting_windows_compiles_to_one_graph_for_all_shifts():
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def round_trip(x, shift):
        return from_windows([part + 1 for part in to_windows(x, (5, 6), (2, 2), shift)], (5, 6), (2, 2), shift)

    x = torch.randn(2, 30, 4)
    for step in range(10):
        assert torch.equal(round_trip(x, torch.tensor([step, 2 * step])), x + 1)
    assert counter.frame_count == 1
