"""Clips of all variants side by side as one clip, a scene for every prompt and seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ..video_writer import Frame
from .figures import Comparison, Shot
from .metrics import read_frames
from .sheet import Layout, row

# Players and graphics cards decode H.264 up to here.
WIDEST = 3840


def scene(comparison: Comparison, shot: Shot, frames_of: Callable[[str], Path]) -> Iterator[Frame]:
    """The frames of one scene, all scenes of the same size.

    Args:
        frames_of: the folder with the frames of a clip as PNGs, by its file in the outcome.
    """
    layout = Layout.of(comparison, 1, WIDEST)
    still = row(layout, comparison, shot, lambda file: None)
    places, readers = [], []
    for column, variant in enumerate(comparison.variants):
        outcome = comparison.outcome(shot, variant)
        if outcome and outcome.file:
            places.append(layout.place(column))
            readers.append(read_frames(frames_of(outcome.file)))
    for pictures in zip(*readers, strict=True):
        for place, picture in zip(places, pictures, strict=True):
            still.paste(layout.resized(Image.fromarray(picture)), place)
        yield np.asarray(still)
