"""Windows over time: what they reduce to, how they are fused, and that no state passes from one to another."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from attnswap.accel.context import Clock
from attnswap.accel.observe import Observer
from attnswap.pipelines import load, low_memory
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.routes import windows

FRAMES, WINDOW, OVERLAP = 8, 4, 2  # latent ones


@pytest.fixture
def wan(tiny_wan: Path) -> Any:
    pipe = load.load(load.find(str(tiny_wan)), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shot(pipe: Any, frames: int = 2 * FRAMES - 1, **more: Any) -> torch.Tensor:
    """The latents of a clip."""
    arguments = {
        "prompt": "a fox",
        "height": 16,
        "width": 16,
        "num_frames": frames,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "max_sequence_length": 8,
        "generator": torch.Generator().manual_seed(3),
        "output_type": "latent",
    }
    return pipe(**{**arguments, **more}).frames


def call(model: Any, latents: torch.Tensor, **more: Any) -> torch.Tensor:
    text = torch.ones(len(latents), 5, 16)
    arguments = {"timestep": torch.full((len(latents),), 500.0), "encoder_hidden_states": text, "return_dict": False}
    with torch.no_grad(), model.cache_context("cond"):
        return model(hidden_states=latents, **{**arguments, **more})[0]


def noise(frames: int = FRAMES, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 4, frames, 4, 4, generator=torch.Generator().manual_seed(1))


class TestSpans:
    @pytest.mark.parametrize(("frames", "window", "overlap"), [(8, 4, 2), (9, 4, 2), (21, 5, 1), (5, 4, 3), (4, 4, 2)])
    def test_have_the_same_length_and_overlap_at_least_as_asked(self, frames: int, window: int, overlap: int) -> None:
        spans = windows.spans(frames, window, overlap)
        assert all(span.stop - span.start == window for span in spans)
        assert (spans[0].start, spans[-1].stop) == (0, frames)
        assert all(before.stop - after.start >= overlap for before, after in itertools.pairwise(spans))
        assert all(before.start < after.start for before, after in itertools.pairwise(spans))

    def test_of_a_short_clip_is_the_clip(self) -> None:
        assert windows.spans(3, 4, 2) == [slice(0, 3)]


class TestNoise:
    def test_begins_with_that_of_one_window(self, wan: Any) -> None:
        long = windows.initial_noise(
            wan, (16, 16), window=7, frames=FRAMES, stride=2, generator=torch.Generator().manual_seed(3)
        )
        short = wan.prepare_latents(1, 4, 16, 16, 7, torch.float32, "cpu", torch.Generator().manual_seed(3))
        assert torch.equal(long[:, :, :4], short)

    @pytest.mark.parametrize("stride", [1, 2, 3])
    def test_goes_on_with_the_same_frames_in_another_order(self, stride: int) -> None:
        first = torch.arange(4.0).view(1, 1, 4, 1, 1)
        found = windows.rescheduled(first, 11, stride, torch.Generator().manual_seed(0)).flatten().tolist()
        assert found[:4] == [0, 1, 2, 3]
        for start in range(0, 11 - 4 - stride, stride):
            block = found[start + 4 : start + 4 + stride]
            assert sorted(block) == sorted(found[start : start + stride])


class TestOneWindow:
    def test_is_the_stock_run(self, wan: Any) -> None:
        expected = shot(wan, 2 * WINDOW - 1)
        with windows.windowed(wan, WINDOW, OVERLAP):
            assert torch.equal(shot(wan, 2 * WINDOW - 1), expected)


class TestFusion:
    def test_is_the_mean_that_counts_the_middle_of_a_window_most(self, wan: Any) -> None:
        latents, model = noise(), wan.transformer
        total = torch.zeros(FRAMES)
        expected = torch.zeros_like(latents)
        for start in (0, 2, 4):
            weight = torch.tensor([1.0, 2, 2, 1])
            expected[:, :, start : start + 4] += weight.view(4, 1, 1) * call(model, latents[:, :, start : start + 4])
            total[start : start + 4] += weight
        with windows.windowed(wan, WINDOW, OVERLAP):
            found = call(model, latents)
        torch.testing.assert_close(found, expected / total.view(-1, 1, 1), atol=1e-6, rtol=1e-5)

    def test_never_asks_for_more_frames_than_a_window_has(self, wan: Any) -> None:
        seen: list[int] = []
        for model in (wan.transformer, wan.transformer_2):
            model.patch_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
        with windows.windowed(wan, WINDOW, OVERLAP):
            shot(wan)
        assert set(seen) == {WINDOW}
        assert len(seen) == 3 * 2 * 3  # steps, guidance, windows

    def test_takes_the_timesteps_of_its_frames_where_every_token_has_its_own(self, wan: Any) -> None:
        latents = noise()
        steps = torch.arange(FRAMES).repeat_interleave(4).view(1, -1).float() * 10  # 4 tokens a frame
        seen: list[torch.Tensor] = []
        hook = wan.transformer.register_forward_pre_hook(
            lambda _, __, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
        )
        with windows.windowed(wan, WINDOW, OVERLAP):
            call(wan.transformer, latents, timestep=steps)
        hook.remove()
        parts = [part for part in seen if part.shape[1] == 4 * WINDOW]
        assert [int(part.min()) for part in parts] == [0, 20, 40]

    def test_goes_with_low_memory(self, wan: Any) -> None:
        latents = noise(batch=2)
        with windows.windowed(wan, WINDOW, OVERLAP):
            expected = call(wan.transformer, latents)
        with low_memory.in_halves(wan.transformer), windows.windowed(wan, WINDOW, OVERLAP):
            torch.testing.assert_close(call(wan.transformer, latents), expected, atol=1e-5, rtol=1e-5)


class TestMethods:
    def test_see_every_window_as_a_guidance_branch_of_the_same_step(self, wan: Any) -> None:
        clock = Clock()
        seen: list[tuple[int | None, int | None, int]] = []
        observers = [
            Observer(model, clock, lambda _: seen.append((clock.step, clock.steps, clock.branch)), pipeline=wan)
            for model in (wan.transformer, wan.transformer_2)
        ]
        with windows.windowed(wan, WINDOW, OVERLAP):
            shot(wan)
        for observer in observers:
            observer.remove()
        # The conditional call's three windows, then those of the unconditional one; the same in every step.
        assert seen == [(step, 3, branch) for step in range(3) for branch in range(6)]


class TestNothingIsLeftBehind:
    def test_also_by_an_exception_in_a_window(self, wan: Any) -> None:
        expected = shot(wan)
        calls: list[int] = []

        def fail_in_the_fifth(*_: object) -> None:
            calls.append(1)
            if len(calls) == 5:
                raise ZeroDivisionError

        hook = wan.transformer.blocks[0].register_forward_pre_hook(fail_in_the_fifth)
        with pytest.raises(ZeroDivisionError), windows.windowed(wan, WINDOW, OVERLAP):
            shot(wan)
        hook.remove()
        for model in (wan.transformer, wan.transformer_2):
            assert not model._forward_pre_hooks
            assert not model._forward_hooks
            assert "cache_context" not in vars(model)
        assert torch.equal(shot(wan), expected)

    def test_and_the_next_run_in_windows_is_the_same(self, wan: Any) -> None:
        with windows.windowed(wan, WINDOW, OVERLAP):
            first = shot(wan)
            assert torch.equal(shot(wan), first)
        assert not torch.equal(first, shot(wan))


def test_a_pipeline_whose_denoiser_is_told_the_frames_otherwise_is_refused() -> None:
    class CogVideoXPipeline: ...

    with pytest.raises(BadInput, match="WanPipeline; this is a CogVideoXPipeline"):
        windows.check(CogVideoXPipeline())
