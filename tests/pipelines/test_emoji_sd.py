"""What the model card of `emoji-sd` says, checked again: stock classes, size, autoencoder, accuracy, colours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from attnswap.pipelines.emoji_reference import Reference, Score, caption, judge, psnr, sample_captions
from attnswap.training import emoji_evaluate

FOLDER = Path(emoji_evaluate.__file__).parents[1] / "pipelines" / "bundled" / "emoji-sd"
CAPTIONS = 60
SEED = 0


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.load(FOLDER / "reference")


@pytest.fixture(scope="module")
def pipe():
    return emoji_evaluate.load(FOLDER)


@pytest.fixture(scope="module")
def score(pipe, reference: Reference) -> Score:
    asked = sample_captions(reference, CAPTIONS, SEED)
    prompts = [caption(reference.names[subject], colour) for subject, colour in asked]
    chosen = emoji_evaluate.settings(FOLDER)
    pictures = emoji_evaluate.generate(pipe, prompts, reference.side, chosen["steps"], chosen["guidance"], SEED)
    return judge(pictures, asked, reference)


def test_nearest_neighbour_is_the_asked_subject(score: Score) -> None:
    assert score.count == CAPTIONS
    assert score.nearest >= 0.8


def test_background_is_the_asked_colour(score: Score) -> None:
    assert score.colour >= 0.8


def test_autoencoder_on_the_data(pipe, reference: Reference) -> None:
    data = emoji_evaluate.reference_pictures(reference)
    assert len(data) >= 7 * 100
    assert psnr(emoji_evaluate.through_autoencoder(pipe.vae, data), data) >= 26


def test_autoencoder_takes_larger_pictures(pipe) -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 0.5 * np.ones((1, 1), np.float32)), -1)[None]
    again = emoji_evaluate.through_autoencoder(pipe.vae, picture.astype(np.float32))
    assert again.shape == picture.shape
    assert psnr(again, picture) >= 24


def test_classes_are_stock() -> None:
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    classes = {name: tuple(value) for name, value in index.items() if isinstance(value, list) and value[0]}
    assert classes == {
        "scheduler": ("diffusers", "DDIMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderTiny"),
    }


def test_unet_has_the_blocks_of_sd15(pipe) -> None:
    config = pipe.unet.config
    assert tuple(config.down_block_types) == ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    assert tuple(config.up_block_types) == ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    assert config.layers_per_block == 2
    assert config.sample_size * pipe.vae_scale_factor == emoji_evaluate.settings(FOLDER)["native_side"]


def test_vocabulary(pipe, reference: Reference) -> None:
    tokenizer = pipe.tokenizer
    for name in reference.names:
        assert len(tokenizer(name, add_special_tokens=False).input_ids) == len(name.replace("-", " - ").split())
    for colour in reference.colours:
        ids = tokenizer(caption(reference.names[0], colour)).input_ids
        assert len(ids) <= tokenizer.model_max_length == 16
    assert tokenizer.unk_token_id not in tokenizer("Größe 日本 x9!?", add_special_tokens=False).input_ids


def test_dpm_solver_works_too(pipe, reference: Reference) -> None:
    from diffusers import DPMSolverMultistepScheduler

    other = type(pipe)(
        **{**pipe.components, "scheduler": DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)}
    )
    other.set_progress_bar_config(disable=True)
    asked = [(reference.names.index("fox"), "blue")]
    picture = emoji_evaluate.generate(other, [caption("fox", "blue")], 64, 12, 2.0)
    assert judge(picture, asked, reference).colour == 1


def test_default_load_is_all_one_dtype() -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, local_files_only=True)
    assert {next(part.parameters()).dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}


def test_files_are_safe_and_small() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".txt", ".png", ".md", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 20e6
