"""The settings a model works best with, from the `attnswap.json` beside its model_index.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import BadInput


@dataclass(frozen=True)
class Preset:
    """What to use where the user says nothing.

    Attributes:
        native_side: Width and height in pixels the model was trained at.
        steps: Denoising steps.
        guidance: Guidance scale.
        methods: Method name → settings that differ from the method's own defaults.
    """

    native_side: int | None = None
    steps: int | None = None
    guidance: float | None = None
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)


def read(folder: Path) -> Preset:
    """The preset in `folder`; an empty one where it ships none. Keys it does not know are left alone."""
    path = folder / "attnswap.json"
    if not path.is_file():
        return Preset()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Preset(**{key: data[key] for key in Preset.__dataclass_fields__ if key in data})
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path} is no preset: {error}") from error
