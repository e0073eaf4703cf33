"""Pipelines around image transformers: what they are asked for, and how they climb above their native size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attnswap import Clear, UnsupportedModel, WeightsError
from attnswap.pipelines import guidance, presets, render, resolve, run
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.job import Job
from attnswap.pipelines.presets import Preset
from attnswap.pipelines.stage_methods import StageMethods
from PIL import Image

from ..accel.tiny_dit import IMAGES

# Pixels a side of one token: the autoencoders here halve, Qwen-Image's quarters.
TOKENS = {"flux": 4, "flux2": 4, "sd3": 2, "qwen_image": 8, "z_image": 4}
CLIMBING = ("sd3", "sd35", "qwen_image", "z_image")  # FLUX does so in ../test_cli_clear.py


def job_of(side: int, **fields: Any) -> Job:
    values = {"prompt": "a fox", "output": Path("fox.png"), "width": side, "height": side, "steps": 2, **fields}
    return Job(**values)


def completed(pipe: Any, job: Job, preset: Preset | None = None, **more: Any) -> tuple[Job, Any]:
    return resolve.complete(job, pipe, preset or Preset(native_side=32), torch.float32, **more)


def speechless(pipe: Any, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """These pipelines have no text encoders; their prompts become the embeddings `given`."""
    names = {
        "StableDiffusion3Pipeline": (
            "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
        ),
        "QwenImagePipeline": ("prompt_embeds", "prompt_embeds_mask"),
        "ZImagePipeline": ("prompt_embeds", "negative_prompt_embeds"),
    }[type(pipe).__name__]  # fmt: skip
    # What only decoding asks of an autoencoder.
    pipe.vae.register_to_config(shift_factor=0.1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    for cls in (type(pipe), type(render.image_to_image(pipe))):
        monkeypatch.setattr(cls, "encode_prompt", lambda *_, **__: tuple(given[name] for name in names))


class TestSize:
    @pytest.mark.parametrize("family", TOKENS)
    def test_is_a_multiple_of_a_token(self, family: str) -> None:
        pipe, _ = IMAGES[family]()
        assert resolve.size_multiple(pipe) == TOKENS[family]

    @pytest.mark.parametrize("family", TOKENS)
    def test_that_is_native_is_known(self, family: str) -> None:
        pipe, _ = IMAGES[family]()
        assert (resolve.native_side(pipe) or 0) >= 64

    def test_that_a_method_cannot_divide_is_refused_with_the_nearest(self) -> None:
        pipe, _ = IMAGES["z_image"]()
        pooled = [Clear(radius=2, down_factor=3)]
        says = "width 40 is not a multiple of 12, which clear with down_factor 3 needs; nearest: 36"
        with pytest.raises(BadInput, match=says):
            completed(pipe, job_of(40), configs=pooled)
        assert completed(pipe, job_of(36), configs=pooled)[0].width == 36


class TestGuidance:
    @pytest.mark.parametrize(
        ("family", "expected"),
        [
            ("flux", {"true_cfg_scale": 3.0, "negative_prompt": ""}),
            ("qwen_image", {"true_cfg_scale": 3.0, "negative_prompt": ""}),
            ("sd3", {"guidance_scale": 3.0, "negative_prompt": None}),
            ("z_image", {"guidance_scale": 3.0, "negative_prompt": None}),
            ("flux2", {"guidance_scale": 3.0, "negative_prompt": None}),
        ],
    )
    def test_is_the_argument_that_acts(self, family: str, expected: dict[str, Any]) -> None:
        pipe, _ = IMAGES[family]()
        assert guidance.arguments(completed(pipe, job_of(32, guidance=3.0))[0], pipe) == expected

    @pytest.mark.parametrize(
        ("family", "scale"), [("flux", 1.0), ("qwen_image", 4.0), ("sd3", 7.0), ("z_image", 5.0), ("flux2", 4.0)]
    )
    def test_is_the_presets_else_that_of_the_pipeline(self, family: str, scale: float) -> None:
        pipe, _ = IMAGES[family]()
        assert completed(pipe, job_of(32))[0].guidance == scale
        assert completed(pipe, job_of(32), Preset(native_side=32, guidance=2.5))[0].guidance == 2.5

    def test_takes_no_second_call_where_it_is_one(self) -> None:
        pipe, _ = IMAGES["qwen_image"]()
        job, _ = completed(pipe, job_of(32, guidance=1.0))
        assert guidance.arguments(job, pipe) == {"true_cfg_scale": 1.0, "negative_prompt": None}

    def test_negative_prompts_are_refused_by_pipelines_without(self) -> None:
        pipe, _ = IMAGES["flux2"]()
        with pytest.raises(BadInput, match="Flux2Pipeline, which takes no negative prompt"):
            completed(pipe, job_of(32, negative="a dog"))


class TestTextLength:
    def test_is_the_presets_where_the_pipeline_takes_one(self, sd: Any) -> None:
        preset = Preset(native_side=32, max_sequence_length=16)
        assert completed(IMAGES["flux"]()[0], job_of(32), preset)[0].max_sequence_length == 16
        assert completed(IMAGES["flux"]()[0], job_of(32))[0].max_sequence_length is None
        assert completed(sd, job_of(32), preset)[0].max_sequence_length is None

    @pytest.mark.parametrize("length", [0, -1, "16", 1.5, True])
    def test_that_is_none_is_no_preset(self, tmp_path: Path, length: object) -> None:
        (tmp_path / "attnswap.json").write_text(json.dumps({"max_sequence_length": length}))
        with pytest.raises(BadInput, match="max_sequence_length"):
            presets.read(tmp_path)


class TestLadder:
    @pytest.mark.parametrize("family", CLIMBING)
    def test_goes_by_the_familys_own_image_to_image(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe, given = IMAGES[family]()
        speechless(pipe, given, monkeypatch)
        clear = Clear(radius=2, proportional_attention=True)
        job = job_of(64, route="ladder", strengths=(0.5,), guidance=1.0, steps=4)
        job, stages = completed(pipe, job, configs=[clear])
        said: list[str] = []
        methods = StageMethods(pipe, [clear], said.append)
        progress = run.Progress(stages, shown=False)
        painter = render.Painter(pipe, [job], torch.device("cpu"), progress=progress, methods=methods)
        image: Image.Image | None = None
        for stage in stages:
            [image], _ = painter.paint(stage, image, {})
        report = methods.report()
        methods.close()
        assert image is not None
        assert image.size == (64, 64)
        assert said == ["the base (stage 1/2) runs without clear: only larger pictures need it."]
        assert report is not None
        assert [denoiser["calls"] for denoiser in report.denoisers] == [stages[1].steps] == [2]
        assert report.density < 1
        assert all(not denoiser["notes"] for denoiser in report.denoisers)

    def test_without_a_strength_is_refused(self) -> None:
        pipe, _ = IMAGES["flux2"]()
        with pytest.raises(BadInput, match="Flux2Pipeline, takes no strength"):
            render.check_route(pipe, "ladder")


class TestStageMethods:
    def test_refuse_settings_that_would_only_act_later(self) -> None:
        pipe, _ = IMAGES["sd3"]()
        with pytest.raises(UnsupportedModel, match="no rotary positions"):
            StageMethods(pipe, [Clear(ntk_factor=2.0)], lambda text: None)

    def test_leave_the_base_dense_and_the_model_as_it_was(self) -> None:
        pipe, given = IMAGES["flux"]()

        def picture() -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            pixels: torch.Tensor = pipe(**given, num_inference_steps=1, generator=generator, output_type="pt").images
            return pixels

        before = picture()
        _, stages = completed(pipe, job_of(32, route="ladder", strengths=(0.5,)), Preset(native_side=16))
        methods = StageMethods(pipe, [Clear(radius=2, ntk_factor=2.0)], lambda text: None)
        for stage in stages:
            methods.enter(stage)
            assert torch.equal(picture(), before) == (stage.number == 1)
        methods.close()
        methods.close()
        assert torch.equal(picture(), before)

    def test_miss_weights_before_the_first_stage(self) -> None:
        pipe, _ = IMAGES["flux"]()
        with pytest.raises(WeightsError, match="nowhere"):
            StageMethods(pipe, [Clear(radius=2, weights="/nowhere/clear.safetensors")], lambda text: None)

    def test_without_any_there_is_no_report(self) -> None:
        pipe, _ = IMAGES["flux"]()
        methods = StageMethods(pipe, [], lambda text: None)
        methods.enter(completed(pipe, job_of(32))[1][0])
        methods.close()
        assert methods.report() is None
