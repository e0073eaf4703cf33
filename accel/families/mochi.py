"""Mochi: video and text tokens in one sequence, video first; each video of a batch without the padding of its text."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0
from torch import Tensor

from .base import Family, Place, Places, attention_layers
from .joint import JointProcessor, normed, project, project_text
from .video import Grid, grid_of


class MochiProcessor(JointProcessor, MochiAttnProcessor2_0):
    """Stock attention of a block, with the middle exchanged for a method's."""

    def __call__(
        self,
        attn: MochiAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: Any = None,
        **others: Any,
    ) -> Any:
        slot, text = self.slot, encoder_hidden_states
        if slot is None:
            return super().__call__(attn, hidden_states, text, attention_mask, image_rotary_emb)
        frames, texts = hidden_states.shape[1], text.shape[1]
        if not self.takes(hidden_states, frames + texts):
            return slot.original(attn, hidden_states, text, attention_mask, image_rotary_emb, **others)
        strategy = slot.strategy
        text, seen = _packed(text, attention_mask)
        query, key, value = strategy.project(attn, hidden_states, partial(project, attn))
        query, key = normed(attn.norm_q, query), normed(attn.norm_k, key)
        if image_rotary_emb is not None:
            query, key = _rotate(query, *image_rotary_emb), _rotate(key, *image_rotary_emb)
        text_query, text_key, text_value = project_text(attn, text)
        text_query, text_key = normed(attn.norm_added_q, text_query), normed(attn.norm_added_k, text_key)
        attended = self.attend(
            torch.cat([query, text_query], dim=1),
            torch.cat([key, text_key], dim=1),
            torch.cat([value, text_value], dim=1),
            key_mask=torch.cat([seen.new_ones(hidden_states.shape[:2]), seen], dim=1),
        )
        video, text = attended.flatten(2).split_with_sizes((frames, texts), dim=1)
        text = text.masked_fill(~seen[:, :, None], 0)
        video = attn.to_out[1](strategy.output(attn, video, attn.to_out[0]))
        return video, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text


def _packed(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The text with what is seen of it first, as stock attention gives it back, and bool `[B, T]` of what that is.

    What is hidden is 0: whatever it was, infinite or no number, stock attention drops it.
    """
    seen, order = mask.bool().sort(dim=1, descending=True, stable=True)
    return text.take_along_dim(order[:, :, None], dim=1).masked_fill(~seen[:, :, None], 0), seen


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Of `[B, S, H, D]`, by angles that each head has learned, `[S, H, D / 2]`."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).to(x.dtype).flatten(-2)


def layer_places(model: Any) -> Places:
    side = model.config.patch_size
    return partial(_layer_places, list(attention_layers(model)), (1, side, side))


def _layer_places(layers: list[str], patch: Grid, arguments: dict[str, Any]) -> dict[str, Place]:
    text = arguments["encoder_hidden_states"].shape[1]
    return dict.fromkeys(layers, Place(grid_of(arguments["hidden_states"], patch), around=text, hidden_last=True))


def is_self_attention(layer: str) -> bool:
    return layer.endswith(".attn1")


def is_exchangeable(processor: object) -> bool:
    return type(processor) in (MochiAttnProcessor2_0, MochiProcessor)


MOCHI = Family(
    name="Mochi",
    model_class="MochiTransformer3DModel",
    kind="video",
    self_attention=is_self_attention,
    processor=MochiProcessor,
    exchangeable=is_exchangeable,
    places=layer_places,
)
