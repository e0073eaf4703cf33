"""At which steps AdaSpa searches: exactly those asked for, once a layer, guidance branch and run."""

from __future__ import annotations

from typing import Any

import attnswap
import pytest
import torch
from attnswap import AdaSpa
from attnswap.accel.methods.adaspa_schedule import UnknownSteps, steps_of_run

from .. import tiny_dit
from . import adaspa_cases as cases
from .common import notes

BLOCKS: dict[str, Any] = {"sparsity": 0.5, "min_tokens": 0, "block": (16, 16)}


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [(50, (10, 30)), (20, (4, 12)), (8, (2, 5)), (4, (1, 2)), (2, (1,)), (1, (1,))],
)
def test_the_default_is_that_of_50_steps_scaled(steps: int, wanted: tuple[int, ...]) -> None:
    assert steps_of_run(AdaSpa().search_steps, steps) == wanted


@pytest.mark.parametrize(
    ("search_steps", "steps", "wanted"),
    [
        ((30, 10, 10), 50, (10, 30)),
        ((10,), 50, (10,)),
        ((0.0, 0.01, 1.0), 8, (1, 8)),
        ((0.5, 4, 0.49), 8, (4,)),
        ((3, 0.5), 9, (3, 4)),
        ((10, 29), None, (10, 29)),
        ((1,), None, (1,)),
    ],
)
def test_steps_and_fractions_are_ascending_without_doubles(search_steps: Any, steps: Any, wanted: Any) -> None:
    assert steps_of_run(search_steps, steps) == wanted


def test_a_step_beyond_the_run_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"\(2, 9\): step 9 is beyond the run of 8 steps; give steps from 1 to 8"):
        steps_of_run((2, 9), 8)
    with pytest.raises(UnknownSteps, match=r"handle.set_timesteps\(timesteps\), or give whole steps"):
        steps_of_run((0.2,), None)
    with pytest.raises(UnknownSteps, match=r"\(10, 30\) are scaled to the number of steps, which nothing tells"):
        steps_of_run(AdaSpa().search_steps, None)


# In runs.


def sample(pipe: Any, arguments: dict[str, Any], steps: int, **more: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    arguments = {**arguments, "num_inference_steps": steps, "output_type": "latent", "generator": generator, **more}
    out: torch.Tensor = pipe(**arguments)[0]
    return out


@pytest.mark.parametrize(
    ("search_steps", "steps", "counts"),
    [
        ((1,), 3, (1, 1, 2)),
        ((2, 3), 4, (2, 2, 2)),
        ((0.25, 1.0), 4, (1, 2, 3)),
        ((10, 30), 4, (1, 2, 3)),
        ((4,), 4, (4, 1, 0)),
    ],
)
@pytest.mark.parametrize("name", ["flux", "kontext"], ids=["named branches", "branches told by their text"])
def test_each_layer_and_branch_searches_at_these_steps_in_each_run(
    name: str, search_steps: Any, steps: int, counts: tuple[int, int, int]
) -> None:
    pipe, arguments = tiny_dit.PIPELINES[name]()
    handle = attnswap.enable(pipe, AdaSpa(search_steps=search_steps, **BLOCKS))
    runs = []
    for run in (1, 2):
        runs.append(sample(pipe, arguments, steps))
        assert cases.counts_of(handle) == tuple(2 * run * count for count in counts)
    assert torch.equal(*runs)
    assert notes(handle) == {}
    last = max(steps_of_run(search_steps, steps))
    for layer in cases.layers_of(handle):
        assert [(x["branch"], x["searched_at"]) for x in layer["branches"]] == [(0, last), (1, last)]


def test_two_transformers_one_after_the_other_go_by_the_steps_of_the_run() -> None:
    """Wan 2.2: the second begins in step 3 without a mask, and searches once more."""
    pipe, arguments = tiny_dit.wan()
    handle = attnswap.enable(pipe, AdaSpa(search_steps=(1, 2), **BLOCKS))
    sample(pipe, arguments, 4)
    assert cases.counts_of(handle, 0) == (2, 4, 2), "two branches: step 1 dense, step 2 with its new mask"
    assert cases.counts_of(handle, 1) == (2, 2, 2)
    [note] = handle.report().to_dict()["denoisers"][1]["notes"]
    assert "had no mask and ran dense with a search" in note["text"]
    assert note["count"] == 2
    assert notes(handle) == {}
    handle.reset()
    attnswap.enable(pipe, AdaSpa(search_steps=(1, 4), **BLOCKS))
    sample(pipe, arguments, 4)
    assert {x["searches"] for d in (0, 1) for x in cases.layers_of(handle, d)} == {0}, "the first handle counts no more"


def test_a_search_due_in_a_step_of_the_second_transformer_is_made_there() -> None:
    pipe, arguments = tiny_dit.wan()
    handle = attnswap.enable(pipe, AdaSpa(search_steps=(1, 4), **BLOCKS))
    sample(pipe, arguments, 4)
    assert cases.counts_of(handle, 0) == (2, 2, 2)
    assert cases.counts_of(handle, 1) == (2, 4, 2)


def test_search_steps_beyond_the_run_are_refused_before_anything_ran() -> None:
    pipe, arguments = tiny_dit.flux()
    handle = attnswap.enable(pipe, AdaSpa(search_steps=(2, 5), **BLOCKS))
    for _ in range(2):
        with pytest.raises(ValueError, match="step 5 is beyond the run of 4 steps"):
            sample(pipe, arguments, 4)
    assert cases.counts_of(handle) == (0, 0, 0)
    sample(pipe, arguments, 5)
    assert cases.counts_of(handle) == (4, 4, 6)


# In loops of one's own.


def loop(model: Any, timesteps: list[float], text: Any = None) -> None:
    inputs = cases.steps(grid=(6, 8), text=7, dtype=torch.float32).inputs
    for timestep in timesteps:
        if text is not None:
            inputs["encoder_hidden_states"] = text()
        with torch.no_grad():
            model(**{**inputs, "timestep": torch.tensor([timestep])})


def small() -> Any:
    return cases.flux(heads=2, dtype=torch.float32, num_layers=1, num_single_layers=1)


@pytest.mark.filterwarnings("error::attnswap.AttnswapWarning")
def test_whole_steps_need_no_number_of_steps() -> None:
    model = small()
    handle = attnswap.enable(model, AdaSpa(search_steps=(2, 3), **BLOCKS))
    loop(model, [0.9, 0.7, 0.5, 0.3])
    assert cases.counts_of(handle) == (2, 2, 2)
    assert "searches at steps 2, 3, dense up to step 2" in str(handle.report())


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"search_steps": (0.25,)}, "fractions of a run whose number of steps nothing tells"), ({}, "are scaled to")],
    ids=["fractions", "default"],
)
def test_fractions_do_and_until_it_is_told_the_model_stays_dense(settings: Any, why: str) -> None:
    model, timesteps = small(), [0.9, 0.7, 0.5, 0.3]
    handle = attnswap.enable(model, AdaSpa(**settings, **BLOCKS))
    with pytest.warns(attnswap.AttnswapWarning, match=why):
        loop(model, timesteps)
    assert cases.counts_of(handle) == (4, 0, 0)
    assert list(notes(handle).values()) == [4]
    handle.reset()
    handle.set_timesteps(timesteps)
    loop(model, timesteps)
    assert cases.counts_of(handle) == ((1, 1, 3) if settings else (1, 2, 3))
    assert notes(handle) == {}


def test_a_loop_that_makes_its_text_anew_in_each_step_is_told_what_to_do() -> None:
    """Else each call would look like another guidance branch, and search."""
    model, texts = small(), []
    handle = attnswap.enable(model, AdaSpa(search_steps=(1,), **BLOCKS))

    def text() -> torch.Tensor:
        texts.append(torch.ones(1, 7, 32))
        return texts[-1]

    timesteps = [1 - step / 20 for step in range(20)]
    handle.set_timesteps(timesteps)
    with pytest.warns(attnswap.AttnswapWarning, match="another text tensor, so that guidance branches cannot be told"):
        loop(model, timesteps, text)
    dense, searches, sparse = cases.counts_of(handle)
    assert (dense, searches, sparse) == (20, 16, 0)
    assert any("began late" in note for note in notes(handle))
