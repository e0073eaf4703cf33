"""HunyuanVideo 1.5: video and text tokens in one sequence, video first, then two texts and an image, padding last."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from torch import Tensor

from .base import Family, Place, Places
from .hunyuan_video import is_self_attention, layers_and_patch, rotate_first, with_text
from .joint import DispatchingProcessor, normed, project
from .video import Grid, grid_of


class HunyuanVideo15Processor(DispatchingProcessor, HunyuanVideo15AttnProcessor2_0):
    """Stock attention of a block, with the middle exchanged for a method's."""

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
        why_not = "" if text is not None and mask is not None else "there is no text or no mask of it"
        if not self.takes(hidden_states, tokens, why_not) or text is None or mask is None:
            return slot.original(attn, hidden_states, text, mask, image_rotary_emb, **others)
        strategy = slot.strategy
        query, key, value = strategy.project(attn, hidden_states, partial(project, attn))
        query, key = normed(attn.norm_q, query), normed(attn.norm_k, key)
        if image_rotary_emb is not None:
            query, key = (rotate_first(x, image_rotary_emb, video_tokens) for x in (query, key))
        query, key, value = with_text(attn, text, query, key, value)
        seen = F.pad(mask, (tokens - mask.shape[1], 0), value=True).bool()
        attended = self.attend(query, key, value, key_mask=seen).flatten(2)
        video, attended_text = attended.split_with_sizes([video_tokens, text.shape[1]], dim=1)
        # Stock attention hides padding from itself too: such a token attends to nothing and gets zeros.
        attended_text = attended_text.masked_fill(~seen[:, video_tokens:, None], 0)
        return attn.to_out[1](strategy.output(attn, video, attn.to_out[0])), attn.to_add_out(attended_text)


def layer_places(model: Any) -> Places:
    return partial(_layer_places, *layers_and_patch(model))


def _layer_places(layers: list[str], patch: Grid, arguments: dict[str, Any]) -> dict[str, Place]:
    streams = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    text = sum(arguments[name].shape[1] for name in streams)
    return dict.fromkeys(layers, Place(grid_of(arguments["hidden_states"], patch), around=text, hidden_last=True))


def is_exchangeable(processor: object) -> bool:
    return type(processor) in (HunyuanVideo15AttnProcessor2_0, HunyuanVideo15Processor)


HUNYUAN_VIDEO_15 = Family(
    name="HunyuanVideo 1.5",
    model_class="HunyuanVideo15Transformer3DModel",
    kind="video",
    self_attention=is_self_attention,
    processor=HunyuanVideo15Processor,
    exchangeable=is_exchangeable,
    places=layer_places,
)
