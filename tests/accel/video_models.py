"""Tiny random transformers of Wan's and HunyuanVideo's families, and the arguments of a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from attnswap.accel.families.base import Place
from diffusers import (
    ChronoEditTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """A model class, or a way to call it.

    Attributes:
        make: a model, weights at random.
        inputs: the arguments of a call by grid, number of text tokens and batch.
        place: of the video tokens in every sequence of that call.
        layers: how many see video tokens.
    """

    name: str
    make: Callable[..., Any]
    inputs: Callable[[Grid, int, int], dict[str, Any]]
    place: Callable[[Grid, int], Place]
    layers: int


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _seeded(cls: Any, **config: Any) -> Any:
    torch.manual_seed(0)
    return cls(**config).eval()


def run(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The denoiser's output, `[B, C, F, H, W]`."""
    with torch.no_grad():
        output: torch.Tensor = model(**inputs, return_dict=False)[0]
    return output


def layer_inputs(model: Any, grid: Grid, batch: int = 2) -> tuple[torch.Tensor, Any]:
    """Video tokens and rotary positions, as a layer gets them."""
    frames, height, width = grid
    latent = noise(batch, model.config.in_channels, frames, 2 * height, 2 * width)
    tokens = noise(batch, frames * height * width, model.config.num_attention_heads * model.config.attention_head_dim)
    return tokens, model.rope(latent)


# Wan and what is built on it: patches of 1 x 2 x 2.

_WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
_WITH_IMAGE = {"image_dim": 8, "added_kv_proj_dim": 24}


def wan(**changes: Any) -> Any:
    return _seeded(WanTransformer3DModel, **{**_WAN, **changes})


def wan_i2v(**changes: Any) -> Any:
    return wan(**{**_WITH_IMAGE, **changes})


def wan_vace(**changes: Any) -> Any:
    return _seeded(WanVACETransformer3DModel, **{**_WAN, "vace_layers": [0, 1], "vace_in_channels": 6, **changes})


def skyreels(**changes: Any) -> Any:
    return _seeded(SkyReelsV2Transformer3DModel, **{**_WAN, **changes})


def chrono_edit(**changes: Any) -> Any:
    return _seeded(ChronoEditTransformer3DModel, **{**_WAN, **_WITH_IMAGE, **changes})


def wan_animate(**changes: Any) -> Any:
    tiny = {
        "in_channels": 12,
        "latent_channels": 4,
        "motion_encoder_channel_sizes": {"4": 4, "8": 4, "16": 4},
        "motion_encoder_size": 16,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 16,
        "face_encoder_hidden_dim": 8,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    }
    return _seeded(WanAnimateTransformer3DModel, **{**_WAN, **_WITH_IMAGE, **tiny, **changes})


def wan_inputs(grid: Grid, text: int, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _latent(grid, batch),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": noise(batch, text, 16, seed=1),
    }


def wan_ti2v_inputs(grid: Grid, text: int, batch: int) -> dict[str, Any]:
    """A timestep for each token, 0 for the first frame's, which is given."""
    frames, height, width = grid
    timestep = torch.full((frames, height * width), 500.0)
    timestep[0] = 0
    return {**wan_inputs(grid, text, batch), "timestep": timestep.flatten().expand(batch, -1)}


def wan_i2v_inputs(grid: Grid, text: int, batch: int) -> dict[str, Any]:
    """Text of 512 tokens, as the processor of cross-attention has it: what is before them is the image."""
    image = {"encoder_hidden_states_image": noise(batch, 5, 8, seed=2)}
    return {**wan_inputs(grid, 512, batch), **image}


def wan_vace_inputs(grid: Grid, text: int, batch: int) -> dict[str, Any]:
    return {**wan_inputs(grid, text, batch), "control_hidden_states": _latent(grid, batch, channels=6, seed=3)}


def wan_animate_inputs(grid: Grid, text: int, batch: int) -> dict[str, Any]:
    """The first frame is the reference; four frames of a face are one of the others."""
    frames, height, width = grid
    return {
        **wan_i2v_inputs(grid, text, batch),
        "hidden_states": _latent(grid, batch, channels=12),
        "pose_hidden_states": _latent((frames - 1, height, width), batch, seed=3),
        "face_pixel_values": noise(batch, 3, 4 * (frames - 2) + 1, 16, 16, seed=4),
    }


def _latent(grid: Grid, batch: int, channels: int = 4, seed: int = 0) -> torch.Tensor:
    frames, height, width = grid
    return noise(batch, channels, frames, 2 * height, 2 * width, seed=seed)


def video_alone(grid: Grid, text: int) -> Place:
    return Place(grid)


WAN = (
    Case("wan", wan, wan_inputs, video_alone, layers=2),
    Case("wan_ti2v", wan, wan_ti2v_inputs, video_alone, layers=2),
    Case("wan_i2v", wan_i2v, wan_i2v_inputs, video_alone, layers=2),
    Case("wan_vace", wan_vace, wan_vace_inputs, video_alone, layers=4),
    Case("wan_animate", wan_animate, wan_animate_inputs, video_alone, layers=2),
    Case("skyreels", skyreels, wan_inputs, video_alone, layers=2),
    Case("chrono_edit", chrono_edit, wan_i2v_inputs, video_alone, layers=2),
)


# HunyuanVideo: patches of 1 x 2 x 2 here too; text after the video.

_HUNYUAN: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}


def hunyuan_video(**changes: Any) -> Any:
    return _seeded(HunyuanVideoTransformer3DModel, **{**_HUNYUAN, **changes})


def hunyuan_i2v(**changes: Any) -> Any:
    return hunyuan_video(**{"image_condition_type": "token_replace", **changes})


def framepack(**changes: Any) -> Any:
    image = {"has_image_proj": True, "image_proj_dim": 12, "has_clean_x_embedder": True}
    return _seeded(HunyuanVideoFramepackTransformer3DModel, **{**_HUNYUAN, **image, **changes})


def hunyuan_inputs(grid: Grid, text: int, batch: int) -> dict[str, Any]:
    """Of the second video, half the text is padding."""
    mask = torch.ones(batch, text, dtype=torch.long)
    mask[1:, text // 2 :] = 0
    return {
        "hidden_states": _latent(grid, batch),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": noise(batch, text, 16, seed=1),
        "encoder_attention_mask": mask,
        "pooled_projections": noise(batch, 8, seed=2),
        "guidance": torch.full((batch,), 1000.0),
    }


def framepack_inputs(grid: Grid, text: int, batch: int) -> dict[str, Any]:
    """Three earlier videos, each coarser than the next, of sizes that boxes of 2x4x4 and 4x8x8 do not divide."""
    _, height, width = grid
    history = {"latents_clean": 2, "latents_history_2x": 3, "latents_history_4x": 5}
    indices = {f"indices_{name}": torch.arange(frames) for name, frames in history.items()}
    return {
        **hunyuan_inputs(grid, text, batch),
        **{name: _latent((frames, height, width), batch, seed=3) for name, frames in history.items()},
        **indices,
        "indices_latents": torch.arange(10, 10 + grid[0]),
        "image_embeds": noise(batch, 3, 12, seed=4),
    }


def video_then_text(grid: Grid, text: int) -> Place:
    return Place(grid, around=text, hidden_last=True)


def history_then_video_then_text(grid: Grid, text: int) -> Place:
    """Text with the three tokens of an image before it."""
    _, height, width = grid
    coarse, coarsest = ([-(-2 * side // box) for side in (height, width)] for box in (4, 8))
    history = 2 * height * width + 2 * coarse[0] * coarse[1] + 2 * coarsest[0] * coarsest[1]
    return Place(grid, start=history, around=history + 3 + text, hidden_last=True)


HUNYUAN = (
    Case("hunyuan_video", hunyuan_video, hunyuan_inputs, video_then_text, layers=4),
    Case("hunyuan_i2v", hunyuan_i2v, hunyuan_inputs, video_then_text, layers=4),
    Case("framepack", framepack, framepack_inputs, history_then_video_then_text, layers=4),
)


def hunyuan15(**changes: Any) -> Any:
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "text_embed_dim": 16,
        "text_embed_2_dim": 8,
        "image_embed_dim": 12,
        "rope_axes_dim": (2, 2, 4),
        "target_size": 16,
    }
    return _seeded(HunyuanVideo15Transformer3DModel, **{**config, **changes})


def hunyuan15_inputs(grid: Grid, text: int, batch: int) -> dict[str, Any]:
    """Of either text, the second video has less; without an image all of its four tokens are padding."""
    masks = torch.ones(2, batch, text, dtype=torch.long)
    masks[0, 1:, text // 2 :] = 0
    masks[1, 1:, 1:] = 0
    return {
        "hidden_states": _latent(grid, batch),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": noise(batch, text, 16, seed=1),
        "encoder_attention_mask": masks[0],
        "encoder_hidden_states_2": noise(batch, text, 8, seed=2),
        "encoder_attention_mask_2": masks[1],
        "image_embeds": torch.zeros(batch, 4, 12),
    }


def hunyuan15_i2v_inputs(grid: Grid, text: int, batch: int) -> dict[str, Any]:
    return {**hunyuan15_inputs(grid, text, batch), "image_embeds": noise(batch, 4, 12, seed=3)}


def video_then_texts_and_image(grid: Grid, text: int) -> Place:
    return Place(grid, around=2 * text + 4, hidden_last=True)


HUNYUAN_15 = (
    Case("hunyuan15", hunyuan15, hunyuan15_inputs, video_then_texts_and_image, layers=2),
    Case("hunyuan15_i2v", hunyuan15, hunyuan15_i2v_inputs, video_then_texts_and_image, layers=2),
)

CASES = {case.name: case for case in (*WAN, *HUNYUAN, *HUNYUAN_15)}
