"""What a denoiser is called with for a picture or clip of a size, as empty tensors: to reckon without computing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from . import family_of
from .hunyuan_video import layers_and_patch
from .video import Grid

#: Tokens of the second text encoder and of the image that HunyuanVideo 1.5 gets besides.
_GLYPHS, _IMAGE = 256, 729


def call_arguments(model: nn.Module, grid: Grid, text: int) -> dict[str, Any]:
    """The arguments of one call for one picture or clip, by name, on the meta device; what has to be read is not.

    Args:
        model: a denoiser.
        grid: (f, h, w) of the tokens of the picture or clip; of a U-Net, of its latent, f being 1.
        text: tokens of the prompt.

    Raises:
        UnsupportedModel: a model of a family that is not called with a text and a size alone.
    """
    family = family_of(model)
    if family.model_class not in _CALLS:
        raise UnsupportedModel(f"what a {type(model).__name__} is called with cannot be told from a size alone")
    return _CALLS[family.model_class](model, grid, text)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _unet(model: Any, grid: Grid, text: int) -> dict[str, Any]:
    config = model.config
    width = config.cross_attention_dim
    arguments: dict[str, Any] = {
        "sample": _empty(1, config.in_channels, *grid[1:]),
        "timestep": _empty(1),
        "encoder_hidden_states": _empty(1, text, max(width) if isinstance(width, list | tuple) else width),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        arguments["added_cond_kwargs"] = {"text_embeds": _empty(1, pooled), "time_ids": _empty(1, 6)}
    return arguments


def _sd3(model: Any, grid: Grid, text: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": _latent(config.in_channels, grid, (1, config.patch_size, config.patch_size))[:, :, 0],
        "encoder_hidden_states": _empty(1, text, config.joint_attention_dim),
        "pooled_projections": _empty(1, config.pooled_projection_dim),
        "timestep": _empty(1),
    }


def _flux(model: Any, grid: Grid, text: int) -> dict[str, Any]:
    config = model.config
    arguments = _flux2(model, grid, text) | {"pooled_projections": _empty(1, config.pooled_projection_dim)}
    if not config.guidance_embeds:
        del arguments["guidance"]
    return arguments


def _flux2(model: Any, grid: Grid, text: int) -> dict[str, Any]:
    config, (_, height, width) = model.config, grid
    ids = torch.zeros(height * width, len(config.axes_dims_rope))
    ids[:, 1:3] = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    return {
        "hidden_states": _empty(1, height * width, config.in_channels),
        "encoder_hidden_states": _empty(1, text, config.joint_attention_dim),
        "timestep": _empty(1),
        "img_ids": ids,
        "txt_ids": _empty(text, len(config.axes_dims_rope)),
        "guidance": _empty(1),
    }


def _qwen_image(model: Any, grid: Grid, text: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": _empty(1, grid[1] * grid[2], config.in_channels),
        "encoder_hidden_states": _empty(1, text, config.joint_attention_dim),
        "timestep": _empty(1),
        "img_shapes": [[(1, *grid[1:])]],
    }


def _z_image(model: Any, grid: Grid, text: int) -> dict[str, Any]:
    config = model.config
    return {
        "x": [_latent(config.in_channels, grid, (1, 2, 2))[0]],
        "t": _empty(1),
        "cap_feats": [_empty(text, config.cap_feat_dim)],
    }


def _wan(model: Any, grid: Grid, text: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": _latent(config.in_channels, grid, config.patch_size),
        "timestep": _empty(1),
        "encoder_hidden_states": _empty(1, text, config.text_dim),
    }


def _hunyuan_video(model: Any, grid: Grid, text: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": _latent(config.in_channels, grid, layers_and_patch(model)[1]),
        "timestep": _empty(1),
        "encoder_hidden_states": _empty(1, text, config.text_embed_dim),
        "encoder_attention_mask": _empty(1, text),
        "pooled_projections": _empty(1, config.pooled_projection_dim),
        **({"guidance": _empty(1)} if config.guidance_embeds else {}),
    }


def _hunyuan_video15(model: Any, grid: Grid, text: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": _latent(config.in_channels, grid, layers_and_patch(model)[1]),
        "timestep": _empty(1),
        "encoder_hidden_states": _empty(1, text, config.text_embed_dim),
        "encoder_attention_mask": _empty(1, text),
        "encoder_hidden_states_2": _empty(1, _GLYPHS, config.text_embed_2_dim),
        "encoder_attention_mask_2": _empty(1, _GLYPHS),
        "image_embeds": _empty(1, _IMAGE, config.image_embed_dim),
    }


def _cogvideox(model: Any, grid: Grid, text: int) -> dict[str, Any]:
    config = model.config
    patch = (config.patch_size_t or 1, config.patch_size, config.patch_size)
    return {
        "hidden_states": _latent(config.in_channels, grid, patch).transpose(1, 2),
        "encoder_hidden_states": _empty(1, text, config.text_embed_dim),
        "timestep": _empty(1),
    }


def _ltx(model: Any, grid: Grid, text: int) -> dict[str, Any]:
    config, (frames, height, width) = model.config, grid
    return {
        "hidden_states": _empty(1, frames * height * width, config.in_channels),
        "encoder_hidden_states": _empty(1, text, config.caption_channels),
        "timestep": _empty(1),
        "encoder_attention_mask": _empty(1, text),
        **{"num_frames": frames, "height": height, "width": width},
    }


def _mochi(model: Any, grid: Grid, text: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": _latent(config.in_channels, grid, (1, config.patch_size, config.patch_size)),
        "encoder_hidden_states": _empty(1, text, config.text_embed_dim),
        "timestep": _empty(1),
        "encoder_attention_mask": _empty(1, text),
    }


def _latent(channels: int, grid: Grid, patch: Any) -> Tensor:
    """`[1, C, F, H, W]`."""
    return _empty(1, channels, *(length * side for length, side in zip(grid, patch, strict=True)))


_CALLS: dict[str, Callable[[Any, Grid, int], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "QwenImageTransformer2DModel": _qwen_image,
    "ZImageTransformer2DModel": _z_image,
    "WanTransformer3DModel": _wan,
    "SkyReelsV2Transformer3DModel": _wan,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "HunyuanVideo15Transformer3DModel": _hunyuan_video15,
    "CogVideoXTransformer3DModel": _cogvideox,
    "LTXVideoTransformer3DModel": _ltx,
    "MochiTransformer3DModel": _mochi,
}
