"""One job end to end: what is filled in, what a picture remembers, what counts as a failure."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attnswap.pipelines import load, presets, run, save
from attnswap.pipelines.errors import BadInput, JobFailed
from attnswap.pipelines.generate import generate
from attnswap.pipelines.job import RECORDED, Job, from_record
from attnswap.pipelines.presets import Preset
from attnswap.pipelines.resolve import size_multiple


@pytest.fixture
def job(tiny_sd: Path, tmp_path: Path) -> Job:
    return Job(prompt="a fox", output=tmp_path / "fox.png", model=str(tiny_sd), steps=2)


def decode_to(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    from diffusers import AutoencoderKL

    def decode(_self: object, latents: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        height, width = latents.shape[-2:]
        return (torch.full((len(latents), 3, height * 8, width * 8), value),)

    monkeypatch.setattr(AutoencoderKL, "decode", decode)


class TestPicture:
    def test_is_the_one_that_diffusers_makes(self, job: Job) -> None:
        pipe = load.load(load.find(job.model), dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(5)
        expected = pipe("a fox", num_inference_steps=2, guidance_scale=4.0, generator=generator).images[0]
        result = generate(dataclasses.replace(job, seed=5, guidance=4.0))
        assert np.array_equal(np.asarray(result.image), np.asarray(expected))

    def test_differs_by_seed(self, job: Job) -> None:
        pictures = [np.asarray(generate(dataclasses.replace(job, seed=seed)).image) for seed in (0, 1)]
        assert not np.array_equal(*pictures)

    def test_has_the_native_size_unless_told_otherwise(self, job: Job) -> None:
        assert generate(job).image.size == (64, 64)
        assert generate(dataclasses.replace(job, height=32)).image.size == (64, 32)

    def test_reports_time_and_memory(self, job: Job) -> None:
        result = generate(job)
        assert result.seconds > 0
        assert (result.peak_bytes or 0) > 2**20


class TestPreset:
    @pytest.fixture
    def preset(self, tiny_sd: Path, copy_of: Callable[[Path], Path], job: Job) -> Job:
        folder = copy_of(tiny_sd)
        preset = {"native_side": 128, "steps": 3, "guidance": 2.5, "methods": {"hidiffusion": {"t1": 0.9}}, "later": 1}
        (folder / "attnswap.json").write_text(json.dumps(preset))
        return dataclasses.replace(job, model=str(folder), steps=None)

    def test_fills_in_what_is_not_given(self, preset: Job) -> None:
        made = generate(dataclasses.replace(preset, methods={"hidiffusion": {}})).job
        assert (made.width, made.height, made.steps, made.guidance) == (128, 128, 3, 2.5)
        assert made.methods["hidiffusion"]["t1"] == 0.9

    @pytest.mark.parametrize(("side", "t1"), [(None, 0.9), (256, 0.9), (384, 1.0), (512, 1.0)])
    def test_may_differ_for_large_pictures(self, side: int | None, t1: float) -> None:
        large = {"3": {"hidiffusion": {"t1": 1.0}}}
        preset = Preset(native_side=128, methods={"hidiffusion": {"t1": 0.9}}, methods_from=large)
        assert preset.settings_of("hidiffusion", side, side) == {"t1": t1}

    def test_yields_to_what_is_given(self, preset: Job) -> None:
        asked = dataclasses.replace(preset, width=64, steps=1, guidance=1.0, methods={"hidiffusion": {"t1": 0.5}})
        made = generate(asked).job
        assert (made.width, made.height, made.steps, made.guidance) == (64, 128, 1, 1.0)
        assert made.methods["hidiffusion"]["t1"] == 0.5

    def test_that_cannot_be_read_is_named(self, preset: Job) -> None:
        Path(preset.model, "attnswap.json").write_text("{")
        with pytest.raises(BadInput, match=r"attnswap\.json"):
            generate(preset)

    @pytest.mark.parametrize(
        "routes",
        [{"ladder": []}, {"ladder": 0.4}, {"ladder": ["much"]}, {"ladder": [True]}, {"superres": [0.3, 2]}, [], None],
    )
    def test_with_routes_that_are_none_is_named(self, preset: Job, routes: object) -> None:
        Path(preset.model, "attnswap.json").write_text(json.dumps({"routes": routes}))
        with pytest.raises(BadInput, match=r"attnswap\.json is no preset: route"):
            presets.read(Path(preset.model))


class TestRecord:
    def test_holds_all_that_made_the_picture(self, job: Job) -> None:
        generate(dataclasses.replace(job, width=128, height=128, methods={"hidiffusion": {"windows": (4, 4)}}))
        record = save.read_record(job.output)
        assert record["prompt"] == "a fox"
        assert record["steps"] == 2
        assert record["guidance"] == 7.5
        assert record["dtype"] == "float32"
        assert record["methods"]["hidiffusion"]["windows"] == [4, 4]
        assert record["methods"]["hidiffusion"]["active_above"] == 1.5  # defaults too: they may change
        assert set(record["versions"]) >= {"attnswap", "torch", "diffusers"}

    def test_is_a_job_again(self, job: Job) -> None:
        first = generate(dataclasses.replace(job, methods={"hidiffusion": {}}))
        again = Job(**from_record(save.read_record(job.output)), output=job.output)
        assert dataclasses.replace(again, device=first.job.device) == first.job

    @pytest.mark.parametrize(
        ("field", "value"),
        [("prompt", 7), ("width", "64"), ("width", True), ("seed", None), ("methods", []), ("methods", {"a": 1})],
    )
    def test_written_by_anybody_is_checked(self, job: Job, field: str, value: object) -> None:
        record: dict[str, Any] = generate(job).record | {field: value}
        with pytest.raises(BadInput, match=field):
            from_record(record)

    def test_with_an_unknown_dtype_is_refused(self, job: Job) -> None:
        record: dict[str, Any] = generate(job).record | {"dtype": "int8"}
        with pytest.raises(BadInput, match=r"int8.*fp16"):
            generate(Job(**from_record(record), output=job.output))

    @pytest.mark.parametrize("field", RECORDED)
    def test_with_a_field_missing_is_refused(self, job: Job, field: str) -> None:
        record = dict.fromkeys(RECORDED, 0)
        del record[field]
        with pytest.raises(BadInput, match="metadata"):
            from_record(record)


@pytest.mark.parametrize("field", ["guidance", "true_cfg"])
@pytest.mark.parametrize("value", [10**400, float("inf"), float("nan"), -1], ids=["huge", "inf", "nan", "negative"])
def test_a_scale_that_is_none_is_refused(job: Job, field: str, value: float) -> None:
    with pytest.raises(BadInput, match=f"{field.replace('_', '-')} .*is out of range"):
        generate(dataclasses.replace(job, **{field: value}))


class TestFailure:
    def test_not_a_number_in_the_latents_stops_at_that_step(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        from diffusers import UNet2DConditionModel

        def forward(_self: object, sample: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
            return (torch.full_like(sample, float("nan")),)

        monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
        with pytest.raises(JobFailed, match=r"not-a-number in the latents after step 1 of 2 in bfloat16\. Try --dtype"):
            generate(dataclasses.replace(job, dtype="bf16"))
        assert not job.output.exists()

    def test_not_a_number_in_the_decoded_picture(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        decode_to(monkeypatch, float("nan"))
        with pytest.raises(JobFailed, match="not-a-number in the decoded picture"):
            generate(job)
        assert not job.output.exists()

    def test_a_black_picture(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        decode_to(monkeypatch, -1.0)
        with pytest.raises(JobFailed, match="black"):
            generate(job)
        assert not job.output.exists()

    def test_a_full_disk(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(save, "write_png", full)
        with pytest.raises(JobFailed, match="No space left"):
            generate(job)

    def test_leaves_the_old_picture_alone(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        generate(job)
        before = job.output.read_bytes()
        decode_to(monkeypatch, -1.0)
        with pytest.raises(JobFailed):
            generate(job)
        assert job.output.read_bytes() == before


class TestSizes:
    """U-Nets take multiples of 8 whatever their autoencoder; DiTs what autoencoder and patches multiply to."""

    class Part:
        def __init__(self, **config: object) -> None:
            self.config = type("Config", (), config)()

    def pipe(self, vae: int, processor: int, **parts: object) -> Any:
        fields = {"vae_scale_factor": vae, "image_processor": self.Part(vae_scale_factor=processor), **parts}
        return type("Pipe", (), fields)()

    def test_unet(self) -> None:
        assert size_multiple(self.pipe(8, 8, unet=self.Part())) == 8
        assert size_multiple(self.pipe(4, 4, unet=self.Part())) == 8

    def test_dit_that_patches(self) -> None:
        assert size_multiple(self.pipe(8, 8, transformer=self.Part(patch_size=2))) == 16

    def test_dit_whose_pipeline_packs(self) -> None:
        assert size_multiple(self.pipe(8, 16, transformer=self.Part(patch_size=1))) == 16


def test_a_pipeline_that_animates_a_picture_is_refused(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    class WanImageToVideoPipeline:
        def __call__(self, image: object, prompt: str, num_frames: int) -> None: ...

    monkeypatch.setattr(load, "load", lambda *_, **__: WanImageToVideoPipeline())
    with pytest.raises(BadInput, match="WanImageToVideoPipeline, which does not make a clip from a prompt"):
        generate(job)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the peaks of processes apart")
def test_the_peak_memory_is_not_that_of_the_process_that_started_this_one():
    held = torch.ones(2**29, dtype=torch.uint8)  # 512 MiB that the other process never has
    code = "import torch; from attnswap.pipelines import run; print(run.peak_bytes(torch.device('cpu')))"
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    here = run.peak_bytes(torch.device("cpu"))
    assert here is not None
    assert here > held.numel()
    assert 2**20 < int(other.stdout) < here - held.numel() // 2
