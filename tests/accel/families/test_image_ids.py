"""The grid of image tokens is read from `img_ids`, or it is said why it cannot be."""

from __future__ import annotations

import pytest
import torch
from attnswap.accel.families.base import NoGrid
from attnswap.accel.families.image_ids import ImageIds


def ids(height: int, width: int, image: float = 0, top: float = 0, left: float = 0) -> torch.Tensor:
    rows, columns = torch.arange(height) + top, torch.arange(width) + left
    return torch.cartesian_prod(torch.tensor([float(image)]), rows.float(), columns.float())


@pytest.mark.parametrize(("height", "width"), [(3, 5), (5, 3), (1, 4), (4, 1), (1, 1), (300, 4), (4, 300), (512, 512)])
def test_rows_and_columns_are_told(height: int, width: int) -> None:
    """In bf16 as well, as pipelines cast them: there whole numbers above 256 are rounded, and some become equal."""
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        assert ImageIds().read(ids(height, width).to(dtype)) == ((height, width), 0)


def test_another_image_follows() -> None:
    assert ImageIds().read(torch.cat([ids(3, 5), ids(4, 2, image=1), ids(2, 2, image=2)])) == ((3, 5), 12)


def test_a_grid_may_start_anywhere_and_have_a_batch_and_more_columns() -> None:
    moved = torch.cat([ids(3, 5, image=1, top=7, left=9), torch.ones(15, 1)], dim=1)
    assert ImageIds().read(moved) == ImageIds().read(moved.expand(2, -1, -1)) == ((3, 5), 0)


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(16, 3),
        ids(3, 5)[:-1],
        ids(3, 5).flip(0),
        ids(3, 5)[torch.arange(15).view(3, 5).T.flatten()],
        2 * ids(3, 5),
        torch.cat([ids(3, 5), ids(2, 2, image=1), ids(1, 5)]),
        torch.zeros(4, 2),
        torch.zeros(0, 3),
    ],
    ids=["dummies", "one missing", "backwards", "columns first", "every other", "in two parts", "no columns", "none"],
)
def test_what_is_no_grid_is_refused(other: torch.Tensor) -> None:
    with pytest.raises(NoGrid, match="img_ids"):
        ImageIds().read(other)
