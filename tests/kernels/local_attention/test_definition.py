"""What local attention means, on every backend the machine has; the triton backend runs in its interpreter."""

from __future__ import annotations

import pytest
import torch
from attnswap import kernels

EXACT = {"atol": 5e-6, "rtol": 0}
CASES = [  # grid, dense tokens before and after, radius
    pytest.param((8, 8), 0, 0, 2, id="square, no dense tokens"),
    pytest.param((10, 18), 5, 0, 5, id="wide, dense before"),
    pytest.param((18, 10), 0, 16, 3, id="tall, dense after"),
    pytest.param((17, 13), 5, 3, 8, id="odd, dense before and after, ragged tiles"),
    pytest.param((5, 6), 33, 40, 2.5, id="fractional radius"),
    pytest.param((3, 4), 70, 0, 3, id="more dense tokens than grid, grid smaller than a tile"),
    pytest.param((1, 30), 2, 0, 4, id="one row"),
    pytest.param((30, 1), 0, 0, 4, id="one column"),
]


@pytest.mark.parametrize(("grid", "before", "after", "radius"), CASES)
def test_it_is_dense_attention_under_the_mask_of_the_definition(
    backend, tensors, masked, visible, grid, before, after, radius
):
    qkv = tensors(before + grid[0] * grid[1] + after)
    expected = masked(visible(grid, radius, before=before, after=after), *qkv)
    out = kernels.local_attention(*qkv, grid=grid, grid_offset=before, radius=radius)
    torch.testing.assert_close(out, expected, **EXACT)
    assert out.is_contiguous()


@pytest.mark.parametrize(("grid", "radius"), [((24, 31), 5), ((33, 26), 16)], ids=str)
def test_the_eager_backend_on_grids_of_many_tiles(tensors, masked, visible, grid, radius):
    qkv = tensors(7 + grid[0] * grid[1])
    with kernels.use_backend("eager"):
        out = kernels.local_attention(*qkv, grid=grid, grid_offset=7, radius=radius)
    torch.testing.assert_close(out, masked(visible(grid, radius, before=7), *qkv), **EXACT)


def reached(grid, radius, token, **call):
    """The tokens whose output changes with the value of one token."""
    tokens = grid[0] * grid[1]
    query, key, value = torch.zeros(3, 1, tokens, 1, 16)
    value[:, token] = 1
    out = kernels.local_attention(query, key, value, grid=grid, radius=radius, **call)
    return set(out[0, :, 0, 0].nonzero().flatten().tolist())


def test_a_key_at_exactly_the_radius_is_not_seen(backend):
    width = 13
    seen = reached((12, width), 5, 0)
    inside, at = [(4, 2), (0, 4), (3, 3)], [(3, 4), (4, 3), (5, 0), (0, 5)]
    assert {y * width + x for y, x in inside} <= seen
    assert not {y * width + x for y, x in at} & seen


def test_the_last_column_and_the_next_row_are_not_neighbours(backend):
    assert reached((3, 5), 2, 9) == {3, 4, 8, 9, 13, 14}


def test_windows_are_clipped_at_a_corner_and_not_moved_inward(backend):
    assert reached((4, 4), 2, 0) == {0, 1, 4, 5}


def test_a_radius_of_one_returns_the_value(backend, tensors):
    query, key, value = tensors(12, heads=2)
    torch.testing.assert_close(kernels.local_attention(query, key, value, grid=(3, 4), radius=1), value)


def test_one_token_returns_the_value(backend, tensors):
    query, key, value = tensors(1)
    torch.testing.assert_close(kernels.local_attention(query, key, value, grid=(1, 1), radius=3), value)


@pytest.mark.parametrize("radius", [1e6, 1e200, 10**10])
def test_a_radius_beyond_the_grid_is_dense_attention(backend, tensors, masked, radius):
    qkv = tensors(7 + 30, batch=2, heads=2)
    out = kernels.local_attention(*qkv, grid=(5, 6), grid_offset=4, radius=radius)
    torch.testing.assert_close(out, masked(None, *qkv), **EXACT)


@pytest.mark.parametrize("radius", [3, 100], ids=["local", "all"])
def test_grid_queries_see_all_pooled_keys_and_dense_queries_see_none(backend, tensors, masked, visible, radius):
    query, key, value, *pooled = tensors(4 + 63 + 2, pooled=5, batch=2, heads=2)
    call = {"grid": (7, 9), "grid_offset": 4, "radius": radius, "pooled_key": pooled[0], "pooled_value": pooled[1]}
    out = kernels.local_attention(query, key, value, **call)
    mask = visible((7, 9), radius, before=4, after=2, pooled=5)
    torch.testing.assert_close(out, masked(mask, query, key, value, *pooled), **EXACT)
    for x in pooled:
        x.fill_(float("nan"))
    spoiled = kernels.local_attention(query, key, value, **call)
    dense = [0, 1, 2, 3, 67, 68]
    assert torch.equal(spoiled[:, dense], out[:, dense])
    assert spoiled[:, 4:67].isnan().all()


def test_a_masked_key_has_no_influence_whatever_it_holds(backend, tensors, masked, visible):
    query, key, value, *pooled = tensors(4 + 63 + 2, pooled=3, batch=2)
    seen = torch.rand(2, 69, generator=torch.Generator().manual_seed(1)) > 0.4
    mask = visible((7, 9), 3, before=4, after=2, pooled=3)
    allowed = mask & torch.cat((seen, torch.ones(2, 3, dtype=torch.bool)), 1)[:, None]
    expected = masked(allowed[:, None], query, key, value, *pooled)
    key[~seen], value[~seen] = float("nan"), float("inf")
    call = {"grid": (7, 9), "grid_offset": 4, "radius": 3, "pooled_key": pooled[0], "pooled_value": pooled[1]}
    out = kernels.local_attention(query, key, value, key_mask=seen, **call)
    torch.testing.assert_close(out, expected, **EXACT)


@pytest.mark.parametrize("radius", [2, 100], ids=["local", "all"])
def test_a_query_without_keys_is_zero(backend, tensors, radius):
    qkv = tensors(2 + 42, batch=2)
    mask = torch.ones(2, 44, dtype=torch.bool)
    mask[0] = False
    out = kernels.local_attention(*qkv, grid=(6, 7), grid_offset=2, radius=radius, key_mask=mask)
    assert (out[0] == 0).all()
    assert (out[1] != 0).all()


def test_one_grid_query_without_keys_is_zero_beside_others(backend, tensors):
    mask = torch.ones(1, 42, dtype=torch.bool)
    mask[0, [0, 1, 7]] = False  # the top left token and its two neighbours
    out = kernels.local_attention(*tensors(42), grid=(6, 7), radius=1.2, key_mask=mask)
    assert (out[0, 0] == 0).all()
    assert (out[0, 2:7] != 0).all()


def test_the_scale_is_applied_to_the_scores(backend, tensors, masked, visible):
    qkv = tensors(3 + 20)
    out = kernels.local_attention(*qkv, grid=(4, 5), grid_offset=3, radius=3, scale=0.7)
    torch.testing.assert_close(out, masked(visible((4, 5), 3, before=3), *qkv, scale=0.7), **EXACT)


def test_strided_inputs_equal_contiguous_ones(backend, tensors):
    """One fused QKV tensor, heads first in memory, part of a longer sequence, a head dimension not contiguous."""
    query, key, value = tensors(3 + 30, batch=2, heads=2)
    call = {"grid": (5, 6), "grid_offset": 3, "radius": 3}
    expected = kernels.local_attention(query, key, value, **call)
    strided = (
        torch.stack((query, key, value), dim=2)[:, :, 0],
        key.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat((value, value), dim=1)[:, :33],
    )
    assert not any(x.is_contiguous() for x in strided)
    assert torch.equal(kernels.local_attention(*strided, **call), expected)
    transposed = query.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(kernels.local_attention(transposed, key, value, **call), expected)


def test_a_nan_stays_in_its_batch_entry_and_head(backend, tensors):
    query, key, value = tensors(2 + 20, batch=2, heads=2)
    key[0, :, 1] = value[0, :, 1] = float("nan")
    out = kernels.local_attention(query, key, value, grid=(4, 5), grid_offset=2, radius=2)
    assert out[0, :, 1].isnan().all()
    assert out[0, :, 0].isfinite().all()
    assert out[1].isfinite().all()


def test_a_batch_entry_does_not_depend_on_its_neighbours(backend, tensors):
    qkv = tensors(2 + 30, batch=3)
    call = {"grid": (5, 6), "grid_offset": 2, "radius": 2}
    alone = kernels.local_attention(*(x[1:2] for x in qkv), **call)
    torch.testing.assert_close(kernels.local_attention(*qkv, **call)[1:2], alone, atol=1e-6, rtol=0)


def test_autocast_does_not_change_the_dtype_of_the_computation(backend, tensors):
    qkv = tensors(24)
    expected = kernels.local_attention(*qkv, grid=(4, 6), radius=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernels.local_attention(*qkv, grid=(4, 6), radius=2), expected)


def test_explain_tells_the_backend_and_why(tensors):
    qkv = tensors(24)
    explanation = kernels.explain("local_attention", *qkv, grid=(4, 6), radius=2)
    assert explanation.backend == "eager"
    assert {entry.backend for entry in explanation.considered} == {"reference", "eager", "triton"}
    assert "local_attention" in kernels.ops()


POOLED = torch.zeros(1, 3, 1, 16)
REFUSED = [
    pytest.param({"grid": (4, 5)}, "grid 4x5 at token 0 ends at token 20, but there are 16", id="grid"),
    pytest.param({"grid": (3, 5), "grid_offset": 2}, "at token 2 ends at token 17, but there are 16", id="offset"),
    pytest.param({"grid_offset": -1}, "grid_offset must be an integer and not negative, got -1", id="negative offset"),
    pytest.param({"grid": (0, 4)}, "grid must be at least 1", id="empty grid"),
    pytest.param({"radius": 0.5}, "at least 1, got 0.5", id="small radius"),
    pytest.param({"radius": float("inf")}, "finite number of tokens and at least 1, got inf", id="endless radius"),
    pytest.param({"radius": "8"}, "got '8'", id="radius of another type"),
    pytest.param({"scale": 0.0}, "positive and finite, got 0.0", id="scale"),
    pytest.param({"key_mask": torch.ones(1, 15, dtype=torch.bool)}, r"\[1, 16\]", id="mask length"),
    pytest.param({"pooled_key": POOLED}, "pooled_key is given without pooled_value", id="one pooled tensor"),
    pytest.param(
        {"pooled_key": POOLED, "pooled_value": POOLED[:, :2]},
        r"pooled_key is \[1, 3, 1, 16\] but pooled_value is \[1, 2, 1, 16\]",
        id="pooled lengths",
    ),
    pytest.param(
        {"pooled_key": POOLED[..., :8], "pooled_value": POOLED[..., :8]},
        r"query is \[1, 16, 1, 16\] but pooled_key is \[1, 3, 1, 8\]",
        id="pooled head dimension",
    ),
    pytest.param(
        {"pooled_key": POOLED.half(), "pooled_value": POOLED.half()},
        "query is torch.float32 but pooled_key is torch.float16",
        id="pooled dtype",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_does_not_fit_is_refused_with_the_numbers(tensors, call, message):
    with pytest.raises(ValueError, match=message):
        kernels.local_attention(*tensors(16), **{"grid": (4, 4), "radius": 2} | call)


def test_tensors_that_do_not_match_are_refused(tensors):
    query, key, value = tensors(16, heads=2)
    with pytest.raises(ValueError, match=r"query is \[1, 16, 2, 16\] but key is \[1, 16, 1, 16\]"):
        kernels.local_attention(query, key[:, :, :1], value, grid=(4, 4), radius=2)
    with pytest.raises(ValueError, match=r"query is torch.float32 but value is torch.float16"):
        kernels.local_attention(query, key, value.half(), grid=(4, 4), radius=2)
