"""Clips of emoji that move, grow or turn over one colour: their captions, their pixels, and who judges by them.

Made from the sprites of a `Reference` alone, so neither the font nor the `emoji` package is needed. All clips here are
float arrays `[frames, side, side, 3]` in 0..1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..pipelines.emoji_reference import Reference, caption

FRAMES = 17
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "growing", "turning")
SPEED = 1 / 48  # of the side per frame: a third of the side over a clip
SIZE = 56 / 96  # of the side: what a subject's sprite takes
GROWTH = (28 / 96, 76 / 96)  # of the side, from the first frame to the last
TURN = math.pi  # clockwise, over a clip
DIRECTIONS = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}
OVERSAMPLING = 2

Ask = tuple[int, str, str]  # subject, motion, colour


def clip_caption(subject: str, motion: str, colour: str) -> str:
    """ "a fox moving left on a green background"."""
    plain, coloured = caption(subject), caption(subject, colour)
    return f"{plain} {motion}{coloured.removeprefix(plain)}"


@dataclass(frozen=True)
class Pose:
    """Where a sprite is in one frame: centre relative to the picture's and size as shares of the side, angle."""

    x: float
    y: float
    size: float
    angle: float


def pose(motion: str, frame: int, frames: int = FRAMES) -> Pose:
    """The pose in `frame` of a clip around the middle of the picture."""
    past = frame / (frames - 1)
    if motion == "growing":
        return Pose(0, 0, GROWTH[0] + (GROWTH[1] - GROWTH[0]) * past, 0)
    if motion == "turning":
        return Pose(0, 0, SIZE, TURN * past)
    x, y = DIRECTIONS[motion]
    away = SPEED * (FRAMES - 1) * (past - 0.5)
    return Pose(x * away, y * away, SIZE, 0)


def place(sprite: np.ndarray, where: Pose, side: int) -> np.ndarray:
    """The sprite in its pose on a transparent picture, `[side, side, 4]` in 0..1, colours times opacity."""
    large = side * OVERSAMPLING
    per_pixel = sprite.shape[0] / (where.size * large)
    cosine, sine = (per_pixel * turn(where.angle) for turn in (math.cos, math.sin))
    x, y = large * (0.5 + where.x), large * (0.5 + where.y)
    middle = sprite.shape[0] / 2
    backwards = (cosine, sine, middle - cosine * x - sine * y, -sine, cosine, middle + sine * x - cosine * y)
    picture = Image.fromarray(sprite).transform(
        (large, large), Image.Transform.AFFINE, backwards, Image.Resampling.BICUBIC
    )
    rgba = np.asarray(picture, np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    return rgba.reshape(side, OVERSAMPLING, side, OVERSAMPLING, 4).mean((1, 3))


def sprite_clip(sprite: np.ndarray, motion: str, side: int, frames: int = FRAMES) -> np.ndarray:
    """`[frames, side, side, 4]`, colours times opacity."""
    return np.stack([place(sprite, pose(motion, frame, frames), side) for frame in range(frames)])


def over(rgba: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """What `place` or `sprite_clip` made, before a colour."""
    return rgba[..., :3] + np.array(colour, np.float32) / 255 * (1 - rgba[..., 3:])


def compose(reference: Reference, ask: Ask, side: int | None = None) -> np.ndarray:
    """The clip a model should draw for an ask, in the middle of the picture."""
    subject, motion, colour = ask
    return over(sprite_clip(reference.sprites[subject], motion, side or reference.side), reference.colours[colour])


def all_asks(reference: Reference) -> list[Ask]:
    return [
        (subject, motion, colour)
        for subject in range(len(reference.names))
        for motion in MOTIONS
        for colour in reference.colours
    ]


def sample_asks(reference: Reference, count: int, seed: int = 0) -> list[Ask]:
    """`count` different asks, every motion as often as any other (give or take one)."""
    rng = np.random.default_rng(seed)
    pairs = [(subject, colour) for subject in range(len(reference.names)) for colour in reference.colours]
    orders = [rng.permutation(len(pairs)) for _ in MOTIONS]
    asks = []
    for index in range(count):
        row, column = divmod(index, len(MOTIONS))
        subject, colour = pairs[orders[column][row]]
        asks.append((subject, MOTIONS[column], colour))
    return asks
