"""The settings a model works best with, from the `attnswap.json` beside its model_index.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from .clip import parse_fps
from .errors import BadInput


@dataclass(frozen=True)
class Preset:
    """What to use where the user says nothing.

    Attributes:
        native_side: Width and height in pixels the model was trained at.
        frames: Frames of the clips it was trained on.
        fps: Frames a second of these.
        steps: Denoising steps.
        guidance: Guidance scale.
        methods: Method name → settings that differ from the method's own defaults.
        methods_from: The same for large pictures, by the multiple of `native_side` from which they apply.
        max_sequence_length: Tokens a prompt is padded or cut to.
        routes: Route → strengths in place of the published ones in `routes.ROUTES`.
        examples: Prompts to begin with.
    """

    native_side: int | None = None
    frames: int | None = None
    fps: Fraction | None = None
    steps: int | None = None
    guidance: float | None = None
    max_sequence_length: int | None = None
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    methods_from: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    routes: dict[str, list[float]] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def settings_of(self, method: str, width: int | None = None, height: int | None = None) -> dict[str, Any]:
        """A method's settings for a picture of this size in pixels; None is the native size."""
        native = self.native_side or 0
        side = min(width or native, height or native)
        found = self.methods.get(method, {})
        for factor in sorted(self.methods_from, key=float):
            if side >= float(factor) * native:
                found = self.methods_from[factor].get(method, found)
        return found


def read(folder: Path) -> Preset:
    """The preset in `folder`; an empty one where it ships none. Keys it does not know are left alone."""
    path = folder / "attnswap.json"
    if not path.is_file():
        return Preset()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        given = {key: data[key] for key in Preset.__dataclass_fields__ if key in data}
        if "fps" in given:
            given["fps"] = parse_fps(str(given["fps"]))
        preset = Preset(**given)
        _check_routes(preset.routes)
        length = preset.max_sequence_length
        if length is not None and (type(length) is not int or length < 1):
            raise ValueError(f"max_sequence_length is {length!r}, not a number of tokens.")
        if preset.frames is not None and (type(preset.frames) is not int or preset.frames < 1):
            raise ValueError(f"frames is {preset.frames!r}, not a number of frames.")
        if not isinstance(preset.examples, list) or not all(isinstance(text, str) for text in preset.examples):
            raise ValueError(f"examples is {preset.examples!r}, not a list of prompts.")
        return preset
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path} is no preset: {error}") from error


def _check_routes(routes: Any) -> None:
    """`ValueError` unless every route has strengths that a stage can have."""
    if not isinstance(routes, dict):
        raise ValueError(f"routes is {routes!r}, not an object.")
    for route, strengths in routes.items():
        numbers = isinstance(strengths, list) and all(
            isinstance(strength, float | int) and not isinstance(strength, bool) and 0 < strength <= 1
            for strength in strengths
        )
        if not numbers or not strengths:
            raise ValueError(f"route {route!r} has {strengths!r}, not a list of strengths above 0, at most 1.")
