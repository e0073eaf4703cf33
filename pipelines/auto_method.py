"""The methods that `auto` stands for in a job, whose size is known."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from ..accel import auto
from ..accel.errors import UnsupportedModel
from ..accel.families import family_of
from . import attention_cost, settings

if TYPE_CHECKING:
    import torch

    from ..accel.methods.base import Config
    from .presets import Preset


def choose(
    pipe: Any,
    preset: Preset,
    *,
    width: int,
    height: int,
    frames: int | None,
    steps: int | None,
    device: torch.device,
) -> tuple[dict[str, dict[str, Any]], str]:
    """The methods with all their settings, none for dense attention, and why, in one line with the numbers.

    Args:
        pipe: a pipeline, which may be without weights (`skeleton.skeleton_pipe`).
        preset: of the model.
        width: in pixels, as `height`.
        frames: that the denoiser sees at a time, of a clip.
        steps: of the run.
        device: it will run on.
    """
    model = attention_cost.denoiser_of(pipe)
    presets = {name: preset.settings_of(name, width, height) for name in settings.known_methods()}
    found = auto.candidates(model, pipeline=pipe, settings=presets)
    try:
        arguments = attention_cost.arguments_of(pipe, preset, width=width, height=height, frames=frames)
        size = auto.size_of(model, arguments)
    except UnsupportedModel:  # then without the text
        size = auto.Size(math.prod(attention_cost.grid_of(pipe, width, height, frames)))
    choice = auto.choose(family_of(model).kind, found, device.type, dataclasses.replace(size, steps=steps))
    return {config.name: _settings(config) for config in choice.configs}, choice.why


def _settings(config: Config) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name != "method"}
