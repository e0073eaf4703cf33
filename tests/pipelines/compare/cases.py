"""Comparisons that nobody ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from attnswap.pipelines.compare.figures import Comparison, Outcome, Shot
from attnswap.pipelines.compare.metrics import Likeness
from attnswap.pipelines.compare.variants import DENSE, Variant
from PIL import Image

NEAR = Likeness(30.0, 0.9, 28.0, 0.8)


def comparison(
    prompts: Sequence[str] = ("a fox",),
    names: Sequence[str] = ("adaspa",),
    size: tuple[int, int] = (32, 32),
    **more: Any,
) -> Comparison:
    """One seed; dense attention took two seconds, all others one. The file of variant 1 of shot 2 is 2-1.png."""
    shots = tuple(Shot(number, prompt, 0) for number, prompt in enumerate(prompts, 1))
    variants = (DENSE, *(Variant(name, {}) for name in names))
    found = Comparison(shots, variants, size, **{"about": {"model": "tiny", "steps": "2 steps"}, **more})
    kind = ".mp4" if found.frames else ".png"
    for shot in shots:
        for number, variant in enumerate(variants):
            found.outcomes[shot.number, variant.name] = Outcome(
                file=f"{shot.number}-{number}{kind}",
                seconds=1.0 if number else 2.0,
                peak_bytes=2**30,
                density=0.5 if number else None,
                likeness=NEAR if number else None,
            )
    return found


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
