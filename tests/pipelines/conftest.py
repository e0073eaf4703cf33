"""Tiny random pipelines with text encoders, as folders and in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_sdxl(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random StableDiffusionXLPipeline of SDXL's block structure: 64 px native, 8x autoencoder."""
    from attnswap.pipelines import load
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    small = load.load(load.find(str(tiny_sd)), dtype=torch.float32)
    torch.manual_seed(1)
    text = {**small.text_encoder.config.to_dict(), "projection_dim": 16}
    pipe = StableDiffusionXLPipeline(
        vae=small.vae,
        text_encoder=small.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text)),
        tokenizer=small.tokenizer,
        tokenizer_2=small.tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 3),
            cross_attention_dim=32,
            attention_head_dim=(1, 2, 2),
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 16,
        ),
        scheduler=EulerDiscreteScheduler(),
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def sd(tiny_sd: Path) -> Any:
    return _quiet(tiny_sd)


@pytest.fixture
def sdxl(tiny_sdxl: Path) -> Any:
    return _quiet(tiny_sdxl)


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def _quiet(folder: Path) -> Any:
    from attnswap.pipelines import load

    pipe = load.load(load.find(str(folder)), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe
