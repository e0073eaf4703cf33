"""LTX-2: video and audio tokens, each in a sequence of its own; only the video's self-attention is exchanged."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.transformers import transformer_ltx2
from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoAttnProcessor, LTX2PerturbedAttnProcessor
from torch import Tensor

from .base import Family
from .joint import DispatchingProcessor, project
from .ltx import VideoPlaces, is_self_attention, why_not

#: Of tokens `[B, S, H * D]`, by how a layer pairs the channels that turn.
_ROTATE: dict[str, Any] = {
    "interleaved": transformer_ltx2.apply_interleaved_rotary_emb,
    "split": transformer_ltx2.apply_split_rotary_emb,
}


class LTX2Processor(DispatchingProcessor):
    """Either of the two."""

    def exchanged(self, attn: Any, hidden_states: Tensor, rope: Any, kept: Tensor | None = None) -> Tensor:
        """The layer with a method's attention; `kept` `[B, 1, 1]` is the share of it, the rest being the values."""
        assert self.slot is not None
        strategy = self.slot.strategy
        query, key, value = strategy.project(attn, hidden_states, partial(project, attn))
        # Norms and positions go over all heads at once.
        query, key = attn.norm_q(query.flatten(2)), attn.norm_k(key.flatten(2))
        if rope is not None:
            rotate = _ROTATE[attn.rope_type]
            query, key = rotate(query, rope), rotate(key, rope)
        query, key = (x.unflatten(2, value.shape[2:]) for x in (query, key))
        attended = self.attend(query, key, value)
        if kept is not None:
            attended = torch.lerp(value, attended, kept[..., None])
        if attn.to_gate_logits is not None:
            attended = attended * (2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states)))[..., None]
        return attn.to_out[1](strategy.output(attn, attended.flatten(2), attn.to_out[0]))  # type: ignore[no-any-return]


class LTX2PlainProcessor(LTX2Processor, LTX2AudioVideoAttnProcessor):
    """Stock self-attention of a block, with the middle exchanged for a method's."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Any = None,
        key_rotary_emb: Any = None,
        **others: Any,
    ) -> Any:
        slot, inputs = self.slot, (hidden_states, encoder_hidden_states, attention_mask)
        if slot is None:
            return super().__call__(attn, *inputs, query_rotary_emb, key_rotary_emb)  # type: ignore[arg-type]
        if not self.takes(hidden_states, hidden_states.shape[1], why_not(*inputs[1:])):
            return slot.original(attn, *inputs, query_rotary_emb, key_rotary_emb, **others)
        return self.exchanged(attn, hidden_states, query_rotary_emb)


class LTX2PerturbedProcessor(LTX2Processor, LTX2PerturbedAttnProcessor):
    """The same of a model whose layers guidance may perturb: the values stand for attention, in all or some rows."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Any = None,
        key_rotary_emb: Any = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: Any = None,
        **others: Any,
    ) -> Any:
        slot, inputs = self.slot, (hidden_states, encoder_hidden_states, attention_mask)
        rest = query_rotary_emb, key_rotary_emb, perturbation_mask, all_perturbed
        if slot is None:
            return super().__call__(attn, *inputs, *rest)  # type: ignore[arg-type]
        if all_perturbed is None:
            all_perturbed = perturbation_mask is not None and torch.all(perturbation_mask == 0)
        reason = "a guider takes the values in place of attention" if all_perturbed else why_not(*inputs[1:])
        if not self.takes(hidden_states, hidden_states.shape[1], reason):
            return slot.original(attn, *inputs, *rest, **others)
        return self.exchanged(attn, hidden_states, query_rotary_emb, perturbation_mask)


def processor_of(attn: Any) -> type[LTX2Processor]:
    perturbed = isinstance(attn.processor, LTX2PerturbedAttnProcessor)
    return LTX2PerturbedProcessor if perturbed else LTX2PlainProcessor


def layer_places(model: Any) -> VideoPlaces:
    config = model.config
    return VideoPlaces(model, (config.patch_size_t, config.patch_size, config.patch_size))


def is_exchangeable(processor: object) -> bool:
    stock = (LTX2AudioVideoAttnProcessor, LTX2PerturbedAttnProcessor)
    return type(processor) in stock or isinstance(processor, LTX2Processor)


LTX2 = Family(
    name="LTX-2",
    model_class="LTX2VideoTransformer3DModel",
    kind="video",
    self_attention=is_self_attention,
    processor=LTX2Processor,
    processor_of=processor_of,
    exchangeable=is_exchangeable,
    places=layer_places,
)
