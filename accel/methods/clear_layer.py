"""The weights of one layer with circular local attention, and what projects with them (CLEAR, arXiv 2412.16112)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..families.joint import split_heads
from .replacement import ReplacementLayer

#: The name under which an attention layer holds its `ClearLayer`.
CHILD = "clear"
#: Weights of the tokens of a cell, `[1, 1, 1, s, 1, s, 1]`: the far field's keys and values are sums with them.
POOLING = "processor.spatial_weight"
#: The stock projections that are replaced, in the published order. Layers that leave the output to their block lack
#: `to_out`.
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


class ClearLayer(ReplacementLayer):
    """The projections of image tokens in a layer, and how it pools its far field.

    Args:
        tensors: by their names in the published checkpoints; a layer without biases or an output has none here.
        trainable: make parameters of them.
    """

    names: ClassVar[Mapping[str, str]] = {
        "to_q.weight": "query",
        "to_q.bias": "query_bias",
        "to_k.weight": "key",
        "to_k.bias": "key_bias",
        "to_v.weight": "value",
        "to_v.bias": "value_bias",
        "to_out.0.weight": "out",
        "to_out.0.bias": "out_bias",
        POOLING: "spatial_weight",
    }

    @property
    def pooling(self) -> Tensor | None:
        """Weights `[s, s]` of a cell's tokens, fp32; None without a far field."""
        weights: Tensor | None = getattr(self, "spatial_weight", None)
        return None if weights is None else weights.view(weights.shape[3], weights.shape[5]).to(torch.float32)

    def project(self, attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value `[B, S, H, D]` of tokens `[B, S, C]`, before norms and rotary positions; `attn` brings
        adapters (LoRA), if any."""
        projected = (
            self._linear(getattr(attn, f"to_{which}"), hidden_states, name, self._bias(name))
            for which, name in (("q", "query"), ("k", "key"), ("v", "value"))
        )
        query, key, value = split_heads(attn, *projected)
        return query, key, value

    def output(self, attn: Any, attended: Tensor) -> Tensor:
        """The output projection of `[B, S, C]`."""
        return self._linear(attn.to_out[0], attended, "out", self._bias("out"))

    def _bias(self, of: str) -> str | None:
        name = f"{of}_bias"
        return name if hasattr(self, name) else None
