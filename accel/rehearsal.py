"""What attention is going to cost: a run's plans, made for an empty model and counted as a run would count them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from .methods.base import Config
from .observe import Call


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
        layers: by dotted name, over the run.
        notes: what the report of such a run would say.
    """

    steps: int
    pairs: tuple[float, ...]
    dense_pairs: int
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


def rehearse(
    model: nn.Module, configs: Sequence[Config], arguments: Mapping[str, Any], *, steps: int, pipeline: Any = None
) -> Rehearsal:
    """A run with methods, of which nothing but the plans is made.

    Args:
        model: an empty denoiser (on the meta device), which is left as it was.
        arguments: of a call (`families.calls.call_arguments`).
        pipeline: it belongs to.

    Raises:
        UnsupportedModel: a method cannot apply to any layer.
        ValueError: or not to this size or number of steps.
    """
    clock = Clock()
    installation = Installation(model, configs, clock, pipeline=pipeline)
    # What changes the sizes of maps does so by edits to the model.
    resizing = [strategy for strategy in installation.strategies if strategy.resizes]
    stock = places(model, arguments)
    layouts = {name: installation.slots[name].layout if name in installation.slots else Layout(name) for name in stock}
    counts: dict[str, list[float]] = {name: [0.0, 0] for name in stock}
    per_step = []
    timesteps = torch.linspace(1000, 1, steps)
    clock.set_timesteps(timesteps)
    try:
        for strategy in resizing:
            strategy.install(passive=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AttnswapWarning)  # nothing has happened yet
            for timestep in timesteps:
                clock.tick(timestep, "rehearsal")
                installation.plan(Call(dict(arguments)), layouts)
                pairs = {name: _pairs(installation, layout) for name, layout in layouts.items()}
                for name, layout in layouts.items():
                    counts[name][0] += pairs[name]
                    counts[name][1] += layout.place.tokens**2
                per_step.append(sum(pairs.values()))
    finally:
        for strategy in resizing:
            strategy.remove()
    return Rehearsal(
        steps=steps,
        pairs=tuple(per_step),
        dense_pairs=sum(place.tokens**2 for place in stock.values()),
        layers={
            name: LayerCost(pairs, int(dense), name in installation.slots) for name, (pairs, dense) in counts.items()
        },
        notes=tuple(installation.recorder.notes),
    )


def _pairs(installation: Installation, layout: Layout) -> float:
    if layout.plan is None:
        return layout.place.tokens**2
    installation.slots[layout.layer].strategy.rehearse(layout)
    pairs = layout.plan.pairs
    return float(layout.place.tokens**2 if pairs is None else pairs)


def attention_operations(model: nn.Module, arguments: Mapping[str, Any]) -> float:
    """Of dense self-attention over the picture or clip in a call: two for each product of query and key, and as many
    for the values."""
    layers = attention_layers(model)
    return sum(
        4.0 * place.tokens**2 * layers[name].heads * head_dim(layers[name])
        for name, place in places(model, arguments).items()
    )


def operations(model: nn.Module, arguments: Mapping[str, Any]) -> float:
    """Of a whole call of an empty model, in matrix products and convolutions: run on tensors without data.

    Raises:
        RuntimeError: the model looks at data on its way, and has none.
    """
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(**{name: _without_data(value) for name, value in arguments.items()})
    return float(counter.get_total_flops())


def _without_data(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value
