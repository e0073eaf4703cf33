"""HunyuanVideo and Framepack: video and text tokens in one sequence, video first, text padded and masked."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor

from .base import Family, Place, Places, attention_layers
from .joint import DispatchingProcessor, normed, project, project_text, rotate
from .read_once import ReadOnce
from .video import Grid, grid_of


class HunyuanVideoProcessor(DispatchingProcessor, HunyuanVideoAttnProcessor2_0):
    """Stock attention of a double or a single block, with the middle exchanged for a method's."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **others: Any,
    ) -> Any:
        slot, text, mask = self.slot, encoder_hidden_states, attention_mask
        if slot is None:
            stock: Any = super()
            return stock.__call__(attn, hidden_states, text, mask, image_rotary_emb)
        video_tokens = hidden_states.shape[1]
        tokens = video_tokens + (0 if text is None else text.shape[1])
        if not self.takes(hidden_states, tokens, _why_not(text, mask)) or text is None:
            return slot.original(attn, hidden_states, text, mask, image_rotary_emb, **others)
        strategy, joined = slot.strategy, attn.add_q_proj is None
        inputs = torch.cat([hidden_states, text], dim=1) if joined else hidden_states
        query, key, value = strategy.project(attn, inputs, partial(project, attn))
        query, key = normed(attn.norm_q, query), normed(attn.norm_k, key)
        if image_rotary_emb is not None:
            query, key = (rotate_first(x, image_rotary_emb, video_tokens) for x in (query, key))
        if not joined:
            query, key, value = with_text(attn, text, query, key, value)
        attended = self.attend(query, key, value, key_mask=None if mask is None else mask[:, 0, 0]).flatten(2)
        video, attended_text = attended.split_with_sizes([video_tokens, text.shape[1]], dim=1)
        if joined:  # the block projects them, with its MLP
            return video, attended_text
        return attn.to_out[1](strategy.output(attn, video, attn.to_out[0])), attn.to_add_out(attended_text)


def _why_not(text: Tensor | None, mask: Tensor | None) -> str:
    """Why a call cannot be accelerated, if it is not one of the model's own."""
    if text is None:
        return "there is no text, without which stock attention leaves out a projection"
    if mask is None or (mask.ndim == 4 and mask.shape[1:3] == (1, 1) and mask.dtype == torch.bool):
        return ""
    return f"an attention mask of shape {tuple(mask.shape)} and {mask.dtype} is not one of keys"


def rotate_first(x: Tensor, rope: Any, tokens: int) -> Tensor:
    """Rotary positions for the first tokens of `[B, S, H, D]`, those of the video."""
    rotated: Tensor = rotate(x[:, :tokens], rope, sequence_dim=1)
    return rotated if x.shape[1] == tokens else torch.cat([rotated, x[:, tokens:]], dim=1)


def with_text(attn: Any, text: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of the video with those of the text after them."""
    text_query, text_key, text_value = project_text(attn, text)
    query = torch.cat([query, normed(attn.norm_added_q, text_query)], dim=1)
    key = torch.cat([key, normed(attn.norm_added_k, text_key)], dim=1)
    return query, key, torch.cat([value, text_value], dim=1)


def is_self_attention(layer: str) -> bool:
    """Not those of the refiner, which see text alone."""
    return layer.startswith(("transformer_blocks.", "single_transformer_blocks."))


def is_exchangeable(processor: object) -> bool:
    return type(processor) in (HunyuanVideoAttnProcessor2_0, HunyuanVideoProcessor)


def layers_and_patch(model: Any) -> tuple[list[str], Grid]:
    """The layers over video tokens, and the sides of the box of latents that makes one."""
    side = model.config.patch_size
    layers = [name for name in attention_layers(model) if is_self_attention(name)]
    return layers, (model.config.patch_size_t, side, side)


def layer_places(model: Any) -> Places:
    return partial(_layer_places, *layers_and_patch(model))


def _layer_places(layers: list[str], patch: Grid, arguments: dict[str, Any]) -> dict[str, Place]:
    text = arguments["encoder_hidden_states"].shape[1]
    return dict.fromkeys(layers, Place(grid_of(arguments["hidden_states"], patch), around=text, hidden_last=True))


# Framepack: what was generated before lies in front of the video, the older the coarser.
_HISTORY = {"latents_clean": (1, 2, 2), "latents_history_2x": (2, 4, 4), "latents_history_4x": (4, 8, 8)}


class FramepackPlaces:
    """Counts what lies around the video.

    Args:
        model: the denoiser.
    """

    def __init__(self, model: Any) -> None:
        self._layers, self._patch = layers_and_patch(model)
        self._lengths = ReadOnce(_true_in)

    def __call__(self, arguments: dict[str, Any]) -> dict[str, Place]:
        history = sum(_history_tokens(arguments.get(name), box) for name, box in _HISTORY.items())
        mask = arguments["encoder_attention_mask"]
        # A text by itself is cut where its padding begins.
        text = self._lengths.read(mask) if len(mask) == 1 else mask.shape[1]
        around = history + arguments["image_embeds"].shape[1] + text
        grid = grid_of(arguments["hidden_states"], self._patch)
        return dict.fromkeys(self._layers, Place(grid, start=history, around=around, hidden_last=True))


def _true_in(mask: Tensor) -> int:
    return int(mask.sum())


def _history_tokens(latent: Tensor | None, box: Grid) -> int:
    if latent is None:
        return 0
    # The coarser ones are padded to whole boxes.
    up = (1, 1, 1) if box[0] == 1 else box
    return math.prod((int(length) + u - 1) // side for length, u, side in zip(latent.shape[-3:], up, box, strict=True))


HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    model_class="HunyuanVideoTransformer3DModel",
    kind="video",
    self_attention=is_self_attention,
    processor=HunyuanVideoProcessor,
    exchangeable=is_exchangeable,
    places=layer_places,
)

FRAMEPACK = Family(
    name="HunyuanVideo Framepack",
    model_class="HunyuanVideoFramepackTransformer3DModel",
    kind="video",
    self_attention=is_self_attention,
    processor=HunyuanVideoProcessor,
    exchangeable=is_exchangeable,
    places=FramepackPlaces,
)
