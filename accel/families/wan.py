"""Wan 2.1 and 2.2, and models built on their blocks: self-attention over video tokens, text by cross-attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.transformers import transformer_chronoedit, transformer_wan_animate
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2AttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from .base import Family, NoGrid, Place, Places, attention_layers
from .joint import DispatchingProcessor, project
from .video import grid_of


class WanSelfAttention(DispatchingProcessor):
    """Stock self-attention with the middle exchanged for a method's; beside the processor class of a model."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        **others: Any,
    ) -> Any:
        slot, arguments = self.slot, (hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if slot is None:
            stock: Any = super()
            return stock.__call__(attn, *arguments)
        why_not = ""
        if encoder_hidden_states is not None:
            why_not = "it was given other tokens to attend to"
        elif attention_mask is not None:
            why_not = "an attention mask was given"
        if not self.takes(hidden_states, hidden_states.shape[1], why_not):
            return slot.original(attn, *arguments, **others)
        strategy = slot.strategy
        query, key, value = strategy.project(attn, hidden_states, partial(project, attn, fused=attn.fused_projections))
        # Over all heads at once.
        query = attn.norm_q(query.flatten(2)).unflatten(2, query.shape[2:])
        key = attn.norm_k(key.flatten(2)).unflatten(2, key.shape[2:])
        if rotary_emb is not None:
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        attended = self.attend(query, key, value).flatten(2)
        return attn.to_out[1](strategy.output(attn, attended, attn.to_out[0]))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As stock attention does it inside: x `[B, S, H, D]`, frequencies `[1, S, 1, D]`, each twice."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    rotated = torch.empty_like(x)
    rotated[..., 0::2] = real * cos - imaginary * sin
    rotated[..., 1::2] = real * sin + imaginary * cos
    return rotated


class WanProcessor(WanSelfAttention, WanAttnProcessor):
    """Of Wan and Wan VACE."""


class SkyReelsV2Processor(WanSelfAttention, SkyReelsV2AttnProcessor):
    """Of SkyReels V2, which has a copy of the stock class."""


class ChronoEditProcessor(WanSelfAttention, transformer_chronoedit.WanAttnProcessor):
    """Of ChronoEdit, which has another."""


class WanAnimateProcessor(WanSelfAttention, transformer_wan_animate.WanAttnProcessor):
    """Of Wan Animate, which has another."""


def layer_places(model: Any) -> Places:
    layers = [name for name in attention_layers(model) if is_self_attention(name)]
    return partial(_layer_places, layers, model)


def _layer_places(layers: list[str], model: Any, arguments: dict[str, Any]) -> dict[str, Place]:
    config = model.config
    if (together := getattr(config, "num_frame_per_block", 1)) > 1:
        raise NoGrid(f"frames see no later ones (causal blocks of {together} frames)")
    return dict.fromkeys(layers, Place(grid_of(arguments["hidden_states"], config.patch_size)))


def is_self_attention(layer: str) -> bool:
    """Those of the blocks, of Wan VACE's control blocks too, which see as many tokens at the same places."""
    return layer.endswith(".attn1")


def _is_one_of(classes: tuple[type[Any], ...], processor: object) -> bool:
    return type(processor) in classes


def _family(name: str, model_class: str, stock: type[Any], ours: type[WanSelfAttention]) -> Family:
    return Family(
        name=name,
        model_class=model_class,
        kind="video",
        self_attention=is_self_attention,
        processor=ours,
        exchangeable=partial(_is_one_of, (stock, ours)),
        places=layer_places,
    )


WAN = _family("Wan", "WanTransformer3DModel", WanAttnProcessor, WanProcessor)
WAN_VACE = _family("Wan VACE", "WanVACETransformer3DModel", WanAttnProcessor, WanProcessor)
WAN_ANIMATE = _family(
    "Wan Animate", "WanAnimateTransformer3DModel", transformer_wan_animate.WanAttnProcessor, WanAnimateProcessor
)
SKYREELS_V2 = _family("SkyReels V2", "SkyReelsV2Transformer3DModel", SkyReelsV2AttnProcessor, SkyReelsV2Processor)
CHRONO_EDIT = _family(
    "ChronoEdit", "ChronoEditTransformer3DModel", transformer_chronoedit.WanAttnProcessor, ChronoEditProcessor
)
