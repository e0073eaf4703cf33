"""A clip end to end: the very frames that Diffusers makes, what it remembers, and what counts as a failure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attnswap.pipelines import clip, film, load, presets, run, save
from attnswap.pipelines.errors import BadInput, JobFailed
from attnswap.pipelines.generate import generate
from attnswap.pipelines.job import Job, from_record
from attnswap.pipelines.routes import Stage
from PIL import Image

from ..accel import tiny_dit


@pytest.fixture
def job(tiny_wan: Path, tmp_path: Path) -> Job:
    return Job(prompt="a fox", output=tmp_path / "fox.gif", frames_dir=tmp_path / "frames", model=str(tiny_wan))


def frames_of(job: Job) -> np.ndarray:
    assert job.frames_dir is not None
    return np.stack([np.asarray(Image.open(file)) for file in sorted(job.frames_dir.iterdir())])


def rounded(pixels: torch.Tensor) -> np.ndarray:
    """[F, 3, H, W] in 0..1 → [F, H, W, 3]."""
    return (pixels.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)


class TestClip:
    def test_is_the_one_that_diffusers_makes(self, job: Job) -> None:
        pipe = load.load(load.find(job.model), dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        expected = pipe(
            "a fox",
            height=32,
            width=48,
            num_frames=11,
            num_inference_steps=2,
            guidance_scale=2.0,
            max_sequence_length=8,
            generator=torch.Generator("cpu").manual_seed(5),
            output_type="pt",
        ).frames[0]
        result = generate(dataclasses.replace(job, seed=5, width=48, frames=11))
        assert result.image is None
        assert np.array_equal(frames_of(job), rounded(expected))

    def test_has_the_native_length_rate_and_size_unless_told_otherwise(self, job: Job) -> None:
        made = generate(job).job
        assert (made.frames, made.fps, made.width, made.height) == (9, 8, 32, 32)
        with Image.open(job.output) as image:  # type: ignore[arg-type]
            assert image.n_frames == 9

    def test_is_decoded_in_tiles_on_request(self, job: Job) -> None:
        generate(dataclasses.replace(job, width=320, steps=1, frames=3))
        whole = frames_of(job)
        assert job.output is not None
        apart = dataclasses.replace(job, frames_dir=job.output.with_name("apart"), vae_tiling=True)
        generate(dataclasses.replace(apart, width=320, steps=1, frames=3))
        tiled = frames_of(apart)
        assert tiled.shape == whole.shape
        assert not np.array_equal(tiled, whole)
        assert np.abs(tiled.astype(int) - whole).mean() < 4

    def test_is_made_again_from_its_own_record(self, job: Job) -> None:
        generate(dataclasses.replace(job, fps=Fraction(24000, 1001), seed=3))
        assert job.output is not None
        again = job.output.with_name("again.gif")
        record = save.read_record(job.output)
        assert (record["frames"], record["fps"]) == (9, "24000/1001")
        generate(Job(**from_record(record), output=again))
        assert again.read_bytes() == job.output.read_bytes()

    def test_may_be_frames_alone(self, job: Job) -> None:
        generate(dataclasses.replace(job, output=None))
        assert job.frames_dir is not None
        assert [path.name for path in job.frames_dir.parent.iterdir()] == ["frames"]


class TestOtherFamilies:
    """Each scales its latents in a way of its own, and hands its autoencoder other arguments."""

    @pytest.mark.parametrize("family", ["wan", "hunyuan_video", "cogvideox", "ltx"])
    def test_have_the_frames_that_diffusers_makes(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        pipe, arguments = tiny_dit.PIPELINES[family]()
        text = {name: value for name, value in arguments.items() if "prompt" in name}
        expected = pipe(
            **{**arguments, "num_inference_steps": 2, "generator": torch.Generator("cpu").manual_seed(0)},
            output_type="pt",
        ).frames[0]
        # These have no text encoders: what is asked for in words is answered with the same embeddings.
        monkeypatch.setattr(film.Film, "_call", _with(text))
        width, height, frames = (arguments[name] for name in ("width", "height", "num_frames"))
        guidance = arguments.get("guidance_scale", 6.0)
        job = Job("a fox", frames=frames, fps=Fraction(25), steps=2, guidance=guidance, dtype="float32")
        stage, heard = Stage(1, 1, width, height, 2), list[str]()
        shown = run.Progress((stage,), shown=False)
        shooting = film.Film(pipe, [job], torch.device("cpu"), progress=shown, say=heard.append)
        [found] = [list(frames) for frames in shooting.shoot(stage)]
        assert np.array_equal(np.stack(found), rounded(expected))
        assert heard == []
        assert "decode" not in vars(pipe.vae)

    def test_that_nobody_knows_are_decoded_whole_and_that_is_said(
        self, job: Job, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        known = dataclasses.replace(job, output=None)
        generate(known)
        monkeypatch.setattr(film, "DECODE_LAST", ())
        apart = Path(f"{job.frames_dir}-whole")
        result = generate(dataclasses.replace(known, frames_dir=apart))
        assert result.notices == (
            "WanPipeline with AutoencoderKLWan: decoded whole, so memory grows with the number of frames.",
        )
        assert np.array_equal(frames_of(dataclasses.replace(known, frames_dir=apart)), frames_of(known))

    def test_that_make_sound_have_it_left_out_and_that_is_said(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        call = run.Runner._call

        def with_sound(*arguments: Any, **more: Any) -> SimpleNamespace:
            return SimpleNamespace(frames=call(*arguments, **more).frames, audio=torch.zeros(1, 2, 100))

        monkeypatch.setattr(film.Film, "_call", with_sound)
        result = generate(dataclasses.replace(job, output=None, steps=1, frames=3))
        assert result.notices == ("WanPipeline makes sound, too, which is left out.",)


def _with(text: dict[str, Any]) -> Callable[..., Any]:
    call = run.Runner._call
    return lambda self, pipe, stage, **more: call(self, pipe, stage, prompt=None, **text, **more)


class TestWindows:
    def test_make_a_long_clip_of_short_ones(self, job: Job) -> None:
        result = generate(dataclasses.replace(job, frames=21, route="windows"))
        assert len(frames_of(job)) == 21
        assert (result.job.window, result.job.overlap) == (9, 4)
        assert result.notices == ("3 windows of 9 frames, 4 shared: 3 times the calls of one.",)

    def test_of_which_one_is_enough_are_none(self, job: Job) -> None:
        generate(dataclasses.replace(job, output=None))
        apart = dataclasses.replace(job, output=None, frames_dir=Path(f"{job.frames_dir}-windows"), route="windows")
        assert "covers all 9" in generate(apart).notices[0]
        assert np.array_equal(frames_of(apart), frames_of(job))


class TestFailure:
    def decode_to(self, monkeypatch: pytest.MonkeyPatch, last: float) -> None:
        """Frames of 0 and, the last two, of another value, each in -1..1."""
        from diffusers import AutoencoderKLWan

        decoded: list[int] = []

        def decode(_self: object, latents: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
            decoded.append(1)
            value = last if len(decoded) == 5 else -1.0
            return (torch.full((1, 3, 2, 32, 32), value),)

        monkeypatch.setattr(AutoencoderKLWan, "decode", decode)

    def test_not_a_number_in_a_late_frame(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decode_to(monkeypatch, float("nan"))
        with pytest.raises(JobFailed, match=r"not-a-number in the decoded frames in bfloat16\. Try --dtype"):
            generate(dataclasses.replace(job, dtype="bf16"))
        assert job.output is not None
        assert list(job.output.parent.iterdir()) == []

    def test_a_clip_that_is_black_all_over(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decode_to(monkeypatch, -1.0)
        with pytest.raises(JobFailed, match="black all over"):
            generate(job)
        assert job.output is not None
        assert list(job.output.parent.iterdir()) == []

    def test_but_a_black_beginning_is_none(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decode_to(monkeypatch, 1.0)
        generate(job)
        assert frames_of(job)[-1].min() == 255

    def test_out_of_memory_while_decoding(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        from diffusers import AutoencoderKLWan

        def decode(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(AutoencoderKLWan, "decode", decode)
        with pytest.raises(JobFailed, match=r"out of memory at 32x32, 9 frames, on cpu after 2 steps\. Try .*fewer"):
            generate(job)


class TestAPipelineSays:
    def test_how_many_frames_its_autoencoder_can_make(self) -> None:
        pipe = type("HunyuanVideoPipeline", (), {"vae_scale_factor_temporal": 4})()
        for frames in (1, 5, 129):
            clip.check_frames(frames, pipe)
        with pytest.raises(BadInput, match=r"frames 130 is not 4n \+ 1, which this model needs; nearest: 129"):
            clip.check_frames(130, pipe)

    @pytest.mark.parametrize(("small", "fps"), [(False, 16), (True, 24)])
    def test_how_fast_its_clips_are(self, small: bool, fps: int) -> None:
        pipe = type("WanPipeline", (), {"config": SimpleNamespace(expand_timesteps=small)})()
        assert clip.native_fps(pipe) == fps

    def test_where_its_positions_end(self) -> None:
        config = SimpleNamespace(patch_size=(1, 2, 2), rope_max_seq_len=64)
        factors = {"vae_scale_factor_temporal": 4, "vae_scale_factor_spatial": 8}
        pipe = SimpleNamespace(transformer=SimpleNamespace(config=config), **factors)
        clip.check_positions(253, 1024, 1024, pipe)
        with pytest.raises(BadInput, match=r"frames 257 is more than 253, .*--route windows"):
            clip.check_positions(257, 1024, 1024, pipe)
        with pytest.raises(BadInput, match="width 1040 is more than 1024"):
            clip.check_positions(253, 1040, 1024, pipe)

    @pytest.mark.parametrize(("patch", "multiple"), [((1, 2, 2), 16), (2, 16), (None, 8)])
    def test_which_sizes_it_can_make(self, patch: object, multiple: int) -> None:
        config = SimpleNamespace(patch_size=patch) if patch else SimpleNamespace()
        pipe = SimpleNamespace(vae_scale_factor_spatial=8, transformer=SimpleNamespace(config=config))
        assert clip.size_multiple(pipe) == multiple


class TestFps:
    @pytest.mark.parametrize(
        ("text", "fps"),
        [
            ("16", Fraction(16)),
            ("24000/1001", Fraction(24000, 1001)),
            ("23.976", Fraction(24000, 1001)),
            ("29.97", Fraction(30000, 1001)),
            ("59.94", Fraction(60000, 1001)),
            ("12.5", Fraction(25, 2)),
            ("24.0", Fraction(24)),
        ],
    )
    def test_is_exact(self, text: str, fps: Fraction) -> None:
        assert clip.parse_fps(text) == fps

    @pytest.mark.parametrize("text", ["fast", "0", "-8", "1/0", "1000", "nan", "inf", "", "1e9", "1e-99999999"])
    def test_that_is_none_is_refused(self, text: str) -> None:
        with pytest.raises(BadInput, match="fps"):
            clip.parse_fps(text)

    def test_that_is_too_fine_for_a_file_is_refused_as_such(self) -> None:
        with pytest.raises(
            BadInput, match="fps 2400007/100003 is a fraction too fine: its denominator is above 100000"
        ):
            clip.parse_fps("2400007/100003")

    @pytest.mark.parametrize("preset", [{"fps": "fast"}, {"frames": 0}, {"frames": "9"}])
    def test_of_a_preset_is_checked(self, tmp_path: Path, preset: dict[str, object]) -> None:
        (tmp_path / "attnswap.json").write_text(json.dumps(preset))
        with pytest.raises(BadInput, match=r"attnswap\.json is no preset: f"):
            presets.read(tmp_path)
