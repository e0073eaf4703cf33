"""Pipelines without weights: what they say of a job is what the loaded ones say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attnswap.accel.errors import UnsupportedModel
from attnswap.pipelines import clip, load, presets, resolve, settings, skeleton
from attnswap.pipelines.job import Job

BUNDLED = ("emoji-sd", "emoji-flux", "emoji-video")


@pytest.fixture(scope="session")
def tiny_sd3(tiny_sdxl: Path, tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

    clip_tokenizer = CLIPTokenizer.from_pretrained(tiny_sdxl / "tokenizer")
    clip_encoder = CLIPTextModelWithProjection.from_pretrained(tiny_sdxl / "text_encoder_2")
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL.from_pretrained(tiny_flux / "vae"),
        text_encoder=clip_encoder,
        text_encoder_2=clip_encoder,
        text_encoder_3=T5EncoderModel.from_pretrained(tiny_flux / "text_encoder_2"),
        tokenizer=clip_tokenizer,
        tokenizer_2=clip_tokenizer,
        tokenizer_3=T5Tokenizer.from_pretrained(tiny_flux / "tokenizer_2"),
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_ltx(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )
    from transformers import T5EncoderModel, T5Tokenizer

    pipe = LTXPipeline(
        transformer=LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False, False, False, False, False),
            upsample_residual=(False, False, False, False),
            upsample_factor=(1, 1, 1, 1),
            timestep_conditioning=False,
            patch_size=1,
            patch_size_t=1,
            encoder_causal=True,
            decoder_causal=False,
        ),
        tokenizer=T5Tokenizer.from_pretrained(tiny_flux / "tokenizer_2"),
        text_encoder=T5EncoderModel.from_pretrained(tiny_flux / "text_encoder_2"),
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-ltx"
    pipe.save_pretrained(folder)
    return folder


def _name(request: pytest.FixtureRequest, model: str) -> str:
    return model if model in BUNDLED else str(request.getfixturevalue(model))


def _complete(model: load.Model, pipe: Any, **asked: Any) -> Any:
    return resolve.complete(Job("a fox", model=model.name, **asked), pipe, presets.read(model.folder), torch.float32)


@pytest.mark.parametrize("model", [*BUNDLED, "tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_flux", "tiny_wan", "tiny_ltx"])
def test_a_skeleton_completes_a_job_as_the_loaded_pipeline_does(request: pytest.FixtureRequest, model: str) -> None:
    found = load.find(_name(request, model))
    loaded, empty = load.load(found, dtype=torch.float32), skeleton.skeleton_pipe(found)
    assert type(empty) is type(loaded)
    assert _complete(found, empty) == _complete(found, loaded)
    if clip.frames_argument(loaded):
        asked: dict[str, Any] = {"frames": 33, "width": 64, "height": 96, "route": "windows", "window": 17}
    else:
        asked = {"width": 128, "height": 256, "route": "ladder"}
    assert _complete(found, empty, **asked) == _complete(found, loaded, **asked)


@pytest.mark.parametrize("model", BUNDLED)
def test_a_skeleton_refuses_what_the_loaded_pipeline_refuses(model: str) -> None:
    found = load.find(model)
    messages = []
    for pipe in (load.load(found, dtype=torch.float32), skeleton.skeleton_pipe(found)):
        with pytest.raises(ValueError, match="width 100 is not a multiple") as refused:
            _complete(found, pipe, width=100)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]


def test_no_weights_are_read(tiny_wan: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(tiny_wan)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    pipe = skeleton.skeleton_pipe(load.find(str(folder), weights=False))
    assert {part.device.type for part in (pipe.transformer, pipe.transformer_2, pipe.vae)} == {"meta"}
    assert pipe.text_encoder is None
    assert pipe.config.boundary_ratio == 0.8


def test_the_name_of_the_folder_counts_as_it_does_when_loaded(tiny_sdxl: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(tiny_sdxl)
    turbo = folder.rename(folder.with_name("some-sdxl-turbo"))
    found = load.find(str(turbo))
    from attnswap import inspect

    [config] = settings.build({"hidiffusion": {}})
    of_skeleton = inspect(skeleton.skeleton_pipe(found), config)
    assert of_skeleton == inspect(load.load(found, dtype=torch.float32), config)
    assert "sdxl-turbo" in of_skeleton.remarks[0]


def test_a_part_that_cannot_be_built_is_left_out(tiny_sd: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(tiny_sd)
    (folder / "vae" / "config.json").unlink()
    pipe = skeleton.skeleton_pipe(load.find(str(folder)))
    assert pipe.vae is None
    assert pipe.unet.device.type == "meta"


def test_a_class_that_cannot_go_without_is_named(tiny_wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import WanPipeline

    def refuse(self: WanPipeline, tokenizer: Any, **parts: Any) -> None:
        tokenizer("a fox")

    monkeypatch.setattr(WanPipeline, "__init__", refuse)
    with pytest.raises(UnsupportedModel, match="WanPipeline cannot be built without its weights: TypeError"):
        skeleton.skeleton_pipe(load.find(str(tiny_wan)))


def test_a_pipeline_class_that_diffusers_does_not_have_is_named(tiny_sd: Path) -> None:
    found = dataclasses.replace(load.find(str(tiny_sd)), pipeline="SomebodysPipeline")
    with pytest.raises(UnsupportedModel, match="SomebodysPipeline, which is no pipeline of Diffusers"):
        skeleton.skeleton_pipe(found)
