"""Z-Image: image and text tokens in one sequence, image first, each padded to a multiple of 32 tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, RopeEmbedder, ZSingleStreamAttnProcessor
from torch import Tensor

from .base import Family, NoGrid, Place, Places, attention_layers
from .joint import DispatchingProcessor, let_guiders_know, normed, project, rotate


class ZImageProcessor(DispatchingProcessor, ZSingleStreamAttnProcessor):
    """Stock attention of a block, with the middle exchanged for a method's."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
        **others: Any,
    ) -> Any:
        slot = self.slot
        if slot is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
        why_not = ""
        if attention_mask is not None and attention_mask.ndim != 2:
            why_not = f"an attention mask of shape {tuple(attention_mask.shape)} is not one of keys"
        if not self.takes(hidden_states, hidden_states.shape[1], why_not):
            return slot.original(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis, **others)
        strategy = slot.strategy
        query, key, value = strategy.project(attn, hidden_states, partial(project, attn))
        query, key = normed(attn.norm_q, query), normed(attn.norm_k, key)
        if freqs_cis is not None:
            query, key = (rotate(x, freqs_cis, use_real=False) for x in (query, key))
        attended = self.attend(query, key, value, key_mask=attention_mask)
        return attn.to_out[1](strategy.output(attn, attended.flatten(2), attn.to_out[0]))


let_guiders_know(ZImageProcessor, ZSingleStreamAttnProcessor)


def layer_places(model: Any) -> Places:
    return partial(_layer_places, [name for name in attention_layers(model) if is_self_attention(name)])


def _layer_places(layers: list[str], arguments: dict[str, Any]) -> dict[str, Place]:
    pictures = arguments["x"]
    if isinstance(pictures[0], list):
        raise NoGrid("several pictures in one sequence are not one grid")
    if any(picture.shape != pictures[0].shape for picture in pictures):
        raise NoGrid(f"the pictures of the batch differ in shape: {[tuple(picture.shape) for picture in pictures]}")
    patch, frame_patch = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    frames, height, width = pictures[0].shape[-3:]
    if frames != frame_patch:
        raise NoGrid(f"{frames // frame_patch} frames are not one grid")
    grid = int(height) // patch, int(width) // patch
    padding = -(grid[0] * grid[1]) % SEQ_MULTI_OF
    # The texts of a batch are padded to the longest.
    text = max(_padded(len(text)) for text in arguments["cap_feats"])
    return {layer: Place(grid, around=padding + (text if layer.startswith("layers.") else 0)) for layer in layers}


def _padded(tokens: int) -> int:
    return tokens + -tokens % SEQ_MULTI_OF


class ZImageRope:
    """Rotary positions whose frequencies are computed once, from `theta`, at the first call.

    Args:
        embedder: the model's own.
    """

    def __init__(self, embedder: RopeEmbedder) -> None:
        self._embedder = embedder
        self._own = embedder.theta, embedder.freqs_cis
        self._factor = 1.0

    def scale(self, factor: float) -> None:
        if factor == self._factor:
            return
        self.restore()
        if factor != 1:
            self._embedder.theta, self._embedder.freqs_cis = self._own[0] * factor, None
        self._factor = factor

    def restore(self) -> None:
        self._embedder.theta, self._embedder.freqs_cis = self._own
        self._factor = 1.0


def rope_of(model: Any) -> ZImageRope:
    return ZImageRope(model.rope_embedder)


def is_self_attention(layer: str) -> bool:
    """Not those of `context_refiner` and `siglip_refiner`, which see no token of the picture."""
    return layer.startswith(("layers.", "noise_refiner."))


def is_exchangeable(processor: object) -> bool:
    return type(processor) in (ZSingleStreamAttnProcessor, ZImageProcessor)


Z_IMAGE = Family(
    name="Z-Image",
    model_class="ZImageTransformer2DModel",
    kind="image",
    self_attention=is_self_attention,
    processor=ZImageProcessor,
    exchangeable=is_exchangeable,
    places=layer_places,
    rope=rope_of,
)
