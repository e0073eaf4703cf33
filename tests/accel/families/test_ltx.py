"""LTX-Video: stock self-attention by the road that methods take; where the grid of its packed tokens is told from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attnswap.accel.families.base import NoGrid, Place
from attnswap.accel.families.ltx import frames_of, layer_places
from diffusers import LTXConditionPipeline

from .. import tiny_dit
from ..video_models import noise
from ..video_models_more import LTX, coordinates
from . import video_checks as checks
from .dense_strategy import dense, notes, seen
from .ranks import shared_out

CASE = LTX["ltx"]
GRID = checks.GRID


def test_plain_attention_of_ours_is_stock() -> None:
    checks.plain_attention_of_ours_is_stock(CASE)


def test_calls_without_a_plan_are_stock_bit_for_bit() -> None:
    checks.calls_without_a_plan_are_stock_bit_for_bit(CASE)


def test_under_autocast_it_is_as_exact_as_stock() -> None:
    checks.under_autocast_it_is_as_exact_as_stock(CASE)


def test_adaspa_that_keeps_all_is_stock() -> None:
    checks.adaspa_that_keeps_all_is_stock(CASE)


def test_a_chosen_backend_is_that_of_dense_attention_and_stays() -> None:
    checks.a_chosen_backend_is_that_of_dense_attention_and_stays(CASE)


def test_lora_takes_part() -> None:
    checks.lora_takes_part(CASE, ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"])


def test_fusing_projections_changes_nothing_as_in_stock() -> None:
    model = CASE.make()
    model.fuse_qkv_projections()
    checks.plain_attention_of_ours_is_stock(CASE, model)


# Where the grid is told from.


def by_coordinates(inputs: dict[str, Any], positions: torch.Tensor) -> dict[str, Any]:
    bare = {name: value for name, value in inputs.items() if name not in ("num_frames", "height", "width")}
    return {**bare, "hidden_states": noise(2, positions.shape[2], 4), "video_coords": positions}


def test_the_grid_is_told_from_the_coordinates_of_the_tokens() -> None:
    model, inputs = CASE.make(), by_coordinates(CASE.inputs(GRID, 6, 2), coordinates(GRID, 2))
    stock = checks.outputs(model, inputs)
    with dense(model) as handle:
        checks.agree(checks.outputs(model, inputs), stock)
        assert {layer.place for layer in seen(handle).values()} == {Place(GRID)}


def test_frames_given_as_a_condition_are_frames_of_the_grid() -> None:
    """Two of them, before the video, one at the time of a frame of it."""
    positions = torch.cat([coordinates((1, 5, 2), 2, 8), coordinates((1, 5, 2), 2, 8), coordinates(GRID, 2)], dim=2)
    model, inputs = CASE.make(), by_coordinates(CASE.inputs(GRID, 6, 2), positions)
    stock = checks.outputs(model, inputs)
    with dense(model) as handle:
        # The pipeline for long videos gives these with coordinates.
        for sides in ({}, {"num_frames": 1, "height": 1, "width": 1}):
            checks.agree(checks.outputs(model, {**inputs, **sides}), stock)
            assert {layer.place for layer in seen(handle).values()} == {Place((5, 5, 2))}
        assert notes(handle) == []


@pytest.mark.parametrize(
    "grid", [(1, 1, 1), (4, 1, 1), (1, 4, 1), (1, 1, 4), (3, 1, 5), (3, 5, 1), (1, 3, 5), (2, 7, 3)]
)
def test_frames_rows_and_columns_are_told(grid: tuple[int, int, int]) -> None:
    positions = coordinates(grid, 2)
    assert frames_of(positions) == frames_of(torch.stack((positions, positions + 1), dim=-1)) == grid


@pytest.mark.parametrize(
    "positions",
    [
        coordinates((3, 4, 2), 1)[..., :-1],
        coordinates((3, 4, 2), 1)[:, [0, 2, 1]],
        coordinates((3, 4, 2), 1)[..., torch.randperm(24, generator=torch.Generator().manual_seed(0))],
        torch.cat([torch.arange(24.0).view(1, 1, 24), coordinates((3, 4, 2), 1)[:, 1:]], dim=1),
        torch.cat([coordinates((3, 4, 2), 1), coordinates((3, 2, 2), 1)], dim=2),
        torch.cat([coordinates((3, 4, 2), 1), coordinates((2, 2, 2), 1)], dim=2),
    ],
    ids=[
        "one missing",
        "columns first",
        "shuffled",
        "a time for each token",
        "smaller frames",
        "smaller frames, as many tokens",
    ],
)
def test_what_is_not_frames_is_refused(positions: torch.Tensor) -> None:
    with pytest.raises(NoGrid, match="positions of video_coords are not those of frames of one size, row by row"):
        frames_of(positions)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_frames": 2}, "^30 video tokens are not a grid of 2x5x2$"),
        ({"height": None}, "^without num_frames, height and width the video tokens have no frames, rows and columns$"),
    ],
)
def test_without_coordinates_there_is_no_grid_but_that_of_the_sides(change: dict[str, Any], why: str) -> None:
    with pytest.raises(NoGrid, match=why):
        layer_places(CASE.make())({**CASE.inputs(GRID, 6, 2), **change})


def test_coordinates_of_no_grid_run_dense() -> None:
    shuffled = coordinates(GRID, 2)[..., torch.randperm(30, generator=torch.Generator().manual_seed(0))]
    checks.runs_dense_because(
        CASE,
        "a call ran dense: the 30 positions of video_coords are not",
        lambda inputs: {**inputs, "num_frames": 2, "video_coords": shuffled},
    )


# Through what the models are used by.


def test_a_pipeline_is_accelerated() -> None:
    assert checks.pipelines_take_part(tiny_dit.ltx)


def test_a_pipeline_that_conditions_on_frames_is_accelerated() -> None:
    def conditioned() -> tuple[Any, dict[str, Any]]:
        stock, arguments = tiny_dit.ltx()
        pipe: Any = LTXConditionPipeline(**stock.components)
        pipe.set_progress_bar_config(disable=True)
        return pipe, {**arguments, "image": noise(1, 3, 32, 32).sigmoid(), "frame_index": 8}

    # Three frames, of which the last is given once more.
    assert {layer.place.grid[0] for layer in checks.pipelines_take_part(conditioned).values()} == {4}


def test_ranks_that_share_out_the_tokens_give_what_one_gives() -> None:
    """Fifteen tokens and three heads on two ranks."""
    model, grid = CASE.make(), (3, 5, 1)
    layer, hidden = model.transformer_blocks[0].attn1, noise(2, 15, 24)
    rope = model.rope(hidden, *grid)
    with torch.no_grad():
        stock = layer(hidden, image_rotary_emb=rope)
    with dense(model) as handle:
        checks.outputs(model, CASE.inputs(grid, 6, 2))
        shares = [[x.tensor_split(2, dim=1)[rank] for x in (hidden, *rope)] for rank in range(2)]
        together = shared_out(lambda rank: layer(shares[rank][0], image_rotary_emb=shares[rank][1:]), 2)
        assert notes(handle) == []
    checks.agree((torch.cat(together, dim=1),), (stock,))
