"""Jobs that begin with a picture: which pipeline takes it, at what size, and who takes none."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attnswap.pipelines import clip, image_input, load, save
from attnswap.pipelines.errors import BadInput, JobFailed
from attnswap.pipelines.generate import generate
from attnswap.pipelines.job import Job, from_record
from PIL import Image

PictureOf = Callable[..., Path]


@pytest.fixture
def picture_of(tmp_path: Path) -> PictureOf:
    """Writes a picture of colours that change smoothly."""

    def write(width: int, height: int, name: str = "start.png", **how: Any) -> Path:
        rows, columns = np.mgrid[0:height, 0:width]
        colours = np.stack([255 * columns / width, 255 * rows / height, 0 * rows], 2).astype(np.uint8)
        Image.fromarray(colours).save(tmp_path / name, **how)
        return tmp_path / name

    return write


@pytest.fixture
def job(tiny_sd: Path, tmp_path: Path, picture_of: PictureOf) -> Job:
    return Job("a fox", output=tmp_path / "fox.png", model=str(tiny_sd), steps=4, image=picture_of(96, 64))


@pytest.fixture(scope="session")
def tiny_wan_i2v(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random WanImageToVideoPipeline: 16 frames a second; its positions end at 256 px."""
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel

    pipe = load.load(load.find(str(tiny_wan)), dtype=torch.float32)
    # The latents, a mask over time and the encoded picture.
    channels = 4 + 2 + 4
    torch.manual_seed(1)
    parts = {name: part for name, part in pipe.components.items() if not name.startswith("transformer")}
    of_pictures = WanTransformer3DModel.from_config({**pipe.transformer.config, "in_channels": channels})
    folder = tmp_path_factory.mktemp("models") / "tiny-wan-i2v"
    made = WanImageToVideoPipeline(
        **parts, transformer=of_pictures, transformer_2=of_pictures, image_encoder=None, boundary_ratio=0.8
    )
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def clip_job(tiny_wan_i2v: Path, tmp_path: Path, picture_of: PictureOf, monkeypatch: pytest.MonkeyPatch) -> Job:
    from diffusers.pipelines.wan import pipeline_wan_i2v

    # Prompts are cleaned by a library that need not be here.
    monkeypatch.setattr(pipeline_wan_i2v, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    size = {"width": 32, "height": 32, "frames": 9, "steps": 2}
    return Job("a fox", frames_dir=tmp_path / "frames", model=str(tiny_wan_i2v), image=picture_of(32, 32), **size)


def frames_of(job: Job) -> np.ndarray[Any, Any]:
    assert job.frames_dir is not None
    return np.stack([np.asarray(Image.open(path)) for path in sorted(job.frames_dir.iterdir())])


class TestPicture:
    def test_is_changed_as_diffusers_changes_it(self, job: Job) -> None:
        from diffusers import StableDiffusionImg2ImgPipeline

        pipe = StableDiffusionImg2ImgPipeline.from_pipe(load.load(load.find(job.model), dtype=torch.float32))
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(3)
        start = Image.open(job.image)  # type: ignore[arg-type]
        expected = pipe("a fox", start, strength=0.5, num_inference_steps=4, generator=generator).images[0]
        result = generate(dataclasses.replace(job, strength=0.5, seed=3))
        assert np.array_equal(np.asarray(result.image), np.asarray(expected))
        assert [stage.steps for stage in result.stages] == [2]

    @pytest.mark.parametrize(
        ("asked", "made"),
        [
            ({}, (200, 136)),
            ({"width": 64}, (64, 40)),
            ({"height": 64}, (88, 64)),
            ({"width": 64, "height": 128}, (64, 128)),
        ],
    )
    def test_keeps_its_size_or_shape(
        self, job: Job, picture_of: PictureOf, asked: dict[str, int], made: tuple[int, int]
    ) -> None:
        result = generate(dataclasses.replace(job, image=picture_of(203, 140), **asked))
        assert result.image is not None
        assert result.image.size == (result.job.width, result.job.height) == made
        stretched = [text for text in result.notices if "is 203x140, stretched to 64x128" in text]
        assert bool(stretched) == (made == (64, 128))

    def test_is_taken_upright(self, picture_of: PictureOf) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # a camera held sideways
        path = picture_of(40, 20, "photo.jpg", exif=exif)
        assert image_input.size_of(path) == image_input.read(path).size == (20, 40)

    def test_is_in_the_record(self, job: Job) -> None:
        first = generate(job)
        record = save.read_record(job.output)
        assert (record["image"], record["strength"]) == (str(job.image), 0.8)
        assert record["strengths"] is None
        again = Job(**from_record(record), output=job.output)
        assert np.array_equal(np.asarray(generate(again).image), np.asarray(first.image))

    def test_goes_through_a_method(self, job: Job, picture_of: PictureOf) -> None:
        large = dataclasses.replace(job, image=picture_of(128, 128), methods={"hidiffusion": {}}, strength=1.0)
        report = generate(large).report
        assert report is not None
        assert report.density < 1

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"strength": 0.01}, "--strength 0.01 of 4 steps is less than one step; 0.25 is enough"),
            ({"strength": 1.5}, "strength 1.5 is out of range"),
            ({"strength": 0.5, "image": None}, "--strength 0.5: there is no --image to change"),
            ({"route": "ladder", "width": 256, "height": 256}, "--image: --route ladder begins with noise"),
            ({"image": Path("nowhere.png")}, "--image nowhere.png: there is no such file"),
            ({"image": Path(__file__)}, "test_image_input.py is no PNG, JPEG or WebP"),
            ({"image": Path(__file__).parent}, "cannot be read: Is a directory"),
            ({"image": Path("~nobodyxyz/x.png")}, "~nobodyxyz/x.png cannot be looked up: Could not determine home"),
            ({"image": Path("a" * 5000)}, "cannot be looked up: File name too long"),
        ],
    )
    def test_that_cannot_be_is_refused(self, job: Job, changes: dict[str, Any], says: str) -> None:
        with pytest.raises(BadInput, match=says):
            generate(dataclasses.replace(job, **changes))
        assert job.output is not None
        assert not job.output.exists()

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
    def test_that_never_comes_to_an_end_is_refused(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.png")
        for path in (tmp_path / "a.png", Path("/dev/zero")):
            with pytest.raises(BadInput, match=f"--image {path} is no file but a pipe or a device"):
                image_input.size_of(path)

    def test_that_is_cut_off_is_refused(self, job: Job, picture_of: PictureOf) -> None:
        path = picture_of(300, 300)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(BadInput, match=r"start\.png cannot be read"):
            generate(dataclasses.replace(job, image=path))

    def test_that_is_huge_is_refused(self, picture_of: PictureOf, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(BadInput, match=r"start\.png has more than 100 pixels"):
            image_input.size_of(picture_of(11, 10))


class TestPipeline:
    @pytest.mark.parametrize(("image", "taker"), [(None, "FluxPipeline"), (Path("a.png"), "FluxImg2ImgPipeline")])
    def test_is_the_one_for_pictures_of_the_same_parts(self, tiny_flux: Path, image: Path | None, taker: str) -> None:
        pipe = load.load(load.find(str(tiny_flux)), dtype=torch.float32)
        found = image_input.taker(Job("a fox", image=image), pipe)
        assert type(found).__name__ == taker
        assert found.transformer is pipe.transformer

    def test_may_be_of_pictures_itself(self, job: Job, tmp_path: Path) -> None:
        from diffusers import StableDiffusionImg2ImgPipeline

        pipe = load.load(load.find(job.model), dtype=torch.float32)
        StableDiffusionImg2ImgPipeline.from_pipe(pipe).save_pretrained(tmp_path / "img2img")
        of_pictures = dataclasses.replace(job, model=str(tmp_path / "img2img"))
        assert np.array_equal(np.asarray(generate(of_pictures).image), np.asarray(generate(job).image))
        with pytest.raises(
            BadInput, match=r"a StableDiffusionImg2ImgPipeline, which begins with a picture: give --image"
        ):
            generate(dataclasses.replace(of_pictures, image=None))

    def test_without_a_form_for_pictures_is_said(self) -> None:
        from diffusers import SanaPipeline

        pipe = SanaPipeline(None, None, None, None, None)
        with pytest.raises(BadInput, match="--image: SanaPipeline has no image-to-image form in Diffusers"):
            image_input.taker(Job("a fox", image=Path("a.png")), pipe)

    def test_needs_a_scheduler_that_can_begin_with_a_picture(self, tiny_flux: Path, picture_of: PictureOf) -> None:
        job = Job("a fox", output=Path("fox.png"), model=str(tiny_flux), scheduler="unipc", image=picture_of(32, 32))
        with pytest.raises(
            BadInput, match="cannot begin with a picture by UniPCMultistepScheduler; try FlowMatchEuler"
        ):
            generate(job)


class TestClip:
    def test_begins_with_the_picture_as_in_diffusers(self, clip_job: Job) -> None:
        pipe = load.load(load.find(clip_job.model), dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        start = Image.open(clip_job.image)  # type: ignore[arg-type]
        generator = torch.Generator("cpu").manual_seed(0)
        how = {"width": 32, "height": 32, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 2.0}
        expected = pipe(start, "a fox", **how, generator=generator, output_type="pt").frames[0]
        result = generate(dataclasses.replace(clip_job, guidance=2.0))
        assert np.array_equal(frames_of(clip_job), (expected.permute(0, 2, 3, 1).numpy() * 255).round())
        assert (result.job.fps, result.job.strength, result.notices) == (16, None, ())

    def test_has_the_pictures_shape_and_the_models_area(self, clip_job: Job, picture_of: PictureOf) -> None:
        pipe = load.load(load.find(clip_job.model), dtype=torch.float32)
        job = dataclasses.replace(clip_job, image=picture_of(300, 100), width=None, height=None)
        assert image_input.size(job, pipe, (480, 832), 16) == (1088, 352)
        assert image_input.size(dataclasses.replace(job, width=96), pipe, (480, 832), 16) == (96, 32)

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"image": None}, "a WanImageToVideoPipeline, which begins with a picture: give --image"),
            ({"strength": 0.5}, "--strength 0.5: WanImageToVideoPipeline takes none"),
            ({"route": "windows"}, "--image: --route windows begins with noise"),
            ({"frames": 10}, r"frames 10 is not 2n \+ 1"),
        ],
    )
    def test_that_cannot_be_is_refused(self, clip_job: Job, changes: dict[str, Any], says: str) -> None:
        with pytest.raises(BadInput, match=says):
            generate(dataclasses.replace(clip_job, **changes))

    def test_of_a_prompt_alone_takes_none(self, clip_job: Job, tiny_wan: Path) -> None:
        with pytest.raises(
            BadInput, match="a WanPipeline, which makes clips of a prompt alone; those named ImageToVideo"
        ):
            generate(dataclasses.replace(clip_job, model=str(tiny_wan)))

    def test_needs_what_its_pipeline_imports_if_it_can(self, clip_job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        from diffusers.pipelines.wan import pipeline_wan_i2v

        monkeypatch.delattr(pipeline_wan_i2v, "ftfy")
        with pytest.raises(BadInput, match="WanImageToVideoPipeline needs ftfy: pip install ftfy"):
            generate(clip_job)

    def test_may_have_its_size_from_the_pipeline(self, picture_of: PictureOf) -> None:
        from diffusers import HunyuanVideo15ImageToVideoPipeline
        from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

        pipe = HunyuanVideo15ImageToVideoPipeline.__new__(HunyuanVideo15ImageToVideoPipeline)
        vars(pipe).update(target_size=640, video_processor=HunyuanVideo15ImageProcessor(vae_scale_factor=16))
        job = Job("a fox", model="hunyuan", image=picture_of(200, 100))
        width, height = image_input.size(job, pipe, None, 16)
        assert 1.8 < width / height < 2.2
        assert (width % 16, height % 16) == (0, 0)
        says = f"which makes {width}x{height} of a picture of 200x100: leave --width and --height out"
        with pytest.raises(BadInput, match=says):
            image_input.size(dataclasses.replace(job, width=64), pipe, None, 16)

    def test_is_as_fast_as_clips_of_prompts(self) -> None:
        for name, fps in clip.FPS.items():
            assert clip.FPS.get(name.replace("Pipeline", "ImageToVideoPipeline"), fps) == fps


class TestCompilation:
    def test_that_fails_is_one_line(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch._dynamo.exc import TorchDynamoException

        def forward(*_: object, **__: object) -> None:
            raise TorchDynamoException("fatal error:\nno such header")

        monkeypatch.setattr("diffusers.UNet2DConditionModel.forward", forward)
        with pytest.raises(
            JobFailed, match="--compile failed; without it the job may run: fatal error: no such header"
        ):
            generate(dataclasses.replace(job, compile=True))
