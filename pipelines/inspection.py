"""What `attnswap inspect` tells of a model: what attention costs in it, and what methods would do about that."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..accel.errors import UnsupportedModel
from ..accel.report import Inspection
from ..accel.swap import inspect
from . import attention_cost, auto_method, resolve, settings, skeleton
from .attention_cost import Cost
from .errors import BadInput
from .job import Job
from .load import Model
from .presets import Preset


@dataclass(frozen=True)
class Auto:
    """What `auto` would choose: the methods with their settings, none for dense attention, and why."""

    methods: dict[str, dict[str, Any]]
    why: str


@dataclass(frozen=True)
class Refusal:
    """Why a method cannot act on a denoiser."""

    part: str
    method: str
    reason: str


@dataclass(frozen=True)
class ModelInspection:
    """A model without its weights.

    Attributes:
        cost: None where it cannot be told.
        auto: the same.
        why_no_cost: the reason then.
        layers: by component, of each method that can act on it.
        refusals: the others.
    """

    model: Model
    cost: Cost | None
    auto: Auto | None
    why_no_cost: str
    layers: tuple[tuple[str, Inspection], ...]
    refusals: tuple[Refusal, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON document."""
        cost = self.cost
        return {
            "model": self.model.name,
            "pipeline": self.model.pipeline,
            "cost": cost and {**dataclasses.asdict(cost), "attention_share": cost.attention_share},
            "why_no_cost": self.why_no_cost or None,
            "auto": self.auto and dataclasses.asdict(self.auto),
            "layers": [{"part": part, **inspection.to_dict()} for part, inspection in self.layers],
            "refusals": [dataclasses.asdict(refusal) for refusal in self.refusals],
        }


def inspect_model(
    model: Model,
    preset: Preset,
    methods: Sequence[str],
    device: torch.device,
    *,
    width: int | None = None,
    height: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
) -> ModelInspection:
    """
    Args:
        methods: names, or "auto" for those that it would choose.
        device: that it would run on.
        width: in pixels, as `height`; the native size where there is none, as for frames and steps.

    Raises:
        BadInput: the model cannot make what was asked for.
        UnsupportedModel: none of the methods can act on it.
    """
    cost, auto, why_no_cost = None, None, ""
    job = Job("", model=model.name, width=width, height=height, frames=frames, steps=steps)
    resolve.check_numbers(job)
    try:
        pipe = skeleton.skeleton_pipe(model)
        job, _ = resolve.complete(job, pipe, preset, torch.float32)
        auto = _auto(pipe, preset, job, device)
        cost = _cost(pipe, preset, job, methods, auto)
    except UnsupportedModel as error:
        why_no_cost = str(error)
    except BadInput as error:
        if any((width, height, frames, steps)):
            raise
        why_no_cost = str(error)
    if settings.AUTO in methods:
        if auto is None:
            raise UnsupportedModel(f"what auto would choose cannot be told: {why_no_cost}")
        chosen = auto.methods
    else:
        chosen = {name: preset.settings_of(name, job.width, job.height) for name in methods}
    layers, refusals = _layers(model, chosen)
    if chosen and not layers:
        raise UnsupportedModel(f"no method applies to {model.name} ({', '.join(model.denoisers.values())}).")
    return ModelInspection(model, cost, auto, why_no_cost, layers, refusals)


def _auto(pipe: Any, preset: Preset, job: Job, device: torch.device) -> Auto:
    assert job.width is not None
    assert job.height is not None
    found = auto_method.choose(
        pipe, preset, width=job.width, height=job.height, frames=job.frames, steps=job.steps, device=device
    )
    return Auto(*found)


def _cost(pipe: Any, preset: Preset, job: Job, methods: Sequence[str], auto: Auto) -> Cost:
    """Of each method by itself, and of those that auto would put together."""
    named = [name for name in methods if name != settings.AUTO] or list(auto.methods)
    configs = {name: settings.build({name: preset.settings_of(name, job.width, job.height)}) for name in named}
    if len(auto.methods) > 1:
        configs[" + ".join(auto.methods)] = settings.build(auto.methods)
    return attention_cost.cost_of(pipe, preset, job, configs)


def _layers(
    model: Model, methods: dict[str, dict[str, Any]]
) -> tuple[tuple[tuple[str, Inspection], ...], tuple[Refusal, ...]]:
    layers: list[tuple[str, Inspection]] = []
    refusals: list[Refusal] = []
    for part, denoiser in skeleton.skeletons(model).items():
        for config in settings.build(methods):
            try:
                layers.append((part, inspect(denoiser, config)))
            except UnsupportedModel as error:
                refusals.append(Refusal(part, config.name, str(error)))
    return tuple(layers), tuple(refusals)
