"""Qwen-Image: text and image tokens in one sequence, text first; reference images (Edit) follow the image."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenEmbedRope,
    apply_rotary_emb_qwen,
)
from torch import Tensor

from ..errors import UnsupportedModel
from .base import Family, NoGrid, Place, Places, attention_layers
from .joint import DispatchingProcessor, let_guiders_know, normed, project, project_text

# Its annotation says that it returns two.
_rotate: Any = apply_rotary_emb_qwen


class QwenImageProcessor(DispatchingProcessor, QwenDoubleStreamAttnProcessor2_0):
    """Stock attention of a double block, with the middle exchanged for a method's."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **others: Any,
    ) -> Any:
        slot, text, text_mask = self.slot, encoder_hidden_states, encoder_hidden_states_mask
        if slot is None:
            stock: Any = super()
            return stock.__call__(attn, hidden_states, text, text_mask, attention_mask, image_rotary_emb)
        # Stock attention refuses to go without text or with a mask of its own.
        tokens = hidden_states.shape[1] + (0 if text is None else text.shape[1])
        if text is None or attention_mask is not None or not self.takes(hidden_states, tokens):
            return slot.original(attn, hidden_states, text, text_mask, attention_mask, image_rotary_emb, **others)
        strategy = slot.strategy
        query, key, value = strategy.project(attn, hidden_states, partial(project, attn))
        query, key = normed(attn.norm_q, query), normed(attn.norm_k, key)
        text_query, text_key, text_value = project_text(attn, text)
        text_query, text_key = normed(attn.norm_added_q, text_query), normed(attn.norm_added_k, text_key)
        if image_rotary_emb is not None:
            image_freqs, text_freqs = image_rotary_emb
            query, key = (_rotate(x, image_freqs, use_real=False) for x in (query, key))
            text_query, text_key = (_rotate(x, text_freqs, use_real=False) for x in (text_query, text_key))
        query = torch.cat([text_query, query], dim=1)
        key = torch.cat([text_key, key], dim=1)
        value = torch.cat([text_value, value], dim=1)
        key_mask = None
        if text_mask is not None:
            key_mask = torch.cat([text_mask, text_mask.new_ones(hidden_states.shape[:2])], dim=1)
        attended = self.attend(query, key, value, key_mask=key_mask).flatten(2)
        attended_text, attended = attended.split_with_sizes([text.shape[1], hidden_states.shape[1]], dim=1)
        image = attn.to_out[1](strategy.output(attn, attended, attn.to_out[0]))
        return image, attn.to_add_out(attended_text)


let_guiders_know(QwenImageProcessor, QwenDoubleStreamAttnProcessor2_0)


def layer_places(model: Any) -> Places:
    return partial(_layer_places, list(attention_layers(model)), layered=bool(model.config.use_layer3d_rope))


def _layer_places(layers: list[str], arguments: dict[str, Any], *, layered: bool) -> dict[str, Place]:
    shapes = arguments.get("img_shapes")
    if not shapes:
        raise NoGrid("without img_shapes the image tokens have no rows and columns")
    if layered:
        raise NoGrid("a picture in layers is not one grid")
    # One list for each picture of the batch: its own shape, then those of reference images.
    if isinstance(shapes, list):
        if any(shape != shapes[0] for shape in shapes):
            raise NoGrid(f"the pictures of the batch differ in shape: {shapes}")
        shapes = shapes[0]
    (frames, height, width), *references = shapes if isinstance(shapes, list) else [shapes]
    if frames != 1:
        raise NoGrid(f"{frames} frames are not one grid")
    text = arguments["encoder_hidden_states"].shape[1]
    place = Place((height, width), start=text, around=text + sum(math.prod(shape) for shape in references))
    return dict.fromkeys(layers, place)


def _device_freqs(module: QwenEmbedRope, device: torch.device) -> tuple[Tensor, Tensor]:
    module.pos_freqs, module.neg_freqs = module.pos_freqs.to(device), module.neg_freqs.to(device)
    return module.pos_freqs, module.neg_freqs


# Diffusers keeps what it computes in caches of the class, by module: they would outlive a change of its base.
_UNCACHED = {
    "_compute_video_freqs": QwenEmbedRope._compute_video_freqs.__wrapped__,
    "_get_device_freqs": _device_freqs,
}


class QwenRope:
    """Rotary positions whose frequencies lie in tables, which stand aside while others are used.

    Args:
        module: the model's own.
    """

    def __init__(self, module: QwenEmbedRope) -> None:
        self._module = module
        self._tables = module.pos_freqs, module.neg_freqs
        self._factor = 1.0

    def scale(self, factor: float) -> None:
        if factor == self._factor:
            return
        self.restore()
        if factor != 1:
            module = self._module
            scaled = QwenEmbedRope(module.theta * factor, module.axes_dim, module.scale_rope)  # type: ignore[arg-type]
            module.pos_freqs, module.neg_freqs = scaled.pos_freqs, scaled.neg_freqs
            vars(module).update({name: partial(method, module) for name, method in _UNCACHED.items()})
        self._factor = factor

    def restore(self) -> None:
        self._module.pos_freqs, self._module.neg_freqs = self._tables
        for name in _UNCACHED:
            vars(self._module).pop(name, None)
        self._factor = 1.0


def rope_of(model: Any) -> QwenRope:
    """Of a model whose pictures have no layers.

    Raises:
        UnsupportedModel: for positions of another class.
    """
    if type(model.pos_embed) is not QwenEmbedRope:
        raise UnsupportedModel(
            f"the base of rotary positions of class {type(model.pos_embed).__name__} cannot be changed"
        )
    return QwenRope(model.pos_embed)


def is_self_attention(layer: str) -> bool:
    return layer.endswith(".attn")


def is_exchangeable(processor: object) -> bool:
    return type(processor) in (QwenDoubleStreamAttnProcessor2_0, QwenImageProcessor)


QWEN_IMAGE = Family(
    name="Qwen-Image",
    model_class="QwenImageTransformer2DModel",
    kind="image",
    self_attention=is_self_attention,
    processor=QwenImageProcessor,
    exchangeable=is_exchangeable,
    places=layer_places,
    rope=rope_of,
)
