"""What attention is going to cost: a run's plans, made for an empty model and counted as a run would count them."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .context import Clock
from .errors import AttnswapWarning
from .families import family_of
from .families.base import Layout, Place, attention_layers
from .families.joint import head_dim
from .install import Installation
from .methods.base import Config, Strategy
from .observe import Call

#: Tokens of the grid up to which masks are made to count them. Of more they keep about the same share, and would take
#: memory by the square of the tokens.
MOST_TOKENS = 30_000


@dataclass(frozen=True)
class LayerCost:
    """Query-key pairs of a layer in a run, for one picture or clip: `dense_pairs` are those of dense attention over the
    tokens it then has. Of a layer in which the method never acts, both are all."""

    pairs: float
    dense_pairs: int
    accelerated: bool


@dataclass(frozen=True)
class Rehearsal:
    """What self-attention over the picture or clip is expected to compute, without guidance or a batch.

    Attributes:
        steps: of the run.
        pairs: of each step.
        dense_pairs: of a call of the stock model.
        operations: of all calls of the run, beside what a method adds to the model (`CallOperations`).
        layers: by dotted name, over the run.
        notes: what the report of such a run would say.
    """

    steps: int
    pairs: tuple[float, ...]
    dense_pairs: int
    operations: float | None
    layers: Mapping[str, LayerCost]
    notes: tuple[str, ...]

    @property
    def share(self) -> float:
        """Pairs computed in the run over those of the stock model."""
        return sum(self.pairs) / (self.steps * self.dense_pairs)

    @property
    def share_of_last(self) -> float:
        """The same of the last step, when what is only done at first is over."""
        return self.pairs[-1] / self.dense_pairs

    @property
    def density(self) -> float:
        """That of `Report.density`: in the layers the method has, over the tokens they have at each step."""
        ours = [layer for layer in self.layers.values() if layer.accelerated]
        whole = sum(layer.dense_pairs for layer in ours)
        return sum(layer.pairs for layer in ours) / whole if whole else 1.0


def places(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Place]:
    """Where the tokens of a picture or clip lie in each self-attention layer of a call.

    Raises:
        NoGrid: they form no grid that can be told.
    """
    return family_of(model).places(model)(dict(arguments))


class CallOperations:
    """Operations of a call of an empty model, in matrix products and convolutions, two for each product.

    It is run on tensors without data. Counts are kept by the tokens of the layers: a method may change the sizes of
    maps from step to step.

    Args:
        model: on the meta device.
        arguments: of a call (`families.calls.call_arguments`).
    """

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        self._model, self._arguments = model, arguments
        self._counted: dict[tuple[int, ...], float | None] = {}
        layers = attention_layers(model)
        self._widths = {name: layers[name].heads * head_dim(layers[name]) for name in places(model, arguments)}

    def attention(self, pairs: Mapping[str, float]) -> float:
        """Of self-attention over the picture or clip, by the query-key pairs of each layer: scores, and their sums of
        values."""
        return sum(4.0 * count * self._widths[name] for name, count in pairs.items())

    def of_a_call(self, tokens: Mapping[str, int], pairs: Mapping[str, float]) -> float | None:
        """Of all of it, with so many tokens and pairs in each layer; None where the model looks at data on its way.

        Args:
            tokens: those it has in a call now.
        """
        key = tuple(tokens.values())
        if key not in self._counted:
            self._counted[key] = self._run()
        dense = self._counted[key]
        if dense is None:
            return None
        return dense - self.attention({name: count**2 for name, count in tokens.items()}) + self.attention(pairs)

    def _run(self) -> float | None:
        counter = FlopCounterMode(display=False)
        try:
            with counter, torch.no_grad():
                self._model(**{name: _without_data(value) for name, value in self._arguments.items()})
        except (RuntimeError, NotImplementedError):
            return None
        return float(counter.get_total_flops())


def _without_data(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def rehearse(
    model: nn.Module,
    configs: Sequence[Config],
    arguments: Mapping[str, Any],
    *,
    steps: int,
    operations: CallOperations,
    pipeline: Any = None,
) -> Rehearsal:
    """A run with methods, of which nothing but the plans is made.

    Args:
        model: an empty denoiser (on the meta device), which is left as it was.
        configs: none for dense attention.
        arguments: of a call (`families.calls.call_arguments`).
        operations: of such calls.
        pipeline: the model belongs to.

    Raises:
        UnsupportedModel: a method cannot apply to any layer.
        ValueError: or not to this size or number of steps.
    """
    clock = Clock()
    installation = Installation(model, configs, clock, pipeline=pipeline)
    # What changes the sizes of maps does so by edits to the model.
    resizing = [strategy for strategy in installation.strategies if strategy.resizes]
    slots, stock = installation.slots, places(model, arguments)
    layouts = {name: slots[name].layout if name in slots else Layout(name) for name in stock}
    layers: dict[str, LayerCost] = {name: LayerCost(0.0, 0, name in slots) for name in stock}
    per_step: list[tuple[float, float | None]] = []
    timesteps = torch.linspace(1000, 1, steps)
    clock.set_timesteps(timesteps)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", AttnswapWarning)  # nothing has happened yet
        for strategy in resizing:
            strategy.install(passive=False)
            stack.callback(strategy.remove)
        for timestep in timesteps:
            clock.tick(timestep, "rehearsal")
            installation.plan(Call(dict(arguments)), layouts)
            tokens = {name: layout.place.tokens for name, layout in layouts.items()}
            pairs = {name: _pairs(installation, layout) for name, layout in layouts.items()}
            for name, cost in layers.items():
                whole = cost.dense_pairs + tokens[name] ** 2
                layers[name] = replace(cost, pairs=cost.pairs + pairs[name], dense_pairs=whole)
            per_step.append((sum(pairs.values()), operations.of_a_call(tokens, pairs)))
    counted = [count for _, count in per_step if count is not None]
    return Rehearsal(
        steps=steps,
        pairs=tuple(pairs for pairs, _ in per_step),
        dense_pairs=sum(place.tokens**2 for place in stock.values()),
        operations=math.fsum(counted) if len(counted) == steps else None,
        layers=layers,
        notes=tuple(installation.recorder.notes),
    )


def _pairs(installation: Installation, layout: Layout) -> float:
    place = layout.place
    if layout.plan is None:
        return place.tokens**2
    strategy, scale = installation.slots[layout.layer].strategy, 1.0
    if type(strategy).rehearse is not Strategy.rehearse:  # else the plan knows already
        layout.place = _at_most(place, MOST_TOKENS)
        scale = (place.tokens / layout.place.tokens) ** 2
        strategy.rehearse(layout)
        layout.place = place
    pairs = layout.plan.pairs
    return float(place.tokens**2 if pairs is None else scale * pairs)


def _at_most(place: Place, tokens: int) -> Place:
    """A place whose grid has the same shape, and about so many tokens if it has more."""
    share = min(1.0, tokens / math.prod(place.grid))
    grid = tuple(max(1, round(side * share ** (1 / len(place.grid)))) for side in place.grid)
    return replace(place, grid=grid, start=round(place.start * share), around=round(place.around * share))
