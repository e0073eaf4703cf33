"""What the model card of `emoji-flux` says, checked again: stock classes, size, accuracy, colours, image-to-image."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from attnswap.pipelines import load, presets
from attnswap.pipelines.emoji_reference import Reference, caption, judge, psnr
from attnswap.pipelines.generate import generate
from attnswap.pipelines.job import Job
from attnswap.pipelines.render import image_to_image
from attnswap.training import emoji_evaluate
from PIL import Image

FOLDER = load.BUNDLED / "emoji-flux"
ASKED = [
    ("fox", "blue"),
    ("banana", "purple"),
    ("owl", "orange"),
    ("broccoli", None),
    ("shark", "yellow"),
    ("egg", "red"),
]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.load(FOLDER / "reference")


@pytest.fixture(scope="module")
def pipe():
    return emoji_evaluate.load(FOLDER)


@pytest.fixture(scope="module")
def asked(reference: Reference) -> list[tuple[int, str | None]]:
    return [(reference.names.index(name), colour) for name, colour in ASKED]


@pytest.fixture(scope="module")
def pictures(pipe, reference: Reference) -> np.ndarray:
    chosen = presets.read(FOLDER)
    prompts = [caption(name, colour) for name, colour in ASKED]
    return emoji_evaluate.generate(pipe, prompts, reference.side, chosen.steps, chosen.guidance, max_sequence_length=16)


def test_draws_what_is_asked_on_the_asked_colour(pictures, asked, reference: Reference) -> None:
    score = judge(pictures, asked, reference)
    assert (score.nearest, score.colour) == (1, 1)


def test_classes_are_stock() -> None:
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline"
    classes = {name: tuple(value) for name, value in index.items() if isinstance(value, list) and value[0]}
    assert classes == {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "T5Tokenizer"),
        "transformer": ("diffusers", "FluxTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderTiny"),
    }


def test_has_blocks_of_both_kinds_and_no_embedded_guidance(pipe) -> None:
    transformer = pipe.transformer
    assert (len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)) == (2, 6)
    assert sum(transformer.config.axes_dims_rope) == transformer.config.attention_head_dim == 64
    assert not transformer.config.guidance_embeds


def test_autoencoder_is_the_one_of_emoji_sd() -> None:
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (FOLDER / weights).read_bytes() == (load.BUNDLED / "emoji-sd" / weights).read_bytes()


def test_autoencoder_on_the_data(pipe, reference: Reference) -> None:
    some = emoji_evaluate.reference_pictures(reference)[::64]
    assert psnr(emoji_evaluate.through_autoencoder(pipe.vae, some), some) >= 31


def test_native_size_is_the_references_and_its_tokens_are_few(reference: Reference, pipe) -> None:
    preset = presets.read(FOLDER)
    assert preset.native_side == reference.side == 128
    assert (preset.native_side // (2 * pipe.vae_scale_factor)) ** 2 >= 256  # image tokens, 2 x 2 latents each
    assert preset.max_sequence_length == 16 == pipe.tokenizer_2.model_max_length == pipe.tokenizer.model_max_length


def test_vocabulary(pipe, reference: Reference) -> None:
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        for name in reference.names:
            ids = tokenizer(caption(name, "orange")).input_ids
            assert len(ids) <= 16
            assert tokenizer.unk_token_id not in tokenizer(name, add_special_tokens=False).input_ids
    for name in reference.names:
        assert len(pipe.tokenizer_2(name).input_ids) == len(name.split()) + 1


def test_default_load_is_all_one_dtype() -> None:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(FOLDER, local_files_only=True)
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert {next(part.parameters()).dtype for part in parts} == {torch.float32}


def test_the_command_line_default_is_the_judged_picture(tmp_path: Path, pictures) -> None:
    """Same prompt, seed and settings: the job pads the prompt to the preset's few tokens."""
    name, colour = ASKED[0]
    result = generate(Job(prompt=caption(name, colour), output=tmp_path / "fox.png", model="emoji-flux"))
    assert result.image.size == (128, 128)
    again = np.asarray(result.image, np.float32) / 255
    assert psnr(again, pictures[0]) > 40


@pytest.fixture
def drawn_again(pipe) -> Callable[[np.ndarray, str], np.ndarray]:
    def draw(picture: np.ndarray, prompt: str) -> np.ndarray:
        return image_to_image(pipe)(
            prompt,
            image=Image.fromarray((picture * 255).round().astype(np.uint8)),
            width=128,
            height=128,
            strength=0.5,
            num_inference_steps=8,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images[0]

    return draw


def test_image_to_image_stays_near_its_picture(drawn_again, reference: Reference) -> None:
    name, colour = ASKED[0]
    before = reference.compose(name, colour)
    assert psnr(drawn_again(before, caption(name, colour)), before) > 20


def test_files_are_safe_and_small() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".txt", ".png", ".md", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 20e6
