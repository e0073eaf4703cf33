"""What a call of a model's denoiser computes, told from a size within milliseconds once it was counted at another."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...accel import rehearsal
from ...accel.errors import UnsupportedModel
from ...pipelines import attention_cost, skeleton
from ...pipelines.errors import BadInput

if TYPE_CHECKING:
    from ...accel.methods.base import Config
    from ..server.shelf import Offer

# Sizes, methods and numbers of steps that are remembered: some hundred bytes each.
REMEMBERED = 1024

#: Which share of their tokens the layers have, by doublings → operations for each of the tokens, beside attention.
Rest = dict[tuple[int, ...], float | None]


@dataclass(frozen=True)
class Call:
    """Of the denoiser, in the mean over a run, for one picture or clip without guidance.

    Attributes:
        tokens: in the longest attention over the picture or clip, text included where it is joined.
        share: of dense attention's query-key pairs that are computed.
        operations: in matrix products and convolutions; None where they cannot be counted.
    """

    tokens: int
    share: float = 1.0
    operations: float | None = None


class Counts:
    """Of all models; can be asked from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: dict[str, tuple[Any, Rest]] = {}
        # Of this object, not of the class: a cache ends with it.
        self._remembered = functools.lru_cache(REMEMBERED)(self._counted)

    def call(
        self, offer: Offer, width: int, height: int, frames: int | None, steps: int = 1, configs: Sequence[Config] = ()
    ) -> Call:
        """
        Args:
            width: in pixels, as `height`.
            frames: that the denoiser sees at a time, of a clip.
            steps: of the run.
            configs: of the methods in place.

        Raises:
            BadInput: a method cannot act at this size or in so many steps.
        """
        with self._lock:
            return self._remembered(offer, width, height, frames, steps if configs else 1, tuple(configs))

    def _counted(
        self, offer: Offer, width: int, height: int, frames: int | None, steps: int, configs: tuple[Config, ...]
    ) -> Call:
        if offer.label not in self._models:
            # Its own, as methods are put in place to count them, and others look at that of the offer meanwhile.
            self._models[offer.label] = skeleton.skeleton_pipe(offer.model), {}
        pipe, rest = self._models[offer.label]
        denoiser = attention_cost.denoiser_of(pipe)
        try:
            arguments = attention_cost.arguments_of(pipe, offer.preset, width=width, height=height, frames=frames)
            stock = {name: place.tokens for name, place in rehearsal.places(denoiser, arguments).items()}
        except UnsupportedModel:  # then without the text
            return Call(math.prod(attention_cost.grid_of(pipe, width, height, frames)))
        counts = _Scaled(denoiser, arguments, stock, rest)
        try:
            run = rehearsal.rehearse(denoiser, configs, arguments, steps=steps, operations=counts, pipeline=pipe)
        except ValueError as error:
            raise BadInput(f"{' + '.join(config.name for config in configs)}: {error}") from error
        return Call(max(stock.values()), run.share, run.operations and run.operations / steps)


class _Scaled(rehearsal.CallOperations):
    """Counts a model once. At other sizes attention grows as its pairs do, and all else as the tokens.

    Counting takes a second or more for a large model. What does not grow at all, such as the layers of the text alone,
    is small beside the rest.

    Args:
        stock: tokens of each layer without a method.
        rest: of this model, filled in.
    """

    def __init__(self, model: Any, arguments: Mapping[str, Any], stock: Mapping[str, int], rest: Rest) -> None:
        super().__init__(model, arguments)
        self._stock, self._rest = stock, rest

    def of_a_call(self, tokens: Mapping[str, int], pairs: Mapping[str, float]) -> float | None:
        # A method may make maps smaller, by a factor of 2 or 4 a side; odd ones are rounded up.
        kind = tuple(round(math.log2(count / self._stock[name])) for name, count in tokens.items())
        if kind not in self._rest:
            whole = super().of_a_call(tokens, dict.fromkeys(tokens, 0.0))
            self._rest[kind] = None if whole is None else whole / sum(tokens.values())
        rest = self._rest[kind]
        return None if rest is None else rest * sum(tokens.values()) + self.attention(pairs)
