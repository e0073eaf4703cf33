"""FLUX.1: text and image tokens in one sequence, text first; reference images (Kontext) follow the image."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from .base import Family, NoGrid, Place, attention_layers
from .image_ids import ImageIds
from .joint import DispatchingProcessor, JointProcessor, ThetaRope, project, project_text, rotate

if TYPE_CHECKING:
    from ..methods.base import Strategy


class FluxProcessor(DispatchingProcessor, FluxAttnProcessor):
    """Stock attention of a double or a single block, with the middle exchanged for a method's."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **others: Any,
    ) -> Any:
        slot, inputs = self.slot, (hidden_states, encoder_hidden_states)
        if slot is None:
            return super().__call__(attn, *inputs, attention_mask, image_rotary_emb)  # type: ignore[arg-type]
        tokens = sum(0 if x is None else x.shape[1] for x in inputs)
        if not self.takes(hidden_states, tokens, why_not(attention_mask)):
            return slot.original(attn, *inputs, attention_mask, image_rotary_emb, **others)
        return attend_jointly(self, slot.strategy, attn, *inputs, image_rotary_emb)


def why_not(attention_mask: Tensor | None) -> str:
    """Why a call cannot be accelerated, if it has a mask."""
    return "" if attention_mask is None else "an attention mask was given, which FLUX itself never does"


def attend_jointly(
    processor: JointProcessor,
    strategy: Strategy,
    attn: Any,
    image: Tensor,
    text: Tensor | None,
    rope: Any,
) -> Any:
    """A double block (image and text) or a single one (`image` holds both, text first) with a method's attention."""
    fused = attn.fused_projections
    query, key, value = strategy.project(attn, image, partial(project, attn, fused=fused))
    query, key = attn.norm_q(query), attn.norm_k(key)
    if text is not None:
        text_query, text_key, text_value = project_text(attn, text, fused=fused)
        query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
        key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
        value = torch.cat([text_value, value], dim=1)
    if rope is not None:
        query = rotate(query, rope, sequence_dim=1)
        key = rotate(key, rope, sequence_dim=1)
    attended = processor.attend(query, key, value).flatten(2)
    if text is None:
        return attended
    attended_text, attended = attended.split_with_sizes([text.shape[1], image.shape[1]], dim=1)
    projected = attn.to_out[1](strategy.output(attn, attended, attn.to_out[0]))
    return projected, attn.to_add_out(attended_text)


class FluxPlaces:
    """Tells the grid from `img_ids`: the packed latent does not say how high it is."""

    def __init__(self, model: Any) -> None:
        self._layers = list(attention_layers(model))
        self._image_ids = ImageIds()

    def __call__(self, arguments: dict[str, Any]) -> dict[str, Place]:
        ids = arguments.get("img_ids")
        if ids is None:
            raise NoGrid("without img_ids the image tokens have no rows and columns")
        grid, after = self._image_ids.read(ids)
        text = arguments["encoder_hidden_states"].shape[1]
        return dict.fromkeys(self._layers, Place(grid, start=text, around=text + after))


def is_self_attention(layer: str) -> bool:
    return layer.endswith(".attn")


def is_exchangeable(processor: object) -> bool:
    return type(processor) in (FluxAttnProcessor, FluxProcessor)


def rope_of(model: Any) -> ThetaRope:
    return ThetaRope(model.pos_embed)


FLUX = Family(
    name="FLUX.1",
    model_class="FluxTransformer2DModel",
    kind="image",
    self_attention=is_self_attention,
    processor=FluxProcessor,
    exchangeable=is_exchangeable,
    places=FluxPlaces,
    rope=rope_of,
)
