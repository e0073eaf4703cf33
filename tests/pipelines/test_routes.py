"""Routes end to end: what runs, that a run goes on where another stopped, and what is refused before any step."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from attnswap.pipelines import load, low_memory, presets, render, resolve, run, save
from attnswap.pipelines.errors import BadInput, JobFailed
from attnswap.pipelines.generate import Result, generate
from attnswap.pipelines.job import Job, from_record
from attnswap.pipelines.routes import Stage
from attnswap.pipelines.session import place, place_again
from diffusers import AutoencoderKLQwenImage
from PIL import Image

CLIMBING = ["ladder", "superres", "superres-ladder"]


@pytest.fixture(scope="module")
def loaded() -> dict[object, Any]:
    return {}


@pytest.fixture(autouse=True)
def load_once(loaded: dict[object, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """All jobs of a model run on one pipeline: what one of them left behind would change the next."""
    load_from_disk = load.load

    def load_from_memory(model: load.Model, **how: Any) -> Any:
        key = (model.folder, *how.values())
        if key not in loaded:
            loaded[key] = load_from_disk(model, **how)
        return loaded[key]

    monkeypatch.setattr(load, "load", load_from_memory)


@pytest.fixture
def job(tiny_sd: Path, tmp_path: Path) -> Job:
    """Two stages above the base for the ladders."""
    strengths = (0.5, 0.5)
    return Job(
        "a fox", tmp_path / "fox.png", str(tiny_sd), width=128, height=192, steps=2, route="ladder", strengths=strengths
    )


def going(job: Job, route: str, **changes: Any) -> Job:
    strengths = (0.5,) if route == "superres" else (0.5, 0.5)
    return dataclasses.replace(job, **{"route": route, "strengths": strengths, **changes})


def pixels(result: Result) -> np.ndarray:
    return np.asarray(result.image)


def interrupted(job: Job, number: int) -> list[str]:
    """Ctrl-C when the stage of this number begins; what was said."""
    paint, heard = render.Painter.paint, []

    def stopped(self: render.Painter, stage: Any, *rest: Any) -> Any:
        if stage.number == number:
            raise KeyboardInterrupt
        return paint(self, stage, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render.Painter, "paint", stopped)
        with pytest.raises(KeyboardInterrupt):
            generate(job, say=heard.append)
    return heard


class TestEveryRoute:
    @pytest.mark.parametrize("route", CLIMBING)
    def test_ends_at_the_size_asked_for_and_leaves_the_picture_alone(self, job: Job, route: str) -> None:
        result = generate(going(job, route))
        assert result.image.size == (128, 192)
        assert os.listdir(job.output.parent) == ["fox.png"]
        assert [stage.number for stage in result.stages] == list(range(1, len(result.stages) + 1))

    @pytest.mark.parametrize("route", ["superres", "superres-ladder"])
    def test_of_sdxl(self, job: Job, tiny_sdxl: Path, route: str) -> None:
        assert generate(going(job, route, model=str(tiny_sdxl))).image.size == (128, 192)

    def test_of_sdxl_by_pictures(self, job: Job, tiny_sdxl: Path) -> None:
        assert generate(dataclasses.replace(job, model=str(tiny_sdxl))).image.size == (128, 192)

    @pytest.mark.parametrize("route", CLIMBING)
    def test_is_made_again_from_its_own_record(self, job: Job, route: str) -> None:
        first = generate(going(job, route, strengths=None, methods={"hidiffusion": {}}, low_memory=True))
        bytes_before = job.output.read_bytes()
        again = Job(**from_record(save.read_record(job.output)), output=job.output)
        assert again.strengths == first.job.strengths is not None
        assert again.low_memory
        generate(again)
        assert job.output.read_bytes() == bytes_before

    def test_routes_and_strengths_give_different_pictures(self, job: Job) -> None:
        jobs = [going(job, route) for route in CLIMBING]
        jobs += [dataclasses.replace(job, route="direct", strengths=None), going(job, "ladder", seed=1)]
        jobs += [dataclasses.replace(job, strengths=(0.5, 1.0))]
        assert len({pixels(generate(one)).tobytes() for one in jobs}) == len(jobs)

    @pytest.mark.parametrize(("route", "calls"), [("ladder", 2 + 1 + 1), ("superres", 2 + 2), ("direct", 2)])
    def test_reports_a_method_over_all_stages(self, job: Job, route: str, calls: int) -> None:
        strengths = None if route == "direct" else going(job, route).strengths
        result = generate(dataclasses.replace(job, route=route, strengths=strengths, methods={"hidiffusion": {}}))
        assert result.report is not None
        assert result.report.to_dict()["denoisers"][0]["calls"] == calls

    def test_shares_every_weight(self, sd: Any) -> None:
        made = render.image_to_image(sd)
        assert made.components.keys() == sd.components.keys()
        assert all(made.components[name] is part for name, part in sd.components.items())

    @pytest.mark.parametrize("route", CLIMBING)
    def test_spares_memory_without_changing_the_picture(
        self, job: Job, route: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Tiles do change it; without them nothing but rounding may differ.
        monkeypatch.setattr(low_memory, "untileable", lambda vae: "it is a test")
        plain, spared = (generate(going(job, route, low_memory=low)) for low in (False, True))
        difference = np.abs(pixels(plain).astype(int) - pixels(spared))
        assert difference.max() <= 1
        assert any("low memory: guidance halves, where batched, one at a time" in text for text in spared.notices)


class TestLadder:
    def test_is_the_stock_pipelines_one_after_the_other(self, job: Job) -> None:
        pipe = load.load(load.find(job.model), dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        stages = generate(job).stages

        def seeded() -> dict[str, Any]:
            generator = torch.Generator("cpu").manual_seed(0)
            return {"num_inference_steps": 2, "guidance_scale": 7.5, "generator": generator}

        image = pipe("a fox", width=stages[0].width, height=stages[0].height, **seeded()).images[0]
        larger = render.image_to_image(pipe)
        larger.set_progress_bar_config(disable=True)
        for stage in stages[1:]:
            image = image.resize((stage.width, stage.height), Image.Resampling.BICUBIC)
            image = larger("a fox", image=image, strength=0.5, **seeded()).images[0]
        assert np.array_equal(pixels(generate(job)), np.asarray(image))

    def test_is_tuned_by_the_models_preset(self, job: Job, tiny_sd: Path, copy_of: Callable[[Path], Path]) -> None:
        folder = copy_of(tiny_sd)
        (folder / "attnswap.json").write_text(json.dumps({"routes": {"ladder": [0.9, 0.6]}}))
        assert generate(dataclasses.replace(job, model=str(folder), strengths=None)).job.strengths == (0.9, 0.6)

    def test_says_from_which_size_the_autoencoder_works_in_tiles(
        self, job: Job, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from diffusers import AutoencoderKL

        seen: list[tuple[int, bool]] = []
        decode = AutoencoderKL.decode

        def watched(self: Any, latents: torch.Tensor, **more: Any) -> Any:
            seen.append((8 * latents.shape[-2], self.use_tiling))
            return decode(self, latents, **more)

        monkeypatch.setattr(AutoencoderKL, "decode", watched)
        monkeypatch.setattr(render, "TILING_SIDE", 192)
        monkeypatch.setattr(render, "TILE_SIDE", 128)
        result = generate(job)
        assert [tiles for _, tiles in seen] == [False, False, True]
        assert result.notices == (
            "stage 3/3: 128x192, strength 0.5, 1 steps: autoencoder in tiles of 128 px, from 192 px on.",
        )

    def test_does_not_claim_a_size_of_tiles_that_cannot_be_set(self, job: Job) -> None:
        vae = AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        heard: list[str] = []
        shown = run.Progress((), shown=False)
        painter = render.Painter(SimpleNamespace(vae=vae), [job], torch.device("cpu"), progress=shown, say=heard.append)
        with painter._tiles(Stage(2, 2, 4096, 4096, 1, 0.5)):
            assert vae.use_tiling
        assert heard == [
            "stage 2/2: 4096x4096, strength 0.5, 1 steps: autoencoder in tiles of its own size, from 4096 px on."
        ]

    @pytest.mark.parametrize(
        "name",
        [
            "StableDiffusion",
            "StableDiffusionXL",
            "StableDiffusion3",
            "Flux",
            "QwenImage",
            "ZImage",
        ],
    )
    @pytest.mark.parametrize(("steps", "strength"), [(12, 0.4), (50, 0.3), (28, 0.1), (100, 0.29), (8, 0.05), (7, 1.0)])
    def test_counts_the_steps_that_diffusers_runs(self, name: str, steps: int, strength: float) -> None:
        larger = getattr(diffusers, f"{name}Img2ImgPipeline")
        pipe = SimpleNamespace(scheduler=SimpleNamespace(timesteps=torch.arange(steps), order=1))
        pipe.unet = object() if name in ("StableDiffusion", "StableDiffusionXL") else None
        _, expected = larger.get_timesteps(pipe, steps, strength, "cpu")
        assert resolve.steps_run(pipe)(steps, strength) == expected


class TestOffload:
    """On a machine without an accelerator the weights are moved from the CPU to the CPU, by the same hooks."""

    @pytest.mark.parametrize("offload", ["model", "group"])
    @pytest.mark.parametrize("route", CLIMBING)
    def test_does_not_change_the_picture(self, job: Job, sd: Any, route: str, offload: str) -> None:
        job = going(job, route)
        expected = pixels(generate(job))
        device = torch.device("cpu")
        pipe = type(sd)(**copy.deepcopy(sd.components), requires_safety_checker=False)
        job, stages = resolve.complete(job, pipe, presets.Preset(), torch.float32)
        offloaded = dataclasses.replace(job, cpu_offload=offload)
        place(pipe, device, offloaded)
        painter = render.Painter(
            pipe,
            [job],
            device,
            progress=run.Progress(stages, shown=False),
            prepare=lambda made: place_again(made, device, offloaded),
        )
        image, carried = None, {}
        for stage in stages:
            [image], carried = painter.paint(stage, image, carried)
        assert np.array_equal(np.asarray(image), expected)


class TestGoingOn:
    @pytest.mark.parametrize(
        ("route", "stages", "stopped_at"),
        [("ladder", 3, 1), ("ladder", 3, 3), ("superres", 2, 2), ("superres-ladder", 3, 2), ("superres-ladder", 3, 3)],
    )
    def test_gives_the_picture_of_an_uninterrupted_run(
        self,
        job: Job,
        route: str,
        stages: int,
        stopped_at: int,
    ) -> None:
        job = going(job, route)
        whole = pixels(generate(job))
        assert len(interrupted(job, stopped_at)) == (stopped_at > 1)
        result = generate(job)
        assert np.array_equal(pixels(result), whole)
        assert [f"stage {stopped_at - 1}/{stages}" in text for text in result.notices] == [True] * (stopped_at > 1)
        assert os.listdir(job.output.parent) == ["fox.png"]

    def test_runs_only_what_is_missing(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        interrupted(job, 3)
        painted: list[int] = []

        def paint(_self: Any, stage: Any, *_: Any) -> Any:
            painted.append(stage.number)
            return [Image.new("RGB", (stage.width, stage.height), "red")], {}

        monkeypatch.setattr(render.Painter, "paint", paint)
        generate(job)
        assert painted == [3]

    @pytest.mark.parametrize("change", [{"seed": 1}, {"strengths": (0.5, 1.0)}, {"low_memory": True}, {"prompt": "b"}])
    def test_not_with_the_stages_of_another_job(self, job: Job, change: dict[str, Any]) -> None:
        interrupted(job, 3)
        assert not any("taken from" in text for text in generate(dataclasses.replace(job, **change)).notices)

    def test_is_possible_from_stages_that_were_kept(self, job: Job) -> None:
        whole = pixels(generate(dataclasses.replace(job, keep_stages=True)))
        folder = job.output.parent / ".fox.png.stages"
        assert len(os.listdir(folder)) == 2
        job.output.unlink()
        result = generate(dataclasses.replace(job, keep_stages=True))
        assert any("stage 2/3" in text for text in result.notices)
        assert np.array_equal(pixels(result), whole)

    def test_after_a_failure_that_says_so(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        from diffusers import UNet2DConditionModel

        forward = UNet2DConditionModel.forward

        def full(self: Any, sample: torch.Tensor, *rest: Any, **more: Any) -> Any:
            if sample.shape[-2:].numel() * 64 == 128 * 192:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(self, sample, *rest, **more)

        monkeypatch.setattr(UNet2DConditionModel, "forward", full)
        heard: list[str] = []
        with pytest.raises(JobFailed, match=r"out of memory at 128x192 .* --low-memory"):
            generate(job, say=heard.append)
        assert "2 of 3 stages are kept" in heard[-1]
        assert f"the same command with -o {job.output} goes on from there" in heard[-1]


class TestRefusals:
    """Before any step; the numbers are in `routes/test_plan.py`."""

    @pytest.fixture(autouse=True)
    def no_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from diffusers import UNet2DConditionModel

        monkeypatch.setattr(UNet2DConditionModel, "forward", lambda *_, **__: pytest.fail("a denoising step was run"))

    def test_a_size_that_is_not_above_the_native_one(self, job: Job) -> None:
        with pytest.raises(BadInput, match="64x64 is not above the native size, 64x64"):
            generate(dataclasses.replace(job, width=64, height=64))

    def test_strengths_of_the_wrong_count(self, job: Job) -> None:
        with pytest.raises(BadInput, match="1 given, 2 needed"):
            generate(dataclasses.replace(job, strengths=(0.4,)))

    def test_a_pipeline_without_an_image_to_image_form(self, sd: Any) -> None:
        class Own(type(sd)):  # type: ignore[misc]
            pass

        with pytest.raises(BadInput, match="Own has no image-to-image form"):
            render.check_route(Own(**sd.components), "ladder")

    @pytest.mark.parametrize("route", ["superres", "superres-ladder"])
    def test_super_resolution_without_a_unet(self, route: str) -> None:
        class FluxPipeline:
            transformer = torch.nn.Linear(1, 1)

        with pytest.raises(BadInput, match=rf"--route {route} .*FluxPipeline with a Linear"):
            render.check_route(FluxPipeline(), route)

    def test_tiles_of_an_autoencoder_that_cannot(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        from diffusers.models.autoencoders.vae import AutoencoderMixin

        monkeypatch.delattr(AutoencoderMixin, "enable_tiling")
        with pytest.raises(BadInput, match="--vae-tiling: AutoencoderKL cannot: it has no tiling"):
            generate(dataclasses.replace(job, vae_tiling=True, route="direct", strengths=None))
