"""The grid of image tokens, read from the ids that FLUX gives its rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import NoGrid
from .read_once import ReadOnce

Read = tuple[tuple[int, int], int]


class ImageIds(ReadOnce[Read]):
    """Reads the grid from `img_ids`: ((h, w), tokens after the grid).

    They are `[S, n]` or `[B, S, n]`; columns 0, 1, 2 are the image's number, row and column. The tokens that share the
    first one's number are the grid; what follows is another image (a reference). Raises `NoGrid` where they are not the
    rows of a grid one after the other.
    """

    def __init__(self) -> None:
        super().__init__(_read)


def _read(ids: Tensor) -> Read:
    if ids.ndim == 3:
        ids = ids[0]
    table = ids.detach().to("cpu", torch.float64)
    if table.ndim != 2 or not len(table) or table.shape[1] < 3:
        raise NoGrid(f"img_ids of shape {tuple(ids.shape)} tell no rows and columns")
    own = (table[:, 0] == table[0, 0]).long()
    count = int(own.cumprod(0).sum())
    rows, columns = table[:count, 1], table[:count, 2]
    width = int((rows == rows[0]).long().cumprod(0).sum())
    height = count // width
    # Rounded as pipelines round them: bf16 holds whole numbers up to 256 only.
    expected = torch.cartesian_prod(rows[0] + torch.arange(height), columns[0] + torch.arange(width)).view(-1, 2)
    expected = expected.to(ids.dtype).double()
    found = torch.stack((rows, columns), 1)
    if height * width != count or int(own.sum()) != count or not torch.equal(found, expected):
        raise NoGrid(f"the {len(table)} img_ids are not the rows of a grid one after the other")
    return (height, width), len(table) - count
