"""Whole runs: at native size, in pieces, in loops of one's own, of other lengths and sizes."""

from __future__ import annotations

import warnings
from typing import Any

import attnswap
import pytest
import torch
from attnswap import HiDiffusion
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
)

from .. import tiny
from ..slim import slim
from .common import ALWAYS, call, inputs, largest_difference, last_run, notes, runs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PIPELINES = [tiny.sd15, tiny.sdxl]


@pytest.mark.parametrize("make", PIPELINES)
def test_at_native_size_it_is_stock_bit_for_bit_and_says_why(make: Any) -> None:
    pipe = make()
    sides: tuple[Any, ...] = (8, (8, 12))  # 1.5 times the native area is not yet above it
    stock = [tiny.run(pipe, side=side, steps=3) for side in sides]
    with attnswap.enabled(pipe, "hidiffusion") as handle:
        for side, expected in zip(sides, stock, strict=True):
            assert torch.equal(tiny.run(pipe, side=side, steps=3), expected)
            assert runs(handle)[-1]["state"] == "inactive: native size"
        assert handle.report().density == 1.0
        tiny.run(pipe, side=(8, 13), steps=3)
        assert handle.report().density < 1.0


def test_active_above_zero_acts_at_native_size() -> None:
    pipe = tiny.sd15()
    with attnswap.enabled(pipe, ALWAYS) as handle:
        tiny.run(pipe, side=8)
        assert last_run(handle) == (5, 2, 0)


@pytest.mark.parametrize("make", PIPELINES)
def test_neutral_settings_equal_stock_above_native_size(make: Any) -> None:
    pipe = make()
    stock = tiny.run(pipe, side=(17, 18), steps=3)
    with attnswap.enabled(pipe, HiDiffusion(raunet=False, windows=(1, 1))):
        assert largest_difference(tiny.run(pipe, side=(17, 18), steps=3), stock) < 1e-4
    with attnswap.enabled(pipe, HiDiffusion(window_attention=False, t1=0.0, t2=0.0, aggressive=False)):
        assert torch.equal(tiny.run(pipe, side=(17, 18), steps=3), stock)


@pytest.mark.parametrize("unet", [tiny.sd15_unet, tiny.sdxl_unet])
@pytest.mark.parametrize("shift", ["step", "layer"])
def test_a_batch_is_its_parts(unet: Any, shift: str) -> None:
    """Split or not, guided in one call or in two: rows do not know of each other."""
    model = unet()
    timesteps = list(range(900, -1, -300))
    handle = attnswap.enable(model, HiDiffusion(shift=shift, active_above=0))

    def rows(given: dict[str, Any], part: slice) -> dict[str, Any]:
        added = given.get("added_cond_kwargs")
        found = {key: value[part] for key, value in given.items() if key != "added_cond_kwargs"}
        return found if added is None else {**found, "added_cond_kwargs": {k: v[part] for k, v in added.items()}}

    given = inputs(model, (17, 14), batch=2)
    handle.set_timesteps(timesteps)
    together = [call(model, (17, 14), t, **given) for t in timesteps]
    handle.set_timesteps(timesteps)
    for timestep, expected in zip(timesteps, together, strict=True):
        parts = [call(model, (17, 14), timestep, **rows(given, slice(i, i + 1))) for i in range(2)]
        torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-5)


def test_sizes_after_sizes_and_lengths_after_lengths() -> None:
    pipe = slim("sdxl")
    fresh = {}
    wanted = [(16, 7), ((17, 20), 13), (8, 3), ((12, 16), 7), (16, 7)]
    for side, steps in wanted:
        with attnswap.enabled(pipe, "hidiffusion"):
            fresh[side, steps] = tiny.run(pipe, side=side, steps=steps)
    with attnswap.enabled(pipe, "hidiffusion") as handle:
        for side, steps in wanted:
            assert torch.equal(tiny.run(pipe, side=side, steps=steps), fresh[side, steps])
        found = [(run["latent"], run["steps"], run["conv_steps"], run["pool_steps"]) for run in runs(handle)]
    assert found == [
        ("16x16", 7, 1, 1),
        ("17x20", 13, 2, 3),
        ("8x8", 3, 0, 0),
        ("12x16", 7, 1, 1),
        ("16x16", 7, 1, 1),
    ]


def test_a_loop_of_ones_own_needs_only_the_timesteps() -> None:
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    pipe = tiny.sd15(scheduler=scheduler)
    with attnswap.enabled(pipe, "hidiffusion"):
        expected = tiny.run(pipe, steps=5, guidance_scale=1.0)
    text = torch.randn(1, 7, tiny.TEXT, generator=torch.Generator().manual_seed(1))
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(5)
    handle = attnswap.enable(pipe.unet, "hidiffusion")
    handle.set_timesteps(scheduler.timesteps)
    for timestep in scheduler.timesteps.tolist():
        with torch.no_grad():
            noise = pipe.unet(latents, timestep, encoder_hidden_states=text).sample
        latents = scheduler.step(noise, timestep, latents).prev_sample
    assert torch.equal(latents, expected)
    assert last_run(handle) == (5, 2, 0)


def test_without_a_number_of_steps_only_the_windows_act_and_that_is_said() -> None:
    unet = tiny.sd15_unet()
    handle = attnswap.enable(unet, ALWAYS)
    with pytest.warns(attnswap.AttnswapWarning, match=r"call handle.set_timesteps\(scheduler.timesteps\)"):
        call(unet, (16, 16), 500)
    assert any("stays off" in note for note in notes(handle))
    assert handle.report().density == 0.25


def test_image_to_image_counts_the_steps_it_runs() -> None:
    pipe = tiny.sd15(cls=StableDiffusionImg2ImgPipeline)
    picture = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    with attnswap.enabled(pipe, "hidiffusion") as handle:
        tiny.run(pipe, steps=20, image=picture, strength=0.5)
        assert last_run(handle) == (10, 4, 0)


@pytest.mark.parametrize(("strength", "conv"), [(1.0, 8), (0.8, 4), (0.5, 0)])
def test_by_noise_image_to_image_skips_what_the_picture_already_settles(strength: float, conv: int) -> None:
    pipe = tiny.sd15(cls=StableDiffusionImg2ImgPipeline)
    picture = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    with attnswap.enabled(pipe, HiDiffusion(by="noise")) as handle:
        tiny.run(pipe, steps=20, image=picture, strength=strength)
        assert last_run(handle)[1] == conv


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_a_scheduler_that_repeats_timesteps_counts_every_call_it_lists(scheduler: Any) -> None:
    pipe = tiny.sd15(scheduler=scheduler())
    with attnswap.enabled(pipe, "hidiffusion") as handle:
        tiny.run(pipe, steps=5)
        steps = len(pipe.scheduler.timesteps)
        assert last_run(handle) == (steps, int(0.4 * steps), 0)


def test_few_step_models_get_their_share_when_rounded_up() -> None:
    pipe = tiny.sdxl()
    with attnswap.enabled(pipe, HiDiffusion(round_up=True)) as handle:
        tiny.run(pipe, steps=4)
        assert last_run(handle) == (4, 1, 1)


def test_large_side_brings_the_schedule_of_very_large_pictures() -> None:
    pipe = tiny.sd15()
    with attnswap.enabled(pipe, HiDiffusion(large_side=16)) as handle:
        tiny.run(pipe, side=(16, 17), steps=10)
        assert last_run(handle) == (10, 7, 3)
        tiny.run(pipe, side=(15, 24), steps=10)
        assert last_run(handle) == (10, 4, 0)


def test_odd_grids_are_resized_as_published_only_when_asked_and_that_is_said() -> None:
    pipe = tiny.sd15()
    exact = HiDiffusion(raunet=False)
    resized = HiDiffusion(raunet=False, odd_grids="resize")
    results = {}
    for config in (exact, resized):
        with attnswap.enabled(pipe, config) as handle:
            if config is resized:
                with pytest.warns(attnswap.AttnswapWarning, match="odd grid 17x15 resized to 18x16"):
                    results[config.odd_grids] = tiny.run(pipe, side=(17, 15), steps=2)
                assert notes(handle) == {"odd grid 17x15 resized to 18x16 and back": 10}
            else:
                results[config.odd_grids] = tiny.run(pipe, side=(17, 15), steps=2)
                assert notes(handle) == {}
            even = tiny.run(pipe, side=16, steps=2)
            results[f"{config.odd_grids}, even"] = even
    assert largest_difference(results["exact"], results["resize"]) > 1e-3
    # Windows of four and more on even grids: both modes are the same.
    assert torch.equal(results["exact, even"], results["resize, even"])


def test_the_report_counts_the_steps_in_which_layers_attended_in_windows() -> None:
    pipe = slim("sd15")
    for settings, expected in (
        ({"active_above": 0}, 3),
        ({"active_above": 0, "window_attention": False}, 0),
        ({"active_above": 0, "windows": (99, 99)}, 0),
        ({}, 0),
    ):
        with attnswap.enabled(pipe, attnswap.HiDiffusion(**settings)) as handle, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tiny.run(pipe, side=8, steps=3)
            [run] = runs(handle)
        assert run["windows_steps"] == expected, settings
