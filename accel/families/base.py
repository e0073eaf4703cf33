"""What a family of models and a method agree on: layers, and the layout of one attention call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, MochiAttention
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..context import Context
    from ..methods.base import Strategy

# The walk of Diffusers' own hooks.
_ATTENTION_CLASSES = (Attention, MochiAttention, AttentionModuleMixin)


@dataclass
class Layout:
    """How the tokens of one layer lie in space, renewed before each denoiser call.

    Attributes:
        layer: dotted name.
        grid: (h, w), or (f, h, w), of the image tokens in this call; empty where the family cannot tell.
        plan: what the method wants this layer to do in this call; None for dense.
    """

    layer: str
    grid: tuple[int, ...] = ()
    plan: Any = None


@dataclass
class Slot:
    """One attention layer of one model, as its processor sees it.

    Attributes:
        layout: renewed before each call.
        original: the processor that was there, and is there again after `disable`.
        processor: ours.
    """

    module: Any
    original: Any
    strategy: Strategy
    context: Context
    layout: Layout
    processor: Any = None

    @property
    def name(self) -> str:
        return self.layout.layer

    def count(self, hidden_states: Tensor, pairs: int | None) -> None:
        """Record one self-attention over `[B, S, C]` that computed `pairs` query-key pairs an image, None for all."""
        # A counter inside a compiled region would be a new graph at every call.
        if torch.compiler.is_compiling():
            return
        batch, length = hidden_states.shape[:2]
        dense = length * length
        self.context.recorder.count(
            self.name,
            pairs=batch * (dense if pairs is None else pairs),
            dense_pairs=batch * dense,
            accelerated=pairs is not None,
            planned=self.layout.plan is not None,
        )


@dataclass(frozen=True)
class Family:
    """A Diffusers model class: how to find its layers and to take part in them.

    Attributes:
        name: as in the support matrix.
        model_class: name of the class in `diffusers`.
        self_attention: whether a layer of this dotted name attends over image tokens.
        processor: class of our processor, constructible without arguments (IP-Adapter loading re-creates processors).
        exchangeable: whether a processor computes the model's own attention, for which another may stand.
        size: (h, w) or (f, h, w) of the latent in a call's arguments.
        grids: from a model and such a size, the grid of image tokens in each self-attention layer, by dotted name.
    """

    name: str
    model_class: str
    self_attention: Callable[[str], bool]
    processor: type[Any]
    exchangeable: Callable[[Any], bool]
    size: Callable[[dict[str, Any]], tuple[int, ...]]
    grids: Callable[[Any, tuple[int, ...]], dict[str, tuple[int, ...]]]


def attention_layers(model: nn.Module) -> dict[str, Any]:
    """Every attention layer of a model by its dotted name; each has a `processor`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _ATTENTION_CLASSES)}
