"""What the model card of `emoji-video` says, checked again: stock classes, size, tokens, subjects, motions, scale."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from attnswap.pipelines import load, presets
from attnswap.pipelines.emoji_reference import Reference, psnr
from attnswap.training import emoji_evaluate, emoji_video_export
from attnswap.training.emoji_video_clips import Ask, clip_caption, compose
from attnswap.training.emoji_video_evaluate import generate, through_autoencoder
from attnswap.training.emoji_video_judge import judge

FOLDER = load.BUNDLED / "emoji-video"
ASKED = [("fox", "moving right", "purple"), ("penguin", "moving up", "yellow"), ("cactus", "growing", "yellow")]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.load(FOLDER / "reference")


@pytest.fixture(scope="module")
def pipe():
    return emoji_evaluate.load(FOLDER)


@pytest.fixture(scope="module")
def asks(reference: Reference) -> list[Ask]:
    return [(reference.names.index(name), motion, colour) for name, motion, colour in ASKED]


def test_shows_what_is_asked_and_moves_it_that_way(pipe, asks: list[Ask], reference: Reference) -> None:
    prompts = [clip_caption(*asked) for asked in ASKED]
    clips = generate(pipe, prompts, emoji_evaluate.settings(FOLDER), num_inference_steps=4)
    assert clips.shape == (3, 17, 96, 96, 3)
    score = judge(clips, asks, reference)
    assert (score.nearest, score.motion, score.colour) == (1, 1, 1)


def test_classes_are_stock() -> None:
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    classes = {name: tuple(value) for name, value in index.items() if isinstance(value, list) and value[0]}
    assert classes == {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "UMT5EncoderModel"),
        "tokenizer": ("transformers", "T5Tokenizer"),
        "transformer": ("diffusers", "WanTransformer3DModel"),
        "vae": ("diffusers", "AutoencoderKLWan"),
    }


def latents_of(pipe, **size: int) -> torch.Tensor:
    """What one step makes of a prompt."""
    with torch.no_grad():
        return pipe(
            "a fox turning on a blue background",
            num_inference_steps=1,
            guidance_scale=1.0,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **size,
        ).frames


def test_an_attention_call_sees_1296_tokens(pipe) -> None:
    seen: list[int] = []
    handle = pipe.transformer.blocks[0].attn1.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[1])
    )
    latents_of(pipe, height=96, width=96, num_frames=17)
    handle.remove()
    assert seen == [1296]


@pytest.mark.parametrize("size", [{"height": 96, "width": 96, "num_frames": 65}, {"height": 192, "width": 192}])
def test_runs_at_four_times_the_frames_and_twice_the_size(pipe, size: dict[str, int]) -> None:
    size = {"num_frames": 17, **size}
    latents = latents_of(pipe, **size)
    assert latents.shape == (1, 32, (size["num_frames"] + 1) // 2, size["height"] // 8, size["width"] // 8)
    assert latents.isfinite().all()


def test_autoencoder_on_the_data(pipe, asks: list[Ask], reference: Reference) -> None:
    for ask in asks:
        clip = compose(reference, ask)
        assert psnr(through_autoencoder(pipe.vae, clip), clip) >= 24


def test_latents_have_the_scale_the_configuration_says(pipe, asks: list[Ask], reference: Reference) -> None:
    """None is applied: mean square 1 over all channels is what the transformer was trained on."""
    clips = np.stack([compose(reference, ask) for ask in asks])
    with torch.no_grad():
        latents = pipe.vae.encode(torch.from_numpy(clips).permute(0, 4, 1, 2, 3) * 2 - 1).latent_dist.mode()
    assert set(pipe.vae.config.latents_mean) == {0.0}
    assert set(pipe.vae.config.latents_std) == {1.0}
    assert 0.5 < latents.square().mean() < 2


def test_half_precision_does_not_overflow(asks: list[Ask], reference: Reference) -> None:
    pipe = emoji_evaluate.load(FOLDER, dtype=torch.float16)
    clip = torch.from_numpy(compose(reference, asks[0])).permute(3, 0, 1, 2)[None, :, :5].half() * 2 - 1
    with torch.no_grad():
        assert pipe.vae.decode(pipe.vae.encode(clip).latent_dist.mode()).sample.isfinite().all()
    assert latents_of(pipe, height=32, width=32, num_frames=5).isfinite().all()


def test_native_settings(reference: Reference, pipe) -> None:
    preset = presets.read(FOLDER)
    about = json.loads((FOLDER / "attnswap.json").read_text())
    assert preset.native_side == reference.side == 96
    assert (about["frames"], about["fps"]) == (17, 8)
    assert preset.max_sequence_length == 16 == pipe.tokenizer.model_max_length
    assert preset.settings_of("adaspa")["min_tokens"] < 1296
    assert about == emoji_video_export.preset(reference, preset.steps, preset.guidance)


def test_vocabulary(pipe, reference: Reference) -> None:
    for name in reference.names:
        caption = clip_caption(name, "moving right", "orange")
        ids = pipe.tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 1 <= 16
        assert pipe.tokenizer.unk_token_id not in ids


def test_default_load_is_all_one_dtype() -> None:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(FOLDER, local_files_only=True)
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder)
    assert {next(part.parameters()).dtype for part in parts} == {torch.float32}


def test_files_are_safe_and_small() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".png", ".md", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 20e6
