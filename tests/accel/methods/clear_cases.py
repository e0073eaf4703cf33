"""CLEAR by its definition (arXiv 2412.16112), dense and slow, on tiny FLUX transformers, and random checkpoints."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from attnswap.accel.methods import clear_weights as weights_files
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

#: Of a whole transformer against the definition in fp64.
CLOSE = 1e-5
CHANNELS, TEXT_WIDTH = 4, 32
Grid = tuple[int, int]
#: By layer, then by published name.
Weights = dict[str, dict[str, Tensor]]


def transformer(seed: int = 0, **changes: Any) -> FluxTransformer2DModel:
    """One double block and two single ones."""
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": CHANNELS,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "pooled_projection_dim": 32,
        "axes_dims_rope": [4, 4, 8],
    }
    return FluxTransformer2DModel(**{**config, **changes}).eval()


def ids(grid: Grid, image: int = 0) -> Tensor:
    """Number of the image, row and column of each token."""
    height, width = grid
    return torch.tensor([[image, y, x] for y in range(height) for x in range(width)], dtype=torch.float32)


def inputs(grid: Grid, text: int = 7, batch: int = 1, reference: Grid | None = None, seed: int = 0) -> dict[str, Any]:
    """What a transformer is called with; a reference image follows the image, as in Kontext."""
    generator = torch.Generator().manual_seed(seed)
    image_ids = ids(grid) if reference is None else torch.cat((ids(grid), ids(reference, image=1)))
    return {
        "hidden_states": torch.randn(batch, len(image_ids), CHANNELS, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, TEXT_WIDTH, generator=generator),
        "pooled_projections": torch.randn(batch, 32, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(text, 3),
    }


def call(model: nn.Module, grid: Grid, **more: Any) -> Tensor:
    """The transformer's prediction, without gradients; `text`, `batch`, `reference` and `seed` as in `inputs`."""
    form = {name: more.pop(name) for name in ("text", "batch", "reference", "seed") if name in more}
    with torch.no_grad():
        out: Tensor = model(**{**inputs(grid, **form), **more}).sample
    return out


def attention(model: nn.Module) -> dict[str, Any]:
    """Double blocks before single ones."""
    return {name: module for name, module in model.named_modules() if name.endswith(".attn")}


def visible(grid: Grid, text: int, radius: float, after: int = 0) -> Tensor:
    """bool `[S, S]`: which query sees which key, one pair at a time."""
    height, width = grid
    place: list[tuple[int, int] | None] = [None] * text
    place += [(y, x) for y in range(height) for x in range(width)]
    place += [None] * after
    return torch.tensor(
        [[a is None or b is None or (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 < radius**2 for b in place] for a in place]
    )


class ByDefinition:
    """A processor with dense masked attention in fp64.

    Args:
        pooling: weights `[s, s]` of this layer's cells.
        sharpness: a factor on the logits.
    """

    def __init__(
        self,
        grid: Grid,
        radius: float,
        text: int,
        *,
        after: int = 0,
        pooling: Tensor | None = None,
        sharpness: float = 1.0,
    ) -> None:
        self.grid, self.text, self.pooling, self.sharpness = grid, text, pooling, sharpness
        self.mask = visible(grid, text, radius, after)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1))

        query, key = attn.norm_q(heads(attn.to_q(hidden_states))), attn.norm_k(heads(attn.to_k(hidden_states)))
        value = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            query = torch.cat((attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states))), query), 1)
            key = torch.cat((attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states))), key), 1)
            value = torch.cat((heads(attn.add_v_proj(encoder_hidden_states)), value), 1)
        query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        out = self._attend(query.double(), key.double(), value.double()).to(hidden_states.dtype).flatten(2)
        if encoder_hidden_states is None:
            return out
        return attn.to_out[0](out[:, self.text :]), attn.to_add_out(out[:, : self.text])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = self.mask
        if self.pooling is not None:
            key, value = torch.cat((key, self._pooled(key)), 1), torch.cat((value, self._pooled(value)), 1)
            of_the_grid = torch.zeros(len(mask), dtype=torch.bool)
            of_the_grid[self.text : self.text + math.prod(self.grid)] = True
            mask = torch.cat((mask, of_the_grid[:, None].expand(-1, key.shape[1] - len(mask))), 1)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * self.sharpness / math.sqrt(query.shape[-1])
        return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, -math.inf).softmax(-1), value)

    def _pooled(self, x: Tensor) -> Tensor:
        assert self.pooling is not None
        (height, width), side, weights = self.grid, len(self.pooling), self.pooling.double()
        image = x[:, self.text : self.text + height * width].unflatten(1, self.grid)
        cells = [
            (image[:, y : y + side, x : x + side] * weights[:, :, None, None]).sum((1, 2))
            for y in range(0, height, side)
            for x in range(0, width, side)
        ]
        return torch.stack(cells, 1)


def by_definition(model: nn.Module, grid: Grid, radius: float, weights: Weights | None = None, **more: Any) -> Tensor:
    """The prediction of a copy of a model whose attention is the definition, with the tensors of a checkpoint.

    Args:
        more: `text`, `batch`, `reference`, `seed`; `mean` for cells of that side pooled to their mean; `sharpness`.
    """
    mean, sharpness = more.pop("mean", None), more.pop("sharpness", 1.0)
    model = copy.deepcopy(model)
    form = inputs(grid, **{name: more[name] for name in ("text", "reference") if name in more})
    text = form["encoder_hidden_states"].shape[1]
    after = len(form["img_ids"]) - math.prod(grid)
    for name, attn in attention(model).items():
        tensors = {} if weights is None else dict(weights[name])
        pooling = tensors.pop("processor.spatial_weight", None)
        if pooling is not None:
            pooling = pooling[0, 0, 0, :, 0, :, 0]
        elif mean is not None:
            pooling = torch.full((mean, mean), mean**-2)
        attn.load_state_dict(tensors, strict=False)
        attn.set_processor(ByDefinition(grid, radius, text, after=after, pooling=pooling, sharpness=sharpness))
    return call(model, grid, **more)


def random_weights(model: nn.Module, down_factor: int | None = None, seed: int = 0) -> Weights:
    """For every layer, tensors like its own, and pooling weights that do not sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    found: Weights = {}
    for layer, attn in attention(model).items():
        names = [f"{to}.{kind}" for to in ("to_q", "to_k", "to_v", "to_out.0") for kind in ("weight", "bias")]
        own = dict(attn.named_parameters())
        found[layer] = {
            name: torch.randn(own[name].shape, generator=generator) / own[name].shape[-1] ** 0.5
            for name in names
            if name in own
        }
        if down_factor is not None:
            shape = (1, 1, 1, down_factor, 1, down_factor, 1)
            found[layer]["processor.spatial_weight"] = torch.randn(shape, generator=generator)
    return found


def write(folder: Path, model: nn.Module, radius: float = 3, down_factor: int | None = None, seed: int = 0) -> Weights:
    """A checkpoint of random weights under its published name; returns them."""
    weights = random_weights(model, down_factor, seed)
    weights_files.save(folder / weights_files.file_name(radius, down_factor), weights)
    return weights
