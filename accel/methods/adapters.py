"""Adapters (LoRA and its kin) on a projection whose weights a method replaces: what they add must stay."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def adapter_delta(module: nn.Module, inputs: Tensor) -> Tensor | None:
    """What the adapters on a linear layer add to its output for `inputs` `[..., C]`; None where there are none.

    Adapters in use and those fused into the weights both count. The layer's own weights do not: a plain LoRA is
    computed by itself, any other kind (DoRA, LoKr …) as the difference it makes to the layer.

    Raises:
        ValueError: for an adapter of another kind that is fused, and so no longer to be told from the weights.
    """
    layer: Any = module
    if not hasattr(layer, "base_layer") or layer.disable_adapters:
        return None
    if hasattr(layer, "lora_A") and not getattr(layer, "lora_variant", None):
        names = layer.merged_adapters if layer.merged else layer.active_adapters
        parts = [_lora(layer, name, inputs) for name in names if name in layer.lora_A]
        return sum(parts[1:], parts[0]) if parts else None
    if layer.merged:
        raise ValueError(
            f"{', '.join(layer.merged_adapters)}: an adapter that is no plain LoRA cannot be fused while its layer is "
            "replaced; unfuse it (unfuse_lora), it is then computed beside the layer"
        )
    difference: Tensor = layer(inputs) - layer.base_layer(inputs)
    return difference


def _lora(layer: Any, name: str, inputs: Tensor) -> Tensor:
    down, up = layer.lora_A[name], layer.lora_B[name]
    added: Tensor = up(down(layer.lora_dropout[name](inputs.to(down.weight.dtype)))) * layer.scaling[name]
    return added.to(inputs.dtype)
