"""The clock told by real pipelines: which step of how many, which guidance branch, which run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from attnswap.accel.context import Clock
from attnswap.accel.observe import Observer

from . import tiny, tiny_dit
from .slim import slim
from .watching import Watch, branches_of, lengths_of, runs_of, steps_of, unchanged

TWO_CALLS = {"wan", "flux", "kontext", "qwen_image"}
MAKERS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "sd15": lambda: (slim("sd15"), {}),
    "sdxl": lambda: (slim("sdxl"), {}),
    **tiny_dit.PIPELINES,
}


def sampler(name: str) -> tuple[Any, Callable[[int], Any]]:
    """A pipeline and what runs it for some steps."""
    pipe, arguments = MAKERS[name]()
    if name in ("sd15", "sdxl"):
        return pipe, lambda steps: tiny.run(pipe, side=8, steps=steps)
    return pipe, lambda steps: pipe(**arguments, num_inference_steps=steps, output_type="latent")


def expected(name: str, steps: int) -> tuple[list[int], list[int]]:
    calls = 2 if name in TWO_CALLS else 1
    return [step for step in range(steps) for _ in range(calls)], [*range(calls)] * steps


@pytest.mark.parametrize("offload", [None, "before", "after"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_call_knows_its_step_its_branch_and_its_run(name: str, offload: str | None) -> None:
    pipe, sample = sampler(name)
    if offload == "before":
        pipe.enable_model_cpu_offload(device="cpu")
    watch = Watch(pipe)
    if offload == "after":
        pipe.enable_model_cpu_offload(device="cpu")
    earlier: set[int] = set()
    for steps, abort_at in ((4, None), (4, 1), (4, None), (4, 0), (4, None), (1, None), (1, None), (3, None)):
        calls = watch.of(lambda steps=steps: sample(steps), abort_at=abort_at)
        wanted_steps, wanted_branches = expected(name, steps)
        if abort_at is not None:
            wanted = wanted_steps.index(abort_at) + 1
            wanted_steps, wanted_branches = wanted_steps[:wanted], wanted_branches[:wanted]
        assert steps_of(calls) == wanted_steps
        assert branches_of(calls) == wanted_branches
        assert lengths_of(calls) == {steps}
        assert len(runs_of(calls)) == 1
        assert not runs_of(calls) & earlier, "state of an earlier run would be taken for this one's"
        earlier |= runs_of(calls)


@pytest.mark.parametrize("name", MAKERS)
def test_a_bare_denoiser_knows_its_step_too(name: str) -> None:
    """Without the pipeline nobody says how many steps there are, unless the timestep shows the list it is from."""
    pipe, sample = sampler(name)
    for module in (getattr(pipe, "unet", None), getattr(pipe, "transformer", None)):
        if module is not None:
            watch = Watch(module)
    if name == "wan":
        pipe.register_to_config(boundary_ratio=None)
        pipe.transformer_2 = None
    earlier: set[int] = set()
    for steps, abort_at in ((4, None), (4, 1), (3, None), (3, 0), (3, None), (1, None), (1, None), (4, None)):
        calls = watch.of(lambda steps=steps: sample(steps), abort_at=abort_at)
        if abort_at is None:
            assert (steps_of(calls), branches_of(calls)) == expected(name, steps)
        assert len(runs_of(calls)) == 1
        assert not runs_of(calls) & earlier
        earlier |= runs_of(calls)
        if steps > 1 and name in ("sd15", "sdxl", "sd3", "cogvideox", "ltx", "wan"):
            assert lengths_of(calls) == {steps}


@pytest.mark.parametrize("name", MAKERS)
def test_removal_leaves_no_trace(name: str) -> None:
    pipe, sample = sampler(name)
    model = getattr(pipe, "unet", None) or pipe.transformer
    with unchanged(model):
        watch = Watch(pipe)
        watch.of(lambda: sample(2))
        watch.remove()
    assert watch.of(lambda: sample(2)) == []


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_the_end_of_a_run_is_told_until_removal(name: str) -> None:
    pipe, sample = sampler(name)
    model, ends = getattr(pipe, "unet", None) or pipe.transformer, []
    observer = Observer(model, Clock(), lambda call: None, on_end=lambda: ends.append(observer.clock.step))
    for runs in (1, 2):
        sample(2)
        assert ends == [None] * runs, "the clock has forgotten the run"
    observer.remove()
    sample(2)
    assert len(ends) == 2


REPEATING = {
    # Heun evaluates twice a step, PNDM's second step twice: the list says so, and each entry is a step.
    diffusers.PNDMScheduler: ({"skip_prk_steps": True}, 4),
    diffusers.HeunDiscreteScheduler: ({}, 5),
    diffusers.KDPM2DiscreteScheduler: ({}, 5),
    diffusers.DPMSolverMultistepScheduler: ({}, 3),
    diffusers.LCMScheduler: ({}, 3),
    diffusers.UniPCMultistepScheduler: ({}, 3),
    diffusers.EulerAncestralDiscreteScheduler: ({}, 3),
}


@pytest.mark.parametrize("bare", [False, True], ids=["pipeline", "denoiser"])
@pytest.mark.parametrize("scheduler", REPEATING, ids=lambda cls: cls.__name__)
def test_timesteps_that_repeat_are_steps_of_their_own(scheduler: Any, bare: bool) -> None:
    changes, entries = REPEATING[scheduler]
    pipe = slim("sd15", scheduler=scheduler(**changes))
    watch = Watch(pipe.unet if bare else pipe)
    for _ in range(2):
        calls = watch.of(lambda: tiny.run(pipe, side=8, steps=3))
        assert steps_of(calls) == list(range(entries))
        assert lengths_of(calls) == {entries}
        assert len(runs_of(calls)) == 1


@pytest.mark.parametrize("bare", [False, True], ids=["pipeline", "denoiser"])
def test_image_to_image_counts_the_steps_it_runs(bare: bool) -> None:
    pipe = slim("sd15", cls=diffusers.StableDiffusionImg2ImgPipeline)
    watch = Watch(pipe.unet if bare else pipe)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for strength, run in ((0.5, 2), (0.8, 4), (1.0, 5), (0.2, 1)):
        calls = watch.of(lambda s=strength: tiny.run(pipe, steps=5, image=picture, strength=s))
        assert steps_of(calls) == list(range(run))
        assert lengths_of(calls) == {run}


def test_the_position_before_truncation_is_known_as_well() -> None:
    pipe = slim("sd15", cls=diffusers.StableDiffusionImg2ImgPipeline)
    watch, places = Watch(pipe), []
    pipe.unet.register_forward_pre_hook(lambda *_: places.append((watch.clock.position, watch.clock.total)))
    tiny.run(pipe, steps=10, image=torch.rand(1, 3, 64, 64), strength=0.3)
    assert places == [(7, 10), (8, 10), (9, 10)]


def test_a_run_that_ends_early_counts_the_steps_it_runs() -> None:
    pipe = slim("sdxl")
    calls = Watch(pipe).of(lambda: tiny.run(pipe, side=8, steps=10, denoising_end=0.6))
    assert steps_of(calls) == [0, 1, 2, 3, 4, 5]
    assert lengths_of(calls) == {6}
