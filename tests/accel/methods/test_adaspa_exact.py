"""AdaSpa inside whole transformers, against its definition in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import attnswap
import pytest
import torch
from attnswap.accel.families.base import Place

from .. import video_models
from .. import video_models_more as more
from ..families import image_models
from ..watching import unchanged
from . import adaspa_cases as cases
from .adaspa_cases import CLOSE, SMALL, largest_difference

VARIANTS = {
    "as it is": SMALL,
    "heads alike": replace(SMALL, head_adaptive=False),
    "very sparse": replace(SMALL, sparsity=0.8),
    "no sink": replace(SMALL, text_sink=False),
    "tiles": replace(SMALL, reorder="tile"),
    "blocks of two sizes": replace(SMALL, block=(32, 16)),
    "layers left out": replace(SMALL, dense_layers=(0, 3)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_step_is_the_definition(name: str) -> None:
    """Dense, dense with a search, sparse, sparse with a new mask, sparse."""
    config, model, run = VARIANTS[name], cases.flux(), cases.steps(batch=2 if name == "as it is" else 1)
    wanted, oracle = cases.by_definition(model, run, config)
    handle = attnswap.enable(model, config)
    found = run.of(model, handle)
    assert largest_difference(found, wanted) <= CLOSE
    stock = run.of(cases.flux())
    assert largest_difference(found[:2], stock[:2]) <= CLOSE, "dense up to the first search"
    assert all(largest_difference([a], [b]) > 1e3 * CLOSE for a, b in zip(found[2:], stock[2:], strict=True))
    assert cases.counts_of(handle) == (2, 2, 3)
    for number, layer in enumerate(handle.report().to_dict()["denoisers"][0]["layers"]):
        if not layer["accelerated"]:
            assert number in config.dense_layers
            continue
        [branch], memory = layer["branches"], oracle.memory[0, number]
        assert branch["searched_at"] == 4
        for what in ("recall", "kept"):
            torch.testing.assert_close(
                torch.tensor(branch[what]), getattr(memory, what), atol=1e-6, rtol=0, check_dtype=False
            )
        assert branch["level"] == memory.level.tolist()
        assert branch["density"] == pytest.approx(memory.kept_blocks.double().mean((2, 3)), abs=1e-6)


def test_what_is_nearly_the_definition_is_far_from_it() -> None:
    """So that the tests above can fail: another schedule, sparsity, threshold, order or sink."""
    model, run = cases.flux(), cases.steps()
    found = run.of(model, attnswap.enable(model, SMALL))
    attnswap.disable(model)
    assert largest_difference(found, cases.by_definition(model, run, SMALL)[0]) <= CLOSE
    changes = [{"sparsity": 0.6}, {"recall_threshold": 0.99}, {"reorder": "tile"}, {"text_sink": False}]
    for change in [*changes, {"head_adaptive": False}]:
        other, _ = cases.by_definition(model, run, replace(SMALL, **change))
        assert largest_difference(found, other) > 1e3 * CLOSE, change


def test_only_the_first_search_leaves_its_step_dense() -> None:
    """A later one serves its own step (figure 7 of the paper)."""
    model, run = cases.flux(), cases.steps(4)
    found = run.of(model, attnswap.enable(model, SMALL))
    once, _ = cases.by_definition(model, run, SMALL, search_at=(2,))
    assert largest_difference(found[:3], once[:3]) <= CLOSE
    assert largest_difference(found[3:], once[3:]) > 1e3 * CLOSE


VIDEOS = {**video_models.CASES, **more.COGVIDEOX, **more.LTX, **more.MOCHI}


def family(name: str) -> tuple[Any, cases.Steps, Place, int]:
    """A model, a run of two videos or pictures, where their tokens lie, and how many layers see them."""
    if name == "qwen_image":
        case, grid, text = image_models.CASES[name], (7, 9), 21
        inputs = case.inputs(grid, text, 2)
        inputs["encoder_hidden_states_mask"] = torch.tensor([[True] * text, [True] * 3 + [False] * (text - 3)])
        [place], layers = case.sequences(grid, text).values(), 2
    else:
        # CogVideoX has a most of text, and what Mochi hides it takes out of each video by itself.
        video, frames, text = VIDEOS[name], (3, 5, 6), 6 if name.startswith("cogvideox") else 21
        inputs = video.inputs(frames, text, 1 if name == "mochi" else 2)
        case, place, layers = video, video.place(frames, text), video.layers  # type: ignore[assignment]
    run = cases.Steps(cases.in_dtype(inputs, torch.float64), 4)
    return cases.sharpen(case.make().double(), 2.0), run, place, layers


@pytest.mark.parametrize(
    ("name", "reorder"),
    [
        *((name, "none") for name in ("qwen_image", *VIDEOS)),
        *((name, "tile") for name in ("qwen_image", "wan", "hunyuan_video", "framepack", "cogvideox")),
    ],
)
def test_families_are_the_definition(name: str, reorder: str) -> None:
    """Hidden text is in no search and seen by nobody, wherever in the sequence it lies."""
    model, run, place, layers = family(name)
    config = replace(SMALL, reorder=reorder)
    wanted, _ = cases.by_definition(model, run, config, place, layers=layers)
    stock = run.of(model)
    handle = attnswap.enable(model, config)
    found = run.of(model, handle)
    assert largest_difference(found, wanted) <= CLOSE
    assert largest_difference(found, stock) > 1e3 * CLOSE
    assert cases.counts_of(handle) == (2, 2, 2)


def test_sparsity_0_is_the_stock_model_bit_for_bit() -> None:
    model, run = cases.flux(), cases.steps()
    stock = run.of(model)
    with attnswap.enabled(model, replace(SMALL, sparsity=0)) as handle:
        assert all(map(torch.equal, run.of(model, handle), stock))
    assert "sparsity 0: every layer stays dense" in str(handle.report())
    assert cases.counts_of(handle) == (5, 0, 0)
    assert handle.report().density == 1


def test_a_search_that_keeps_all_blocks_is_the_stock_model() -> None:
    """A sparsity that leaves no whole block out, and so runs the sparse kernel on all of them."""
    model, run = cases.flux(), cases.steps()
    stock = run.of(model)
    handle = attnswap.enable(model, replace(SMALL, sparsity=0.01, head_adaptive=False))
    assert largest_difference(run.of(model, handle), stock) <= CLOSE
    assert cases.counts_of(handle) == (2, 2, 3)
    assert handle.report().density == 1


def test_it_comes_out_as_it_went_in() -> None:
    model, run = cases.flux(), cases.steps()
    stock = run.of(model)
    with unchanged(model):
        handle = attnswap.enable(model, SMALL)
        sparse = run.of(model, handle)
        assert not torch.equal(sparse[-1], stock[-1])
        handle = attnswap.enable(model, SMALL)
        assert all(map(torch.equal, run.of(model, handle), sparse)), "enabled over itself"
        handle.disable()
    assert all(map(torch.equal, run.of(model), stock))


def test_where_one_kernel_does_both_the_first_search_goes_by_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in bf16 on a GPU: that step keeps its log-sum-exp, and output and scores come from one pass."""
    monkeypatch.setattr("attnswap.accel.methods.adaspa_state.CallShape.fuses", True)
    model, run = cases.flux(), cases.steps()
    wanted, _ = cases.by_definition(model, run, SMALL, one_pass=True)
    with attnswap.enabled(model, SMALL) as handle:
        assert largest_difference(run.of(model, handle), wanted) <= CLOSE
    assert cases.counts_of(handle) == (2, 2, 3)
