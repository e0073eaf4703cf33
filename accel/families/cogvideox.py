"""CogVideoX and CogVideoX 1.5: text and video tokens in one sequence, text first."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0
from torch import Tensor

from .base import Family, Place, Places, attention_layers
from .joint import JointProcessor, normed, project, rotate
from .video import Grid, grid_of


class CogVideoXProcessor(JointProcessor, CogVideoXAttnProcessor2_0):
    """Stock attention of a block, with the middle exchanged for a method's."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **others: Any,
    ) -> Any:
        slot, text = self.slot, encoder_hidden_states
        if slot is None:
            return super().__call__(attn, hidden_states, text, attention_mask, image_rotary_emb)
        texts, frames = text.shape[1], hidden_states.shape[1]
        why_not = "" if attention_mask is None else "an attention mask was given, which CogVideoX itself never does"
        if not self.takes(hidden_states, texts + frames, why_not):
            return slot.original(attn, hidden_states, text, attention_mask, image_rotary_emb, **others)
        strategy = slot.strategy
        fused = isinstance(slot.original, FusedCogVideoXAttnProcessor2_0)
        joint = torch.cat([text, hidden_states], dim=1)
        query, key, value = strategy.project(attn, joint, partial(project, attn, fused=fused))
        query, key = normed(attn.norm_q, query), normed(attn.norm_k, key)
        if image_rotary_emb is not None:
            query, key = (_rotate_video(x, texts, image_rotary_emb) for x in (query, key))
        attended = self.attend(query, key, value).flatten(2)
        projected = attn.to_out[1](strategy.output(attn, attended, attn.to_out[0]))
        text, video = projected.split([texts, frames], dim=1)
        return video, text


def _rotate_video(x: Tensor, texts: int, rope: Any) -> Tensor:
    """The text has no positions."""
    return torch.cat([x[:, :texts], rotate(x[:, texts:], rope, sequence_dim=1)], dim=1)


def layer_places(model: Any) -> Places:
    config = model.config
    patch = config.patch_size_t or 1, config.patch_size, config.patch_size
    return partial(_layer_places, list(attention_layers(model)), patch)


def _layer_places(layers: list[str], patch: Grid, arguments: dict[str, Any]) -> dict[str, Place]:
    text = arguments["encoder_hidden_states"].shape[1]
    # Its latent is `[B, F, C, H, W]`.
    place = Place(grid_of(arguments["hidden_states"].transpose(1, 2), patch), start=text, around=text)
    return dict.fromkeys(layers, place)


def is_self_attention(layer: str) -> bool:
    return layer.endswith(".attn1")


def is_exchangeable(processor: object) -> bool:
    return type(processor) in (CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0, CogVideoXProcessor)


COGVIDEOX = Family(
    name="CogVideoX",
    model_class="CogVideoXTransformer3DModel",
    kind="video",
    self_attention=is_self_attention,
    processor=CogVideoXProcessor,
    exchangeable=is_exchangeable,
    places=layer_places,
)
