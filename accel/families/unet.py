"""The Stable Diffusion U-Net (SD 1.5, 2.1, SDXL): its self-attention layers, and the sizes of its feature maps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor

from .base import Family, Place, Places, Slot

Size = tuple[int, int]

# Their whole computation is project, attend, finish, so only the middle needs exchanging.
_STOCK = (AttnProcessor2_0, FusedAttnProcessor2_0)
# The same result by another road, which somebody chose to save memory.
_EQUIVALENT = (*_STOCK, AttnProcessor, SlicedAttnProcessor, XFormersAttnProcessor)


class UNetAttnProcessor(AttnProcessor2_0):
    """Stock attention with the middle exchanged for a method's.

    Without a slot, or in a call for which the method has no plan, it is the original processor, bit for bit. A
    processor that is not a stock one is kept: called on what the method makes of its input where the method offers
    that (`Strategy.around`), else left to run as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slot: Slot | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        slot = self.slot
        if slot is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        # Not every processor takes a time embedding.
        rest = (temb, *args) if args or temb is not None else ()
        plan = slot.layout.plan
        if plan is None or not _fits(slot, attn, hidden_states, encoder_hidden_states, attention_mask):
            _count(slot, hidden_states, None)
            return slot.original(attn, hidden_states, encoder_hidden_states, attention_mask, *rest, **kwargs)
        _count(slot, hidden_states, plan.pairs)
        strategy = slot.strategy
        if strategy.wraps and (plan.around or attention_mask is not None or not _is_plain(attn, slot.original, _STOCK)):

            def run(tokens: Tensor, mask: Tensor | None) -> Tensor:
                return slot.original(attn, tokens, None, mask, *rest, **kwargs)

            return strategy.around(run, hidden_states, attention_mask, slot.layout)
        fused = isinstance(slot.original, FusedAttnProcessor2_0)
        query, key, value = strategy.project(attn, hidden_states, partial(project, attn, fused=fused))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        attended = strategy.attend(query, key, value, slot.layout, slot.context)
        return finish(attn, strategy.output(attn, attended.flatten(-2), attn.to_out[0]), hidden_states)


def _count(slot: Slot, hidden_states: Tensor, pairs: int | None) -> None:
    if hidden_states.ndim == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    batch, tokens = hidden_states.shape[:2]
    slot.count(batch, tokens, pairs)


def project(attn: Attention, hidden_states: Tensor, *, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `[B, S, H, D]` of self-attention; calls the modules, so LoRA and offloading take part.

    The processor says whether projections are fused: unfusing leaves the fused weights, then stale, on the module.
    """
    if fused:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
    return query, key, value


def finish(attn: Attention, projected: Tensor, residual: Tensor) -> Tensor:
    """From the output projection `[B, S, C]` to hidden states, as the stock processor ends."""
    hidden_states: Tensor = attn.to_out[1](projected)
    if attn.residual_connection:
        hidden_states = hidden_states + residual
    return hidden_states / attn.rescale_output_factor


def _fits(
    slot: Slot,
    attn: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
) -> bool:
    """Whether the plan fits this call; where it does not, the layer runs dense and the report says why."""
    grid = slot.layout.grid
    tokens = hidden_states.shape[1] if hidden_states.ndim == 3 else 0
    if encoder_hidden_states is not None:
        why = "called with other tokens to attend to"
    elif not slot.strategy.wraps and attention_mask is not None:
        why = "an attention mask was given, which the method cannot honour"
    elif not slot.strategy.wraps and not _is_plain(attn, slot.original, _EQUIVALENT):
        why = f"{type(slot.original).__name__} computes its own attention"
    elif tokens != math.prod(grid):
        why = f"{tokens} tokens do not form the expected {'x'.join(map(str, grid))} grid"
    elif attention_mask is not None and tuple(attention_mask.shape[1:]) != (1, tokens):
        why = f"an attention mask of shape {tuple(attention_mask.shape)} is not one of keys"
    else:
        return True
    slot.context.recorder.note(f"{slot.name} ran dense: {why}", warn=True)
    return False


def _is_plain(attn: Attention, processor: object, plain: tuple[type, ...]) -> bool:
    return type(processor) in plain and attn.spatial_norm is None and attn.group_norm is None


def latent_size(arguments: dict[str, Any]) -> Size:
    """(h, w) of the latent in a U-Net call."""
    height, width = arguments["sample"].shape[-2:]
    return int(height), int(width)


def is_self_attention(layer: str) -> bool:
    return layer.endswith(".attn1")


def is_exchangeable(processor: object) -> bool:
    return type(processor) in (*_EQUIVALENT, UNetAttnProcessor)


def layer_places(unet: Any) -> Places:
    """Tells the place of each transformer block's self-attention in a U-Net call."""
    return partial(_layer_places, unet)


def _layer_places(unet: Any, arguments: dict[str, Any]) -> dict[str, Place]:
    return places_by_layer(unet, unet_sizes(unet, latent_size(arguments)))


def places_by_layer(unet: Any, sizes: UNetSizes) -> dict[str, Place]:
    """`sizes.transformers` spread over the self-attention layers inside them."""
    return {
        f"{name}.transformer_blocks.{block}.attn1": Place(size)
        for name, size in sizes.transformers.items()
        for block in range(len(getattr(unet.get_submodule(name), "transformer_blocks", ())))
    }


UNET = Family(
    name="Stable Diffusion U-Net",
    model_class="UNet2DConditionModel",
    kind="unet",
    self_attention=is_self_attention,
    processor=UNetAttnProcessor,
    exchangeable=is_exchangeable,
    places=layer_places,
)


@dataclass(frozen=True)
class UNetSizes:
    """Sizes (h, w) of a U-Net's feature maps.

    Attributes:
        skips: of every skip connection, in the order in which they are made.
        middle: of the mid block.
        adapters: where a T2I-Adapter's features are added: after the last pair of a block with attention, after the
            whole of a block without.
        transformers: of every `Transformer2DModel`, by dotted name.
    """

    skips: tuple[Size, ...]
    middle: Size
    adapters: tuple[Size, ...]
    transformers: dict[str, Size]


def unet_sizes(unet: Any, size: Size, *, quartered: int | None = None, pooled: int | None = None) -> UNetSizes:
    """Sizes inside a U-Net for a latent of `size`.

    Args:
        unet: a `UNet2DConditionModel`.
        size: (h, w) of the latent.
        quartered: level whose downsampler divides by four instead of two.
        pooled: level whose map is halved after its first pair on the way down, and restored on the way up after the
            pair that takes the last pooled skip.
    """
    skips, adapters, transformers = [size], [], {}
    for level, block in enumerate(unet.down_blocks):
        pairs = len(block.resnets)
        has_attention = getattr(block, "attentions", None) is not None
        for pair in range(pairs):
            if has_attention:
                transformers[f"down_blocks.{level}.attentions.{pair}"] = size
            if pair == 0 and level == pooled:
                size = _divided(size, 2)
            skips.append(size)
        if has_attention:
            adapters.append(size)
        if block.downsamplers is not None:
            size = _divided(size, 4 if level == quartered else 2)
            skips.append(size)
        if not has_attention:
            adapters.append(size)
    if getattr(unet.mid_block, "attentions", None) is not None:
        transformers["mid_block.attentions.0"] = size
    # Going up, each pair runs at the size of the skip it takes.
    taken = reversed(skips)
    for level, block in enumerate(unet.up_blocks):
        for pair, skip in zip(range(len(block.resnets)), taken, strict=False):
            if getattr(block, "attentions", None) is not None:
                transformers[f"up_blocks.{level}.attentions.{pair}"] = skip
    return UNetSizes(tuple(skips), size, tuple(adapters), transformers)


def _divided(size: Size, by: int) -> Size:
    return -(-size[0] // by), -(-size[1] // by)
