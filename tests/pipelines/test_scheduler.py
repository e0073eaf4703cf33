"""Schedulers: those that suit a model take the place of its own, others are refused in one line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attnswap.pipelines import scheduler
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.scheduler import schedulers_for, use_scheduler

from ..accel import tiny_dit
from .pictures import picture


class TestScheduler:
    @pytest.mark.parametrize(
        ("name", "full"),
        [
            ("euler", "EulerDiscreteScheduler"),
            ("EulerAncestral", "EulerAncestralDiscreteScheduler"),
            ("DPMSolverMultistep", "DPMSolverMultistepScheduler"),
            ("dpmsolver", "DPMSolverMultistepScheduler"),
            ("UniPCMultistepScheduler", "UniPCMultistepScheduler"),
            ("LCM", "LCMScheduler"),
        ],
    )
    def test_is_set_up_like_the_present_one(self, sd: Any, name: str, full: str) -> None:
        before = sd.scheduler.config
        use_scheduler(sd, name)
        assert type(sd.scheduler).__name__ == full
        for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "steps_offset"):
            assert sd.scheduler.config[key] == before[key]
        assert torch.isfinite(picture(sd)).all()

    def test_that_is_there_already_stays(self, sd: Any) -> None:
        before = sd.scheduler
        use_scheduler(sd, "ddim")
        assert sd.scheduler is before

    @pytest.mark.parametrize("name", ["FlowMatchEuler", "EDMEuler", "CogVideoXDPM"])
    def test_that_does_not_suit_is_refused_with_those_that_do(self, sd: Any, name: str) -> None:
        says = (
            f"--scheduler {name} does not suit a StableDiffusionPipeline with DDIMScheduler. There are: .*EulerDiscrete"
        )
        with pytest.raises(BadInput, match=says):
            use_scheduler(sd, name)

    def test_that_nobody_knows_is_refused(self, sd: Any) -> None:
        with pytest.raises(BadInput, match=r"--scheduler fast is none that Diffusers has. There are: DDIM"):
            use_scheduler(sd, "fast")

    def test_that_lacks_a_library_is_refused_in_one_line(self, sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        import diffusers

        def missing(*_: object, **__: object) -> None:
            raise ImportError("\nLMSDiscreteScheduler requires the scipy library.\nInstall it.")

        monkeypatch.setattr(diffusers.LMSDiscreteScheduler, "from_config", missing)
        with pytest.raises(BadInput, match=r"--scheduler lms: LMSDiscreteScheduler requires the scipy library.$"):
            use_scheduler(sd, "lms")

    def test_of_straight_paths_are_theirs_alone(self) -> None:
        """FLUX asks for sigmas of its own, which DPM-Solver does not take; Z-Image as a list, nor does UniPC."""
        flux, wan = tiny_dit.IMAGES["flux"]()[0], tiny_dit.PIPELINES["wan"]()[0]
        assert [name[:5] for name in schedulers_for(flux)] == ["FlowM", "UniPC"]
        assert [name[:5] for name in schedulers_for(wan)] == ["FlowM", "UniPC", "DPMSo"]
        z_image = tiny_dit.IMAGES["z_image"]()[0]
        assert schedulers_for(z_image) == ("FlowMatchEulerDiscreteScheduler",)

    @pytest.mark.parametrize("family", ["flux", "flux2", "sd3", "qwen_image", "wan", "hunyuan_video", "ltx"])
    def test_that_suits_ends_where_the_models_own_does(self, family: str) -> None:
        pipe, arguments = (tiny_dit.IMAGES | tiny_dit.PIPELINES)[family]()
        how = {**arguments, "num_inference_steps": 20, "output_type": "latent"}
        made = []
        for name in ("euler", *schedulers_for(pipe)[1:]):
            use_scheduler(pipe, name)
            [latents] = pipe(**how, generator=torch.Generator().manual_seed(0)).values()
            made.append(latents)
        for other in made[1:]:
            assert 0 < (other - made[0]).norm() < 0.05 * made[0].norm()

    def test_keeps_the_shift_both_ways(self) -> None:
        pipe = tiny_dit.PIPELINES["wan"]()[0]
        pipe.scheduler.register_to_config(shift=5.0)
        use_scheduler(pipe, "unipc")
        assert (pipe.scheduler.config.flow_shift, pipe.scheduler.config.use_flow_sigmas) == (5.0, True)
        use_scheduler(pipe, "euler")
        assert pipe.scheduler.config.shift == 5.0

    def test_of_cogvideox_and_of_distilled_models_are_their_own(self) -> None:
        import diffusers

        def suited(name: str) -> tuple[str, ...]:
            return schedulers_for(SimpleNamespace(scheduler=getattr(diffusers, name)()))

        assert suited("CogVideoXDDIMScheduler") == scheduler.COGVIDEOX
        assert suited("LCMScheduler") == ("LCMScheduler",)
