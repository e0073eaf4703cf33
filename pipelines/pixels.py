"""Whether two pictures or clips are the same, bit for bit, and how far they are apart otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import GifImagePlugin

from . import save
from .job import MAX_SIDE
from .printable import printable
from .video_writer import FRAMES

#: A picture, [H, W, 3].
Frame = NDArray[np.uint8]

# Rows compared at a time, so that a large picture takes no more memory than it and the other.
ROWS = 256
LONGEST = 200


@dataclass(frozen=True)
class Pixels:
    """
    Attributes:
        same: Whether every pixel is; None where they could not be compared.
        text: the finding in words, without a full stop.
    """

    same: bool | None
    text: str

    def __str__(self) -> str:
        return self.text


def compare_pixels(made: Path, source: Path) -> Pixels:
    """Looks at every pixel of two pictures, or of two clips frame by frame. Nothing is raised: the picture is made.

    Args:
        made: a PNG, MP4 or GIF.
        source: a file of the same kind, which anybody may have written.
    """
    name = printable(str(source))
    if made.suffix.lower() != source.suffix.lower():
        return Pixels(None, f"not compared with {name}, which is a file of another kind")
    try:
        if made.samefile(source):
            return Pixels(None, f"not compared with {name}, which is now this file itself")
        with closing(_frames(made)) as mine, closing(_frames(source)) as theirs:
            found = _compared(mine, theirs, name)
        if found.same is False and made.suffix.lower() == ".mp4" and _same_before_encoding(made, source):
            return Pixels(False, f"the same frames as {name}, encoded otherwise: {found}")
        return found
    except save.UNREADABLE as error:
        return Pixels(None, f"not compared with {name}: {printable(str(error), LONGEST)}")


def _compared(mine: Iterator[Frame], theirs: Iterator[Frame], name: str) -> Pixels:
    frames, pixels = [0, 0], 0
    apart: list[tuple[int, int]] = []
    for one, other in itertools.zip_longest(mine, theirs):
        frames = [frames[0] + (one is not None), frames[1] + (other is not None)]
        if one is None or other is None:
            continue
        if one.shape != other.shape:
            return Pixels(False, f"its size is {_size(one)}, that of {name} {_size(other)}")
        apart.append(_difference(one, other))
        pixels += one.shape[0] * one.shape[1]
    if frames[0] != frames[1]:
        return Pixels(False, f"it has {frames[0]} frames, {name} has {frames[1]}")
    differing = sum(count for count, _ in apart)
    if not differing:
        return Pixels(True, f"the same pixels as {name}")
    share = f"{100 * differing / pixels:.3g}" if differing > pixels / 10_000 else "less than 0.01"
    where = f", in {sum(count > 0 for count, _ in apart)} of {frames[0]} frames" if frames[0] > 1 else ""
    most = max(by for _, by in apart)
    return Pixels(False, f"{share} % of the pixels differ from {name}{where}, by at most {most} of 255")


def _difference(one: Frame, other: Frame) -> tuple[int, int]:
    """How many pixels differ, and by how much at most."""
    differing = most = 0
    for top in range(0, len(one), ROWS):
        mine, theirs = one[top : top + ROWS], other[top : top + ROWS]
        by = np.maximum(mine, theirs) - np.minimum(mine, theirs)
        differing += int(by.any(axis=-1).sum())
        most = max(most, int(by.max()))
    return differing, most


def _size(frame: Frame) -> str:
    return f"{frame.shape[1]}x{frame.shape[0]}"


def _frames(path: Path) -> Generator[Frame, None, None]:
    return {".mp4": _mp4, ".gif": _gif}.get(path.suffix.lower(), _png)(path)


def _png(path: Path) -> Generator[Frame, None, None]:
    with save.open_png(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    yield pixels


def _gif(path: Path) -> Generator[Frame, None, None]:
    with GifImagePlugin.GifImageFile(path) as image:
        if image.width * image.height > MAX_SIDE**2:
            raise OSError(f"{image.width}x{image.height} are more pixels than {MAX_SIDE}x{MAX_SIDE}")
        for number in itertools.count():
            try:
                image.seek(number)
            except EOFError:
                return
            yield np.asarray(image.convert("RGB"))


def _mp4(path: Path) -> Generator[Frame, None, None]:
    save.require_av(path)
    with save.open_mp4(path) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def _same_before_encoding(made: Path, source: Path) -> bool:
    """Whether two MP4s say that they are of the same frames; those of earlier versions say nothing."""
    with save.open_mp4(made) as mine, save.open_mp4(source) as theirs:
        return FRAMES in mine.metadata and mine.metadata[FRAMES] == theirs.metadata.get(FRAMES)
