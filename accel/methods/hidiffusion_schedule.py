"""When and where HiDiffusion acts: thresholds, module tables and the shift, as arithmetic without a model.

The numbers are those of the published code (arXiv 2311.17528). N is the number of steps that are really run, after
image-to-image truncation, k the 0-based step among them.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

FAMILIES = ("sd15", "sdxl", "sdxl-turbo")

# Latent side from which the schedule for very large pictures applies: 2048 and 4096 px.
LARGE_SIDE = {"sd15": 256, "sdxl": 512, "sdxl-turbo": 512}
# Latent side at which a family was trained; the ControlNet is run near it.
NATIVE_SIDE = {"sd15": 64, "sdxl": 128, "sdxl-turbo": 128}
# Fraction of the steps that the deep resolution-aware convolution takes first, in SDXL at small sizes.
AGGRESSIVE = 8 / 50

Range = tuple[int, int]


@dataclass(frozen=True)
class Places:
    """Where a family is edited; levels count from the full resolution.

    Attributes:
        windows: level whose self-attention is windowed.
        conv: level whose downsampler divides by four, None for none.
        pool: level whose map is halved after its first pair.
    """

    windows: int
    conv: int | None
    pool: int


PLACES = {
    "sd15": Places(windows=0, conv=0, pool=1),
    "sdxl": Places(windows=1, conv=1, pool=1),
    "sdxl-turbo": Places(windows=1, conv=None, pool=1),
}


@dataclass(frozen=True)
class Phases:
    """Half-open ranges of steps in which the two parts of the resolution-aware U-Net act; equal ends mean never."""

    conv: Range
    pool: Range
    bucket: str


def is_large(family: str, size: tuple[int, int], large_side: int | None) -> bool:
    side = LARGE_SIDE[family] if large_side is None else large_side
    return min(size) >= side


def phases(
    family: str,
    *,
    steps: int,
    large: bool,
    aggressive: bool | float,
    t1: float | None = None,
    t2: float | None = None,
    text_controlnet: bool = False,
    round_up: bool = False,
) -> Phases:
    """The steps in which the resolution-aware parts act.

    Args:
        family: one of `FAMILIES`.
        steps: N.
        large: whether the schedule for very large pictures applies.
        aggressive: at small SDXL sizes, whether the deep convolution goes first, or for which fraction of the steps.
        t1, t2: in place of the family's ratios.
        text_controlnet: a ControlNet in a text-to-image pipeline.
        round_up: round bounds up instead of down, so that few-step models keep their share.
    """

    def bound(ratio: float) -> int:
        # Truncation of the double-precision product is the published rule, not exact arithmetic.
        return min(steps, math.ceil(steps * ratio)) if round_up else int(steps * ratio)

    if family == "sd15":
        r1, r2 = (0.7, 0.3) if large else (0.4, 0.0)
        r1, r2 = r1 if t1 is None else t1, r2 if t2 is None else t2
        return Phases((0, bound(r1)), (0, bound(r2)), "large" if large else "small")
    if family == "sdxl-turbo":
        return Phases((0, 0), (0, bound(0.5 if t1 is None else t1)), "turbo")
    if large:
        r1, r2 = 0.7, 0.3
    else:
        r1, r2 = 0.5 if text_controlnet else 0.4, 0.0
    r1, r2 = r1 if t1 is None else t1, r2 if t2 is None else t2
    fraction = AGGRESSIVE if aggressive is True else float(aggressive)
    if large or not fraction:
        return Phases((0, bound(r2)), (0, bound(r1)), "large" if large else "small")
    first = bound(fraction)
    return Phases((0, first), (first, max(first, bound(r1))), "small, aggressive")


def shift_quarters(seed: int, step: int, layer: str = "") -> int:
    """A quarter 0..3, uniform over steps (and layers) and fixed for a seed: no generator is touched or consumed."""
    digest = hashlib.blake2b(f"{seed}/{step}/{layer}".encode(), digest_size=1).digest()
    return digest[0] & 3
