"""The halves of local attention, as attention over several devices takes them: slabs of rows, and parts of the keys."""

from __future__ import annotations

import importlib

import pytest
import torch
from attnswap.kernels import dispatch
from attnswap.kernels.local_attention import eager

GRID, OFFSET, RADIUS, TOKENS = (13, 11), 5, 3, 5 + 143 + 2
REST = {"radius": RADIUS, "scale": 0.25}


@pytest.fixture(params=["eager", "triton"])
def halves(request):
    if request.param == "triton" and not dispatch.triton_interprets():
        pytest.skip("TRITON_INTERPRET is not set")
    return importlib.import_module(f"attnswap.kernels.local_attention.{request.param}")


@pytest.fixture
def whole(tensors):
    """Tensors, and the output and log-sum-exp of the whole."""
    qkv = tensors(TOKENS, batch=2, heads=2)
    return qkv, *eager.local_attention(*qkv, grid=GRID, grid_offset=OFFSET, **REST)


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("first", "last"), [(0, 5), (5, 6), (6, 13)], ids=["top", "one row", "bottom"])
def test_a_slab_of_rows_needs_the_rows_in_reach_alone(halves, whole, first, last):
    """Queries of rows [first, last) over a grid of keys that begins above and ends below them."""
    (query, key, value), out, lse = whole
    top, bottom = max(first - (RADIUS - 1), 0), min(last + (RADIUS - 1), GRID[0])
    rows = slice(OFFSET + first * GRID[1], OFFSET + last * GRID[1])
    near = slice(OFFSET + top * GRID[1], OFFSET + bottom * GRID[1])
    keys, values = (torch.cat((x[:, :OFFSET], x[:, near], x[:, -2:]), 1) for x in (key, value))
    found = halves.grid_queries(
        query[:, rows],
        keys,
        values,
        grid=(bottom - top, GRID[1]),
        grid_offset=OFFSET,
        query_rows=(first - top, last - top),
        **REST,
    )
    close(found, (out[:, rows], lse[:, :, rows]))


def test_dense_queries_over_parts_of_the_keys_merge_to_the_whole(halves, whole):
    (query, key, value), out, lse = whole
    parts = [
        halves.dense_queries(query[:, :OFFSET], key[:, part], value[:, part], scale=0.25)
        for part in (slice(0, 40), slice(40, 41), slice(41, TOKENS))
    ]
    total = parts[0][0].transpose(1, 2), parts[0][1]
    for part_out, part_lse in parts[1:]:
        total = eager.merge(*total, part_out.transpose(1, 2), part_lse)
    close((total[0].transpose(1, 2), total[1]), (out[:, :OFFSET], lse[:, :, :OFFSET]))


def test_merging_with_a_part_without_keys_changes_nothing(whole):
    _, out, lse = whole
    out = out.transpose(1, 2)
    nobody = torch.zeros_like(out), torch.full_like(lse, float("-inf"))
    assert all(map(torch.equal, eager.merge(out, lse, *nobody), (out, lse)))
    assert all(map(torch.equal, eager.merge(*nobody, out, lse), (out, lse)))
    assert all(map(torch.equal, eager.merge(*nobody, *nobody), nobody))
