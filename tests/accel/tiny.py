"""Tiny random pipelines of stock classes: they test plumbing, not pictures."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

TEXT = 16


def sd15_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """Four levels, attention in all but the last, as in SD 1.5."""
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16, 16),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "cross_attention_dim": TEXT,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**config, **changes}).eval()


def sdxl_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """Three levels, attention in all but the first, two and more transformer blocks, as in SDXL."""
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "cross_attention_dim": TEXT,
        "attention_head_dim": (1, 2, 2),
        "norm_num_groups": 4,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + TEXT,
    }
    return UNet2DConditionModel(**{**config, **changes}).eval()


def vae(seed: int = 0, **changes: Any) -> AutoencoderKL:
    """Divides by eight, as the autoencoders of SD do."""
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "block_out_channels": (4, 4, 4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "layers_per_block": 1,
    }
    return AutoencoderKL(**{**config, **changes}).eval()


def sd15(unet: UNet2DConditionModel | None = None, scheduler: Any = None, cls: Any = None, **more: Any) -> Any:
    pipe = (cls or StableDiffusionPipeline)(
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        unet=unet or sd15_unet(),
        scheduler=scheduler or DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **more,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl(unet: UNet2DConditionModel | None = None, scheduler: Any = None, cls: Any = None, **more: Any) -> Any:
    pipe = (cls or StableDiffusionXLPipeline)(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet or sdxl_unet(),
        scheduler=scheduler or DDIMScheduler(),
        **more,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, *, side: int | tuple[int, int] = 16, steps: int = 5, seed: int = 0, **more: Any) -> torch.Tensor:
    """Latents after a run; `side` is that of the latent."""
    height, width = (side, side) if isinstance(side, int) else side
    text = torch.Generator().manual_seed(1)
    arguments: dict[str, Any] = {
        "prompt_embeds": torch.randn(1, 7, TEXT, generator=text),
        "negative_prompt_embeds": torch.randn(1, 7, TEXT, generator=text),
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "guidance_scale": 3.0,
    }
    if "image" not in more:
        arguments |= {"height": height * 8, "width": width * 8}
    if "XL" in type(pipe).__name__:
        arguments |= {
            "pooled_prompt_embeds": torch.randn(1, TEXT, generator=text),
            "negative_pooled_prompt_embeds": torch.randn(1, TEXT, generator=text),
        }
    images: torch.Tensor = pipe(**{**arguments, **more}).images
    return images
