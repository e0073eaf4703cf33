"""Two-branch super-resolution: what it reduces to, that any scheduler does, and that nothing is left behind."""

from __future__ import annotations

import copy
import math
from typing import Any

import attnswap
import diffusers
import pytest
import torch
from attnswap.pipelines.errors import JobFailed
from attnswap.pipelines.render import image_to_image
from attnswap.pipelines.routes import superres
from PIL import Image
from torch import nn

SCHEDULERS = ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]


def picture(side: int = 128) -> Image.Image:
    return Image.radial_gradient("L").resize((side, side)).convert("RGB")


def upscaled(pipe: Any, image: Image.Image | None = None, **more: Any) -> torch.Tensor:
    arguments = {
        "prompt": "a fox",
        "steps": 8,
        "strength": 0.5,
        "guidance": 3.0,
        "scale": 2,
        "generator": torch.Generator().manual_seed(3),
    }
    return superres.upscale(pipe, image or picture(), **{**arguments, **more})


def use(pipe: Any, scheduler: str) -> None:
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)


class TestOneBranchAlone:
    """With the pull and the dilated branch faded out at once, this is image-to-image and no more."""

    NEVER = (math.inf, math.inf, 1.0)

    @pytest.mark.parametrize("scheduler", [*SCHEDULERS, "UniPCMultistepScheduler", "HeunDiscreteScheduler"])
    def test_is_the_stock_image_to_image(self, pipe: Any, scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
        use(pipe, scheduler)
        # Standardising the result would be a difference; the latents before it are what is compared.
        monkeypatch.setattr(superres, "standardise", lambda latents, to: latents)
        found = upscaled(pipe, cosine_scales=self.NEVER, negative="a dog")
        stock = image_to_image(pipe)
        stock.set_progress_bar_config(disable=True)
        # The stock image-to-image of SDXL has other size conditions only where it asks for aesthetic scores.
        expected = stock(
            "a fox",
            image=picture(),
            strength=0.5,
            num_inference_steps=8,
            guidance_scale=3.0,
            negative_prompt="a dog",
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
        ).images
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    def test_differs_from_both_branches(self, pipe: Any) -> None:
        assert not torch.allclose(upscaled(pipe, cosine_scales=self.NEVER), upscaled(pipe), atol=1e-3)


class TestScheduler:
    @pytest.mark.parametrize("name", [*SCHEDULERS, "UniPCMultistepScheduler", "HeunDiscreteScheduler"])
    def test_a_step_with_the_mixture_is_the_mixture_of_two_steps_from_one_state(self, sd: Any, name: str) -> None:
        use(sd, name)
        sd.scheduler.set_timesteps(6)
        generator = torch.Generator().manual_seed(0)

        def noise() -> torch.Tensor:
            return torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64)

        latents = noise()
        for t in sd.scheduler.timesteps:
            near, far, saved = noise(), noise(), copy.deepcopy(sd.scheduler)
            sd.scheduler.scale_model_input(latents, t)
            mixed = sd.scheduler.step(near.lerp(far, 0.3), t, latents).prev_sample
            two = [copy.deepcopy(saved).step(branch, t, latents).prev_sample for branch in (near, far)]
            torch.testing.assert_close(mixed, two[0].lerp(two[1], 0.3), atol=1e-9, rtol=1e-6)
            latents = mixed

    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_any(self, pipe: Any, name: str) -> None:
        use(pipe, name)
        found = upscaled(pipe)
        assert found.shape == (1, 3, 128, 128)
        assert torch.isfinite(found).all()
        assert torch.equal(found, upscaled(pipe))

    @pytest.mark.parametrize(("strength", "expected"), [(0.5, 4), (0.51, 5), (0.01, 1), (1, 8)])
    def test_runs_every_step_begun_with_two_calls_each(self, sd: Any, strength: float, expected: int) -> None:
        calls: list[int] = []
        sd.unet.register_forward_pre_hook(lambda *_: calls.append(1))
        done: list[int] = []
        upscaled(sd, strength=strength, on_step=lambda step, latents: done.append(step))
        assert done == list(range(1, expected + 1))
        assert len(calls) == 2 * expected


class TestGuidance:
    def test_none_asks_for_one_prompt_only(self, pipe: Any) -> None:
        batches: list[int] = []
        pipe.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
        upscaled(pipe, guidance=1.0)
        assert set(batches) == {1}

    def test_heeds_the_negative_prompt(self, pipe: Any) -> None:
        assert not torch.equal(upscaled(pipe, negative="a dog"), upscaled(pipe))


class TestResult:
    def test_of_any_size_also_one_that_is_not_square(self, pipe: Any) -> None:
        image = Image.radial_gradient("L").resize((120, 72)).convert("RGB")
        assert upscaled(pipe, image).shape == (1, 3, 72, 120)

    def test_has_the_moments_of_the_picture_or_those_given(self, sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[torch.Tensor] = []
        decode = superres.decode
        monkeypatch.setattr(superres, "decode", lambda pipe, latents: seen.append(latents) or decode(pipe, latents))
        given = (torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1), torch.tensor([1.0, 1, 2, 2]).view(1, 4, 1, 1))
        upscaled(sd, moments=given)
        upscaled(sd)
        torch.testing.assert_close(superres.moments_of(seen[0]), given, atol=1e-4, rtol=1e-4)
        encoded = superres.encode(sd, picture(), torch.Generator().manual_seed(3))
        torch.testing.assert_close(superres.moments_of(seen[1]), superres.moments_of(encoded), atol=1e-4, rtol=1e-4)

    def test_that_the_safety_checker_refuses_is_a_failure(self, sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sd, "run_safety_checker", lambda picture, *_: (picture, [True]))
        with pytest.raises(JobFailed, match="safety checker"):
            upscaled(sd)


class TestNothingIsLeftBehind:
    def test_by_an_exception_in_the_dilated_branch(self, pipe: Any) -> None:
        expected = upscaled(pipe)
        convolutions = [module for module in pipe.unet.modules() if isinstance(module, nn.Conv2d)]
        before = [(module.dilation, module.padding) for module in convolutions]
        calls: list[int] = []

        def fail_in_the_fourth(*_: object) -> None:
            calls.append(1)
            if len(calls) == 4:
                raise ZeroDivisionError

        hook = pipe.unet.register_forward_pre_hook(fail_in_the_fourth)
        with pytest.raises(ZeroDivisionError):
            upscaled(pipe)
        hook.remove()
        assert [(module.dilation, module.padding) for module in convolutions] == before
        assert torch.equal(upscaled(pipe), expected)

    def test_in_half_precision_the_autoencoder_of_sdxl_works_in_single(self, sdxl: Any) -> None:
        sdxl.to(dtype=torch.bfloat16)
        seen: list[torch.dtype] = []
        sdxl.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
        assert torch.isfinite(upscaled(sdxl)).all()
        assert seen == [torch.float32]
        assert sdxl.vae.dtype == torch.bfloat16


def test_a_method_knows_the_step(sd: Any) -> None:
    handle = attnswap.enable(sd, "hidiffusion")
    clock = handle._clock
    seen: list[tuple[int | None, int | None]] = []
    sd.unet.register_forward_hook(lambda *_: seen.append((clock.step, clock.steps)))
    upscaled(sd, on_begin=handle.set_timesteps)
    assert seen == [(step, 4) for step in range(4) for _ in range(2)]


def test_weights_fade_from_one_to_zero() -> None:
    start, end = (superres.weights(t, 1000, (3, 1, 1)) for t in (1000, 0))
    assert start == pytest.approx((1, 1, 1))
    assert end == pytest.approx((0, 0, 0.01))
    assert superres.weights(500, 1000, (3, 1, 2)) == pytest.approx((0.125, 0.5, 0.2575))


def test_blur_is_a_gaussian_over_each_channel() -> None:
    point = torch.zeros(1, 2, 7, 7)
    point[0, 0, 3, 3] = 1
    found = superres.blur(point, 3, 0.8)
    at = torch.tensor([-1.0, 0, 1])
    expected = torch.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 0.8**2))
    torch.testing.assert_close(found[0, 0, 2:5, 2:5], expected / expected.sum())
    assert not found[0, 1].any()
    assert torch.equal(superres.blur(point, 3, 0.01), point)
