"""Pipelines beyond the families that are known by name: each works, or is refused in one line before its first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attnswap.pipelines import clip, load, resolve, run
from attnswap.pipelines.errors import BadInput, JobFailed
from attnswap.pipelines.generate import generate
from attnswap.pipelines.job import Job
from attnswap.pipelines.presets import Preset
from torch import nn

Made = Callable[[Any], Path]


@pytest.fixture
def saved(tmp_path: Path) -> Made:
    def save(pipe: Any) -> Path:
        pipe.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.fixture
def text(tiny_flux: Path) -> dict[str, Any]:
    """A T5 that reads prompts."""
    flux = load.load(load.find(str(tiny_flux)), dtype=torch.float32)
    return {"tokenizer": flux.tokenizer_2, "text_encoder": flux.text_encoder_2}


def sizes_run(pipeline_part: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of what the denoiser sees, at each call to come."""
    seen: list[tuple[int, ...]] = []
    forward = pipeline_part.forward

    def watched(self: Any, hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        seen.append(tuple(hidden_states.shape))
        return forward(self, hidden_states, *arguments, **named)

    monkeypatch.setattr(pipeline_part, "forward", watched)
    return seen


def test_pixart_runs_at_the_size_asked_for(
    sd: Any, text: dict[str, Any], saved: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pipeline would run at the nearest of a list of sizes, and enlarge that."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=32,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=16,
        use_additional_conditions=False,
    )
    parts = {"vae": sd.vae, "transformer": transformer, "scheduler": DPMSolverMultistepScheduler()}
    folder = saved(pipe := PixArtAlphaPipeline(**text, **parts))
    assert resolve.complete(Job("a fox"), pipe, Preset(), torch.float32)[0].width == 256
    seen = sizes_run(PixArtTransformer2DModel, monkeypatch)
    result = generate(Job("a fox", output=tmp_path / "fox.png", model=str(folder), steps=2, width=64, height=48))
    assert result.image is not None
    assert result.image.size == (64, 48)
    assert {shape[2:] for shape in seen} == {(6, 8)}


def test_steps_of_pipelines_without_a_callback_are_seen(
    sd: Any, saved: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionSAGPipeline

    after_step, seen = run.Runner._after_step, list[int]()

    def watched(self: Any, stage: Any, step: int, latents: torch.Tensor) -> None:
        seen.append(step)
        after_step(self, stage, step, latents)

    monkeypatch.setattr(run.Runner, "_after_step", watched)
    parts = {name: getattr(sd, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    pipe = StableDiffusionSAGPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    generate(Job("a fox", output=tmp_path / "fox.png", model=str(saved(pipe)), steps=3))
    assert seen == [1, 2, 3]


@pytest.mark.parametrize(
    ("output", "says"),
    [(SimpleNamespace(rgb=1), "gives no images"), (SimpleNamespace(images=[]), "gives images as list")],
)
def test_what_is_no_picture_is_one_line(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: Any, says: str
) -> None:
    monkeypatch.setattr(run.Runner, "_call", lambda *_, **__: output)
    with pytest.raises(JobFailed, match=f"StableDiffusionPipeline {says}; of that nothing can be written"):
        generate(Job("a fox", output=tmp_path / "fox.png", model=str(tiny_sd)))


def test_kontext_makes_the_size_asked_for_of_a_prompt(tiny_flux: Path, saved: Made, tmp_path: Path) -> None:
    """Its pipeline would make a megapixel."""
    from diffusers import FluxKontextPipeline

    folder = saved(FluxKontextPipeline(**load.load(load.find(str(tiny_flux)), dtype=torch.float32).components))
    job = Job("a fox", tmp_path / "fox.png", str(folder), steps=1, width=32, height=48, max_sequence_length=8)
    result = generate(job)
    assert result.image is not None
    assert result.image.size == (32, 48)


def test_pipelines_that_take_any_keyword_make_clips(sd: Any, saved: Made, tmp_path: Path) -> None:
    from diffusers import AnimateDiffPipeline, MotionAdapter

    adapter = MotionAdapter(
        block_out_channels=(16, 16, 16, 16),
        motion_layers_per_block=2,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        motion_mid_block_layers_per_block=1,
    )
    parts = {name: getattr(sd, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    folder = saved(AnimateDiffPipeline(**parts, motion_adapter=adapter))
    job = Job("a fox", frames_dir=tmp_path / "frames", model=str(folder), steps=1, frames=4)
    result = generate(job)
    assert len(list((tmp_path / "frames").iterdir())) == 4
    assert (result.job.width, result.job.height, result.job.fps) == (64, 64, 8)
    assert "decoded whole" in result.notices[0]


def test_what_a_pipeline_stumbles_over_before_its_first_step_is_one_line(
    sd: Any, saved: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumbling(module: str) -> Any:
        names: dict[str, Any] = {"__name__": module}
        exec("def stumble(*_, **__):\n    raise AttributeError('no attribute\\nshape')", names)
        return names["stumble"]

    job = Job("a fox", output=tmp_path / "fox.png", model=str(saved(sd)))
    monkeypatch.setattr(type(sd), "encode_prompt", stumbling("diffusers.pipelines"))
    with pytest.raises(BadInput, match=r"^StableDiffusionPipeline stopped before its first step: no attribute shape$"):
        generate(job)
    # But a defect of ours is seen whole.
    monkeypatch.setattr(type(sd), "encode_prompt", stumbling(resolve.__name__))
    with pytest.raises(AttributeError):
        generate(job)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("StableDiffusionInpaintPipeline", "is made for a mask to begin with"),
        ("WanVideoToVideoPipeline", "is made for a video to begin with"),
        ("KandinskyV22Pipeline", "does not make a picture from a prompt"),
        ("StableVideoDiffusionPipeline", "does not make a clip from a prompt"),
        ("IFPipeline", "has no autoencoder of the kind that is known here"),
        ("AudioLDM2Pipeline", "makes neither pictures nor clips"),
        ("CogVideoXVideoToVideoPipeline", "is made for a video to begin with"),
        ("WanAnimatePipeline", r"from a prompt alone: it needs face_video, pose_video, too"),
        ("LTXImageToVideoPipeline", "begins with a picture: give --image"),
        ("StableDiffusionControlNetPipeline", "begins with a picture: give --image"),
        ("QwenImageEditPipeline", "begins with a picture: give --image"),
    ],
)
def test_what_makes_nothing_of_a_prompt_is_refused_by_what_it_is(name: str, says: str) -> None:
    import diffusers

    pipe = object.__new__(getattr(diffusers, name))
    if name != "IFPipeline":
        vars(pipe)["vae"] = None
    with pytest.raises(BadInput, match=f"model is a {name}, which .*{says}"):
        resolve.complete(Job("a fox", model="model"), pipe, Preset(native_side=64), torch.float32)


def test_how_fast_clips_are_may_be_a_pipelines_default() -> None:
    import diffusers

    assert clip.native_fps(object.__new__(diffusers.LTXConditionPipeline)) == 25
