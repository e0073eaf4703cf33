"""Tensors of a checkpoint that stand for a layer's own projections: where they live, and what projects with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..errors import WeightsError
from .adapters import adapter_delta


class ReplacementLayer(nn.Module):
    """Tensors of one attention layer, in it but outside its state dict.

    They are buffers that are not persistent: so they follow `.to()` and offloading, while `save_pretrained` and
    `ControlNetModel.from_unet` see the stock layer alone. For training they are parameters.

    Args:
        tensors: by their names in the published checkpoints.
        trainable: make parameters of them.
    """

    #: From the published names to those of the tensors here: a registered tensor has no dot in its name.
    names: ClassVar[Mapping[str, str]]

    def __init__(self, tensors: Mapping[str, Tensor], *, trainable: bool = False) -> None:
        super().__init__()
        for published, name in self.names.items():
            if published not in tensors:
                continue
            if trainable:
                self.register_parameter(name, nn.Parameter(tensors[published]))
            else:
                self.register_buffer(name, tensors[published], persistent=False)

    @classmethod
    def beside(cls, attn: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Self:
        """A layer whose tensors are where `attn` computes.

        Args:
            dtype: that its model computes in; Diffusers goes through all modules to tell it, so ask once.
        """
        where = device_of(attn)
        return cls({name: x.to(where, dtype) for name, x in tensors.items()})

    def published(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors by their published names, in the published order."""
        for published, name in self.names.items():
            if hasattr(self, name):
                yield published, getattr(self, name)

    def _linear(self, stock: nn.Module, inputs: Tensor, weight: str, bias: str | None = None) -> Tensor:
        """A projection by tensors of these names, and what the adapters (LoRA) on the stock one add to it."""
        projected = F.linear(inputs, self._like(inputs, weight), None if bias is None else self._like(inputs, bias))
        delta = adapter_delta(stock, inputs)
        # Under autocast the inputs may be of another dtype than what is made of them.
        return projected if delta is None else projected + delta.to(projected.dtype)

    def _like(self, inputs: Tensor, name: str) -> Tensor:
        """A tensor where the inputs are: offloading that was set up before the layer came does not move it."""
        tensor: Tensor = getattr(self, name)
        return tensor.to(inputs.device, inputs.dtype)


def device_of(attn: Any) -> torch.device:
    """Where a layer's own weights are, or where its offloading hook computes."""
    base = base_layer(attn.to_q)
    device: torch.device = base.weight.device
    if device.type == "meta":
        return torch.device(getattr(getattr(base, "_hf_hook", None), "execution_device", "cpu"))
    return device


def base_layer(projection: Any) -> Any:
    """A linear layer without the adapters on it."""
    return getattr(projection, "base_layer", projection)


def own_tensors(attn: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of a layer's own tensors, such as "to_q.weight".

    Raises:
        WeightsError: for projections that are quantised, or have an adapter fused into them.
    """
    tensors: dict[str, Tensor] = {}
    for name in names:
        path, _, which = name.rpartition(".")
        projection: Any = attn.get_submodule(path)
        base = base_layer(projection)
        if getattr(projection, "merged", False):
            raise WeightsError(
                f"a layer's own {path} cannot be taken over while {', '.join(projection.merged_adapters)} is fused "
                "into it: unfuse it first (unfuse_lora)"
            )
        if not base.weight.is_floating_point():
            raise WeightsError(f"a layer's own {path} cannot be taken over: its weights are {base.weight.dtype}")
        with align_module_device(base):  # offloaded layer by layer, they are elsewhere
            tensors[name] = getattr(base, which).detach().clone()
    return tensors


def renew_group_offloading(model: nn.Module) -> None:
    """Have Diffusers' group offloading list the model's tensors anew: it moves those it knows and trips over others."""
    from diffusers.hooks import group_offloading

    group_offloading._maybe_remove_and_reapply_group_offloading(model)
