"""Stable Diffusion 3 and 3.5: image and text tokens in one sequence, image first; in 3.5 also the image by itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, FusedJointAttnProcessor2_0, JointAttnProcessor2_0
from torch import Tensor

from .base import Family, Place, Places, attention_layers
from .joint import JointProcessor, normed, project, project_text


class SD3Processor(JointProcessor, JointAttnProcessor2_0):
    """Stock joint attention (`attn`), or that of image tokens alone (`attn2`), with the middle exchanged."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        slot, text = self.slot, encoder_hidden_states
        if slot is None:
            return super().__call__(attn, hidden_states, text, attention_mask, *args, **kwargs)  # type: ignore[arg-type]
        image_tokens = hidden_states.shape[1]
        if not self.takes(hidden_states, image_tokens + (0 if text is None else text.shape[1])):
            return slot.original(attn, hidden_states, text, attention_mask, *args, **kwargs)
        strategy = slot.strategy
        fused = isinstance(slot.original, FusedJointAttnProcessor2_0)
        query, key, value = strategy.project(attn, hidden_states, partial(project, attn, fused=fused))
        if not fused:  # the stock one leaves the norms out
            query, key = normed(attn.norm_q, query), normed(attn.norm_k, key)
        if text is not None:
            text_query, text_key, text_value = project_text(attn, text, fused=fused)
            if not fused:
                text_query, text_key = normed(attn.norm_added_q, text_query), normed(attn.norm_added_k, text_key)
            query = torch.cat([query, text_query], dim=1)
            key = torch.cat([key, text_key], dim=1)
            value = torch.cat([value, text_value], dim=1)
        attended = self.attend(query, key, value).flatten(2)
        image = attn.to_out[1](strategy.output(attn, attended[:, :image_tokens], attn.to_out[0]))
        if text is None:
            return image
        attended_text = attended[:, image_tokens:]
        return image, attended_text if attn.context_pre_only else attn.to_add_out(attended_text)


def layer_places(model: Any) -> Places:
    return partial(_layer_places, list(attention_layers(model)), model.config.patch_size)


def _layer_places(layers: list[str], patch: int, arguments: dict[str, Any]) -> dict[str, Place]:
    height, width = arguments["hidden_states"].shape[-2:]
    grid = int(height) // patch, int(width) // patch
    text = arguments["encoder_hidden_states"].shape[1]
    return {layer: Place(grid, around=0 if layer.endswith(".attn2") else text) for layer in layers}


def is_self_attention(layer: str) -> bool:
    return layer.endswith((".attn", ".attn2"))


def is_exchangeable(processor: object) -> bool:
    return type(processor) in (JointAttnProcessor2_0, FusedJointAttnProcessor2_0, SD3Processor)


SD3 = Family(
    name="Stable Diffusion 3",
    model_class="SD3Transformer2DModel",
    kind="image",
    self_attention=is_self_attention,
    processor=SD3Processor,
    exchangeable=is_exchangeable,
    places=layer_places,
)
