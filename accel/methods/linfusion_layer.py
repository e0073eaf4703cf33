"""The weights of one linear-attention layer, and what projects with them (LinFusion, arXiv 2409.02097, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .replacement import ReplacementLayer, own_tensors

#: The name under which an attention layer holds its `LinFusionLayer`.
CHILD = "linfusion"
# From the names of the published checkpoints to those of the tensors here: a registered tensor has no dot in its name.
_PROJECTIONS = {
    "to_q.weight": "query",
    "to_k.weight": "key",
    "to_v.weight": "value",
    "to_out.0.weight": "out",
    "to_out.0.bias": "out_bias",
}
_MLP = {
    "0.weight": "in",
    "0.bias": "in_bias",
    "1.weight": "norm",
    "1.bias": "norm_bias",
    "3.weight": "out",
    "3.bias": "out_bias",
}
PUBLISHED = {
    **_PROJECTIONS,
    **{
        f"{to}.{key}": f"{branch}_{name}"
        for to, branch in (("to_q_", "query"), ("to_k_", "key"))
        for key, name in _MLP.items()
    },
}


class LinFusionLayer(ReplacementLayer):
    """The 17 tensors of a layer.

    Args:
        tensors: by their names in the published checkpoints; without those of an MLP (5 tensors) its refinement is
            the identity, as `projection_mid_dim` -1 asks.
        trainable: make parameters of them.
    """

    names: ClassVar[Mapping[str, str]] = PUBLISHED

    def __init__(self, tensors: Mapping[str, Tensor], *, trainable: bool = False) -> None:
        super().__init__(tensors, trainable=trainable)
        self.has_mlp = "to_q_.0.weight" in tensors

    def project(self, attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value `[B, S, C]` of hidden states `[B, S, C]`; `attn` brings adapters (LoRA), if any."""
        for_query, for_key = self._refined(hidden_states, "query"), self._refined(hidden_states, "key")
        return (
            self._linear(attn.to_q, for_query, "query"),
            self._linear(attn.to_k, for_key, "key"),
            self._linear(attn.to_v, hidden_states, "value"),
        )

    def output(self, attn: Any, attended: Tensor) -> Tensor:
        """The output projection of `[B, S, C]`."""
        return self._linear(attn.to_out[0], attended, "out", "out_bias")

    def _refined(self, hidden_states: Tensor, branch: str) -> Tensor:
        """x + f(x), f a two-layer MLP over the full width."""
        if not self.has_mlp:
            return hidden_states + hidden_states  # the published code adds the identity
        weight, bias, scale, shift, out, out_bias = (self._like(hidden_states, f"{branch}_{x}") for x in _MLP.values())
        hidden = F.layer_norm(F.linear(hidden_states, weight, bias), scale.shape, scale, shift)
        # In place: two more tensors cost 6 to 9 % of the time of a layer of 320 channels on a CPU.
        return F.linear(F.leaky_relu(hidden, inplace=True), out, out_bias).add_(hidden_states)


def from_stock(attn: Any, mid: int | None = None) -> dict[str, Tensor]:
    """Where distillation starts: a layer's own projections, and MLPs whose last layer is zero, so that x + f(x) = x.

    Args:
        attn: a self-attention layer of Diffusers.
        mid: width of the MLPs, the layer's own by default.

    Raises:
        WeightsError: for projections that are quantised, or have an adapter fused into them.
    """
    tensors = own_tensors(attn, _PROJECTIONS)
    weight = tensors["to_q.weight"]
    width = weight.shape[1]
    mid = width if mid is None else mid
    for branch in ("to_q_", "to_k_"):
        first = nn.Linear(width, mid)
        tensors |= {
            f"{branch}.0.weight": first.weight.detach(),
            f"{branch}.0.bias": first.bias.detach(),
            f"{branch}.1.weight": torch.ones(mid),
            f"{branch}.1.bias": torch.zeros(mid),
            f"{branch}.3.weight": torch.zeros(width, mid),
            f"{branch}.3.bias": torch.zeros(width),
        }
    return {name: tensor.to(weight.device, weight.dtype) for name, tensor in tensors.items()}
