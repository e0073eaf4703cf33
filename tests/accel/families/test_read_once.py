"""What the host must know of a tensor is read from the device once."""

from __future__ import annotations

import pickle

import torch
from attnswap.accel.families.read_once import ReadOnce


def test_a_tensor_is_read_once_and_again_where_it_changes() -> None:
    reads: list[float] = []

    def total(tensor: torch.Tensor) -> float:
        reads.append(float(tensor.sum()))
        return reads[-1]

    reader, table = ReadOnce(total), torch.ones(3)
    assert reader.read(table) == reader.read(table) == 3
    assert reader.read(torch.zeros(3)) == 0
    assert reader.read(table) == 3
    table.fill_(2)
    assert reader.read(table) == 6
    assert reads == [3, 0, 3, 6]


def test_a_tensor_of_inference_mode_is_read_too() -> None:
    with torch.inference_mode():
        reader, table = ReadOnce(torch.numel), torch.ones(3)
        assert reader.read(table) == reader.read(table) == 3


def test_a_reader_is_copied_without_the_tensor() -> None:
    reader, table = ReadOnce(torch.numel), torch.ones(3)
    reader.read(table)
    assert pickle.loads(pickle.dumps(reader)).read(torch.ones(2)) == 2
