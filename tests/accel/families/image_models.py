"""Tiny random transformers of every image family, their inputs, and where the image tokens lie in each sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from attnswap.accel.families.base import Place
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)

#: Layers by the first part of their names, and the place of the grid in the sequence they see.
Sequences = dict[str, Place]


@dataclass(frozen=True)
class Case:
    """A family.

    Attributes:
        make: a model, weights at random.
        inputs: the arguments of a call by grid, number of text tokens, batch, and grid of a reference image (or None).
        sequences: what that call lays before attention.
        references: whether it takes reference images.
    """

    name: str
    make: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    sequences: Callable[..., Sequences]
    references: bool = False


Grid = tuple[int, int]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _seeded(cls: Any, **config: Any) -> Any:
    torch.manual_seed(0)
    return cls(**config).eval()


def _coordinates(number: int, grid: Grid) -> torch.Tensor:
    """(number, row, column) of each token."""
    return torch.cartesian_prod(torch.tensor([float(number)]), *(torch.arange(float(side)) for side in grid))


def _joined(start: int, grid: Grid, text: int, reference: Grid | None) -> Place:
    return Place(grid, start, text + (0 if reference is None else reference[0] * reference[1]))


def flux(**changes: Any) -> Any:
    config: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": [4, 4, 8],
    }
    return _seeded(FluxTransformer2DModel, **{**config, **changes})


def flux_inputs(grid: Grid, text: int, batch: int, reference: Grid | None = None) -> dict[str, Any]:
    ids = torch.cat([_coordinates(0, grid)] + ([] if reference is None else [_coordinates(1, reference)]))
    return {
        "hidden_states": noise(batch, len(ids), 4),
        "encoder_hidden_states": noise(batch, text, 32, seed=1),
        "pooled_projections": noise(batch, 32, seed=2),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
    }


def flux_sequences(grid: Grid, text: int, reference: Grid | None = None) -> Sequences:
    place = _joined(text, grid, text, reference)
    return {"transformer_blocks": place, "single_transformer_blocks": place}


def flux2(**changes: Any) -> Any:
    config: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    return _seeded(Flux2Transformer2DModel, **{**config, **changes})


def flux2_inputs(grid: Grid, text: int, batch: int, reference: Grid | None = None) -> dict[str, Any]:
    ids = torch.cat([_coordinates(0, grid)] + ([] if reference is None else [_coordinates(10, reference)]))
    ids = torch.cat([ids, torch.zeros(len(ids), 1)], dim=1)
    text_ids = torch.cat([torch.zeros(text, 3), torch.arange(float(text))[:, None]], dim=1)
    return {
        "hidden_states": noise(batch, len(ids), 4),
        "encoder_hidden_states": noise(batch, text, 32, seed=1),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 4.0),
        "img_ids": ids.expand(batch, -1, -1),
        "txt_ids": text_ids.expand(batch, -1, -1),
    }


def sd3(**changes: Any) -> Any:
    config: dict[str, Any] = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 32,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 24,
    }
    return _seeded(SD3Transformer2DModel, **{**config, **changes})


def sd35(**changes: Any) -> Any:
    return sd3(**{"dual_attention_layers": (0,), "qk_norm": "rms_norm", **changes})


def sd3_inputs(grid: Grid, text: int, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 2 * grid[0], 2 * grid[1]),
        "encoder_hidden_states": noise(batch, text, 32, seed=1),
        "pooled_projections": noise(batch, 64, seed=2),
        "timestep": torch.full((batch,), 500.0),
    }


def sd3_sequences(grid: Grid, text: int) -> Sequences:
    return {"attn": Place(grid, 0, text), "attn2": Place(grid)}


def qwen(**changes: Any) -> Any:
    config: dict[str, Any] = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
    }
    return _seeded(QwenImageTransformer2DModel, **{**config, **changes})


def qwen_inputs(grid: Grid, text: int, batch: int, reference: Grid | None = None) -> dict[str, Any]:
    shapes = [(1, *grid)] + ([] if reference is None else [(1, *reference)])
    return {
        "hidden_states": noise(batch, sum(height * width for _, height, width in shapes), 16),
        "encoder_hidden_states": noise(batch, text, 16, seed=1),
        "encoder_hidden_states_mask": None,
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [shapes] * batch,
    }


def qwen_sequences(grid: Grid, text: int, reference: Grid | None = None) -> Sequences:
    return {"transformer_blocks": _joined(text, grid, text, reference)}


def z_image(**changes: Any) -> Any:
    config: dict[str, Any] = {
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [8, 4, 4],
        "axes_lens": [256, 32, 32],
    }
    return _seeded(ZImageTransformer2DModel, **{**config, **changes})


def z_image_inputs(grid: Grid, text: int, batch: int) -> dict[str, Any]:
    return {
        "x": list(noise(batch, 4, 1, 2 * grid[0], 2 * grid[1])),
        "t": torch.full((batch,), 0.5),
        "cap_feats": list(noise(batch, text, 16, seed=1)),
    }


def z_image_sequences(grid: Grid, text: int) -> Sequences:
    padding, padded_text = -(grid[0] * grid[1]) % 32, text + -text % 32
    return {"noise_refiner": Place(grid, 0, padding), "layers": Place(grid, 0, padding + padded_text)}


CASES = {
    case.name: case
    for case in (
        Case("flux", flux, flux_inputs, flux_sequences, references=True),
        Case("flux2", flux2, flux2_inputs, flux_sequences, references=True),
        Case("sd3", sd3, sd3_inputs, sd3_sequences),
        Case("sd35", sd35, sd3_inputs, sd3_sequences),
        Case("qwen_image", qwen, qwen_inputs, qwen_sequences, references=True),
        Case("z_image", z_image, z_image_inputs, z_image_sequences),
    )
}


def run(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The denoiser's output, `[B, …]`."""
    with torch.no_grad():
        output = model(**inputs, return_dict=False)[0]
    return torch.stack(output) if isinstance(output, list) else output
