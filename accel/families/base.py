"""What a family of models and a method agree on: layers, and the layout of one attention call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, MochiAttention
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..context import Context
    from ..methods.base import Strategy

# The walk of Diffusers' own hooks.
_ATTENTION_CLASSES = (Attention, MochiAttention, AttentionModuleMixin)


class NoGrid(Exception):
    """The image tokens of a call form no grid that can be told; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where the image tokens of a layer lie in its sequence.

    Attributes:
        grid: (h, w), or (f, h, w), row-major.
        start: of the grid in the sequence as attention sees it.
        around: tokens of the sequence outside the grid, before and after it: text, reference images.
        hidden_last: tokens that a key mask hides, if any, are the last of the sequence.
    """

    grid: tuple[int, ...] = ()
    start: int = 0
    around: int = 0
    hidden_last: bool = False

    @property
    def tokens(self) -> int:
        """Length of the whole sequence."""
        return math.prod(self.grid) + self.around


@dataclass
class Layout:
    """How the tokens of one layer lie in space, renewed before each denoiser call.

    Attributes:
        layer: dotted name.
        place: of the image tokens in this call; its grid is empty where the family cannot tell.
        plan: what the method wants this layer to do in this call; None for dense.
        backend: Diffusers' attention backend that dense attention of this layer runs on, where the user has chosen one.
    """

    layer: str
    place: Place = Place()
    plan: Any = None
    backend: str | None = None

    @property
    def grid(self) -> tuple[int, ...]:
        return self.place.grid


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

    def count(self, batch: int, tokens: int, pairs: int | Tensor | None, *, searched: bool = False) -> None:
        """Record one self-attention over `tokens` that computed `pairs` query-key pairs an image, None for all.

        A tensor is read only when a report is made, so that counting never waits for a device.
        """
        # A counter inside a compiled region would be a new graph at every call.
        if torch.compiler.is_compiling():
            return
        dense = tokens * tokens
        self.context.recorder.count(
            self.name,
            pairs=batch * (dense if pairs is None else pairs),
            dense_pairs=batch * dense,
            accelerated=pairs is not None,
            searched=searched,
        )


#: From the arguments of a call, by name, to places by dotted layer name. Raises `NoGrid`.
Places = Callable[[dict[str, Any]], dict[str, Place]]


class Rope(Protocol):
    """The rotary positions of a model, whose base (theta) can be changed."""

    def scale(self, factor: float) -> None:
        """Compute with the base times `factor` from the next call on."""

    def restore(self) -> None:
        """As it was, exactly."""


@dataclass(frozen=True)
class Family:
    """A Diffusers model class: how to find its layers and to take part in them.

    Attributes:
        name: as in the support matrix.
        model_class: name of the class in `diffusers`.
        kind: "unet", "image" (a transformer over text and image tokens) or "video"; methods say which they take.
        self_attention: whether a layer of this dotted name attends over image tokens.
        processor: class of our processor, constructible without arguments (IP-Adapter loading re-creates processors).
        processor_of: the subclass of it for one layer, where layers differ.
        exchangeable: whether a processor computes the model's own attention, for which another may stand.
        places: makes, for one model, what tells from the arguments of a call where the image tokens of each
            self-attention layer lie.
        rope: the rotary positions of a model; None where a family has no such thing.
    """

    name: str
    model_class: str
    kind: str
    self_attention: Callable[[str], bool]
    processor: type[Any]
    exchangeable: Callable[[Any], bool]
    places: Callable[[Any], Places]
    processor_of: Callable[[Any], type[Any]] | None = None
    rope: Callable[[Any], Rope] | None = None

    def make_processor(self, attn: Any) -> Any:
        """A processor of ours for one layer."""
        return (self.processor if self.processor_of is None else self.processor_of(attn))()


def attention_layers(model: nn.Module) -> dict[str, Any]:
    """Every attention layer of a model by its dotted name; each has a `processor`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _ATTENTION_CLASSES)}
