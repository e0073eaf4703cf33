"""FLUX.2: as FLUX.1, but single blocks make attention and MLP in one projection, by a processor of another class."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
)
from torch import Tensor

from .base import Family
from .flux import FluxPlaces, attend_jointly, is_self_attention, rope_of, why_not
from .joint import DispatchingProcessor, rotate, split_heads


class Flux2Processor(DispatchingProcessor):
    """Either of the two."""


class Flux2DoubleProcessor(Flux2Processor, Flux2AttnProcessor):
    """Stock attention of a double block, with the middle exchanged for a method's."""

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


class Flux2SingleProcessor(Flux2Processor, Flux2ParallelSelfAttnProcessor):
    """Stock attention and MLP of a single block, with the middle of the attention exchanged for a method's."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **others: Any,
    ) -> Any:
        slot = self.slot
        if slot is None:
            return super().__call__(attn, hidden_states, attention_mask, image_rotary_emb)
        if not self.takes(hidden_states, hidden_states.shape[1], why_not(attention_mask)):
            return slot.original(attn, hidden_states, attention_mask, image_rotary_emb, **others)
        projected = attn.to_qkv_mlp_proj(hidden_states)
        # By the ratio of the two, which holds where tensor parallelism gives a share of each.
        parts = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
        own = projected.shape[-1] * parts[0] // sum(parts)
        qkv, mlp = projected.split([own, projected.shape[-1] - own], dim=-1)
        query, key, value = slot.strategy.project(
            attn, hidden_states, lambda _: split_heads(attn, *qkv.chunk(3, dim=-1))
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query = rotate(query, image_rotary_emb, sequence_dim=1)
            key = rotate(key, image_rotary_emb, sequence_dim=1)
        attended = self.attend(query, key, value).flatten(2)
        return attn.to_out(torch.cat([attended, attn.mlp_act_fn(mlp)], dim=-1))


def processor_of(attn: Any) -> type[Flux2Processor]:
    return Flux2SingleProcessor if isinstance(attn, Flux2ParallelSelfAttention) else Flux2DoubleProcessor


def is_exchangeable(processor: object) -> bool:
    """Not those that keep the keys and values of reference images from the first step on (klein KV)."""
    stock = (Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor)
    return type(processor) in stock or isinstance(processor, Flux2Processor)


FLUX2 = Family(
    name="FLUX.2",
    model_class="Flux2Transformer2DModel",
    kind="image",
    self_attention=is_self_attention,
    processor=Flux2Processor,
    processor_of=processor_of,
    exchangeable=is_exchangeable,
    places=FluxPlaces,
    rope=rope_of,
)
