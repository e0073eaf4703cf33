"""How many pairs there are, and how many each backend computes."""

from __future__ import annotations

import pytest
import torch
from attnswap.kernels.local_attention import counts, eager, geometry

GRIDS = [(8, 8), (10, 18), (18, 10), (17, 13), (1, 30)]
RADII = [1, 2.5, 5, 100]


@pytest.mark.parametrize(("radius", "keys"), [(1, 1), (2, 9), (8, 193), (16, 793), (32, 3205)])
def test_the_window_of_an_interior_query(radius, keys):
    """The pairs that a token in the middle adds to a grid otherwise alike."""
    distances = torch.arange(-40, 41) ** 2
    assert int((distances[:, None] + distances < geometry.squared_reach(radius)).sum()) == keys
    wide = [counts.window_pairs((81, 81 + more), radius) for more in (0, 1, 2)]
    tall = [counts.window_pairs((82, 81 + more), radius) for more in (0, 1)]
    assert tall[1] - tall[0] - (wide[1] - wide[0]) == keys


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("radius", RADII)
def test_pairs_are_those_of_the_mask(visible, grid, radius):
    mask = visible(grid, radius, before=3, after=2, pooled=4)
    assert counts.ideal_pairs(grid, radius, dense=5, pooled=4) == int(mask.sum())


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_a_radius_beyond_any_grid_counts_every_pair(backend):
    assert counts.ideal_pairs((16, 32), 1e200) == counts.executed_pairs(backend, (16, 32), 1e200) == (16 * 32) ** 2


@pytest.mark.parametrize(("radius", "keys"), [(8, 768), (16, 1920), (32, 5504)])
def test_the_keys_triton_computes_for_an_interior_tile(radius, keys):
    rows, columns = 17, 17
    starts, _ = geometry.tile_lists((0, 8 * rows), (8 * rows, 16 * columns), radius, (8, 16), (8, 8))
    tiles = starts.diff().view(rows, columns)
    assert int(tiles[rows // 2, columns // 2]) * 64 == keys


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("radius", RADII)
def test_every_pair_of_the_mask_is_in_a_listed_tile_and_listed_tiles_are_the_pairs_executed(visible, grid, radius):
    starts, entries = geometry.tile_lists((0, grid[0]), grid, radius, counts.QUERY_TILE, counts.KEY_TILE)
    listed = set()
    columns = -(-grid[1] // 16)
    for tile in range(len(starts) - 1):
        for entry in entries[starts[tile] : starts[tile + 1]].tolist():
            listed.add((*divmod(tile, columns), entry >> 16, entry & 0xFFFF))
    needed = set()
    for query, key in visible(grid, radius).nonzero().tolist():
        (qy, qx), (ky, kx) = divmod(query, grid[1]), divmod(key, grid[1])
        needed.add((qy // 8, qx // 16, ky // 8, kx // 8))
    assert listed == needed
    assert counts.executed_pairs("triton", grid, radius) == len(entries) * 128 * 64


@pytest.mark.parametrize(("grid", "radius"), [((12, 20), 5), ((33, 40), 8), ((17, 30), 16), ((6, 6), 100)], ids=str)
def test_the_pairs_the_eager_backend_computes_are_counted(monkeypatch, tensors, grid, radius):
    pairs = 0

    def counting(query, key, *rest, **options):
        nonlocal pairs
        pairs += query.shape[1] * query.shape[2] * key.shape[2]
        return attend(query, key, *rest, **options)

    attend = eager.attend
    monkeypatch.setattr(eager, "attend", counting)
    query, key, value, *pooled = tensors(4 + grid[0] * grid[1], pooled=3)
    call = {"grid": grid, "grid_offset": 1, "radius": radius, "scale": 1.0}
    eager.local_attention(query, key, value, pooled_key=pooled[0], pooled_value=pooled[1], **call)
    assert pairs == counts.executed_pairs("eager", grid, radius, dense=4, pooled=3)


def test_padding_counts_as_executed_in_triton():
    """One tile of grid queries and one of dense queries; 3 dense, 2 pooled and 20 grid keys in tiles of 64."""
    assert counts.executed_pairs("triton", (4, 5), 2, dense=3, pooled=2) == 128 * 64 * (1 + 1 + 1 + 1)


@pytest.mark.parametrize("tiles", [((8, 8), (4, 8)), ((4, 8), (4, 4))], ids=str)
def test_smaller_tiles_are_counted_where_triton_runs_them(tiles):
    (tile, key_tile), grid, radius = tiles, (17, 30), 5
    rows, columns = tile[0] * tile[1], key_tile[0] * key_tile[1]
    _, entries = geometry.tile_lists((0, grid[0]), grid, radius, tile, key_tile)
    query_tiles = -(-grid[0] // tile[0]) * -(-grid[1] // tile[1])
    of_dense = -(-3 // rows) * -(-(3 + 510) // columns)
    expected = rows * columns * (len(entries) + 2 * query_tiles + of_dense)
    assert counts.executed_pairs("triton", grid, radius, dense=3, pooled=2, tiles=tiles) == expected
    assert expected < counts.executed_pairs("triton", grid, radius, dense=3, pooled=2)


def test_the_reference_computes_every_pair():
    """Dense queries do not see pooled keys."""
    assert counts.executed_pairs("reference", (4, 5), 2, dense=3, pooled=2) == 23 * 23 + 20 * 2


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'flash'"):
        counts.executed_pairs("flash", (4, 5), 2)


@pytest.mark.parametrize(("radius", "ideal"), [(8, 3.92), (16, 5.79), (32, 13.09)])
def test_the_work_of_flux_at_8k_is_what_the_paper_counts(radius, ideal):
    """In units of 10 ** 12 operations for a layer: 24 heads of 128, 512 text tokens, a grid of 512 x 512."""
    operations = 4 * 3072 * counts.ideal_pairs((512, 512), radius, dense=512)
    assert operations / 1e12 == pytest.approx(ideal, abs=0.006)
