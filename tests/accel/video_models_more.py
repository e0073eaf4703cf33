"""Tiny random transformers of CogVideoX, LTX, LTX-2 and Mochi, and the arguments of a call."""

from __future__ import annotations

from typing import Any

import torch
from attnswap.accel.families.base import Place
from diffusers import (
    CogVideoXTransformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
)

from .video_models import Case, Grid, noise, video_alone


def seeded(cls: Any, **config: Any) -> Any:
    """With no weight at 0 or 1, as biases, norms and Mochi's positions begin: else nothing tells if one is left out."""
    torch.manual_seed(0)
    model = cls(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


# CogVideoX: patches of 2 x 2, in 1.5 of 2 x 2 x 2; text before the video.


def cogvideox(**changes: Any) -> Any:
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 4,
        "text_embed_dim": 16,
        "num_layers": 2,
        "sample_width": 4,
        "sample_height": 10,
        "sample_frames": 9,
        "max_text_seq_length": 6,
        "temporal_compression_ratio": 4,
        "use_rotary_positional_embeddings": True,
    }
    return seeded(CogVideoXTransformer3DModel, **{**config, **changes})


def cogvideox_2b(**changes: Any) -> Any:
    """Positions are added to the tokens."""
    return cogvideox(**{"use_rotary_positional_embeddings": False, **changes})


def cogvideox15(**changes: Any) -> Any:
    return cogvideox(**{"patch_size_t": 2, "patch_bias": False, **changes})


def cogvideox15_i2v(**changes: Any) -> Any:
    """The image comes as further channels."""
    return cogvideox15(**{"in_channels": 8, "ofs_embed_dim": 4, **changes})


def cogvideox_2b_inputs(grid: Grid, text: int, batch: int, frames: int = 1, channels: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, frames * grid[0], channels, 2 * grid[1], 2 * grid[2]),
        "encoder_hidden_states": noise(batch, text, 16, seed=1),
        "timestep": torch.full((batch,), 500.0),
    }


def cogvideox_inputs(grid: Grid, text: int, batch: int, **more: int) -> dict[str, Any]:
    angles = noise(grid[0] * grid[1] * grid[2], 8, seed=2).repeat_interleave(2, dim=1)
    return {**cogvideox_2b_inputs(grid, text, batch, **more), "image_rotary_emb": (angles.cos(), angles.sin())}


def cogvideox15_inputs(grid: Grid, text: int, batch: int) -> dict[str, Any]:
    return cogvideox_inputs(grid, text, batch, frames=2)


def cogvideox15_i2v_inputs(grid: Grid, text: int, batch: int) -> dict[str, Any]:
    return {**cogvideox_inputs(grid, text, batch, frames=2, channels=8), "ofs": torch.full((batch,), 2.0)}


def text_then_video(grid: Grid, text: int) -> Place:
    return Place(grid, start=text, around=text)


COGVIDEOX = {
    case.name: case
    for case in (
        Case("cogvideox", cogvideox, cogvideox_inputs, text_then_video, layers=2),
        Case("cogvideox_2b", cogvideox_2b, cogvideox_2b_inputs, text_then_video, layers=2),
        Case("cogvideox15", cogvideox15, cogvideox15_inputs, text_then_video, layers=2),
        Case("cogvideox15_i2v", cogvideox15_i2v, cogvideox15_i2v_inputs, text_then_video, layers=2),
    )
}


# LTX: tokens come packed.


def ltx(**changes: Any) -> Any:
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "cross_attention_dim": 24,
        "num_layers": 2,
        "caption_channels": 16,
    }
    return seeded(LTXVideoTransformer3DModel, **{**config, **changes})


def ltx_inputs(grid: Grid, text: int, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": noise(batch, frames * height * width, 4),
        "encoder_hidden_states": noise(batch, text, 16, seed=1),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": text_mask(text, batch),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def text_mask(text: int, batch: int) -> torch.Tensor:
    """Of the second video, half the text is padding."""
    mask = torch.ones(batch, text, dtype=torch.long)
    mask[1:, text // 2 :] = 0
    return mask


def coordinates(grid: Grid, batch: int, start: float = 0) -> torch.Tensor:
    """`[B, 3, S]`, time, row and column of each token, as pipelines that condition on frames give them."""
    frames, height, width = (torch.arange(float(side)) for side in grid)
    table = torch.cartesian_prod((8 * frames - 7).clamp(min=0) + start, 32 * height, 32 * width)
    return table.T.expand(batch, -1, -1) / torch.tensor([25, 1, 1])[:, None]


LTX = {"ltx": Case("ltx", ltx, ltx_inputs, video_alone, layers=2)}


def ltx2(**changes: Any) -> Any:
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 6,
        "audio_cross_attention_dim": 12,
        "num_layers": 2,
        "caption_channels": 16,
    }
    return seeded(LTX2VideoTransformer3DModel, **{**config, **changes})


def ltx2_split(**changes: Any) -> Any:
    return ltx2(**{"rope_type": "split", **changes})


def ltx23(**changes: Any) -> Any:
    """Heads have gates, and guidance may perturb layers."""
    newer = {"gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True}
    return ltx2_split(**{**newer, "perturbed_attn": True, **changes})


def ltx2_inputs(grid: Grid, text: int, batch: int) -> dict[str, Any]:
    return {
        **ltx_inputs(grid, text, batch),
        "audio_hidden_states": noise(batch, 7, 4, seed=2),
        "audio_encoder_hidden_states": noise(batch, text, 16, seed=3),
        "audio_encoder_attention_mask": text_mask(text, batch),
        "audio_num_frames": 7,
    }


def ltx23_inputs(grid: Grid, text: int, batch: int) -> dict[str, Any]:
    return {**ltx2_inputs(grid, text, batch), "sigma": torch.full((batch,), 500.0), "use_cross_timestep": True}


LTX2 = {
    case.name: case
    for case in (
        Case("ltx2", ltx2, ltx2_inputs, video_alone, layers=2),
        Case("ltx2_split", ltx2_split, ltx2_inputs, video_alone, layers=2),
        Case("ltx23", ltx23, ltx23_inputs, video_alone, layers=2),
    )
}


# Mochi: patches of 2 x 2; text after the video.


def mochi(**changes: Any) -> Any:
    config: dict[str, Any] = {
        "patch_size": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "pooled_projection_dim": 16,
        "in_channels": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 4,
        "max_sequence_length": 16,
    }
    return seeded(MochiTransformer3DModel, **{**config, **changes})


def mochi_inputs(grid: Grid, text: int, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, grid[0], 2 * grid[1], 2 * grid[2]),
        "encoder_hidden_states": noise(batch, text, 16, seed=1),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": text_mask(text, batch).bool(),
    }


def video_then_hidden_text(grid: Grid, text: int) -> Place:
    return Place(grid, around=text, hidden_last=True)


MOCHI = {"mochi": Case("mochi", mochi, mochi_inputs, video_then_hidden_text, layers=2)}
