"""How near a picture or clip is to that of dense attention, by scikit-image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.metrics import mean_squared_error, structural_similarity

from .. import save
from ..video_writer import Frame

# Of the uniform window in which SSIM compares (Wang et al. 2004), and its smallest.
WINDOW, SMALLEST_WINDOW = 7, 3
# Rows of a picture that SSIM holds at a time: of all 2048 of a square picture it would hold half a gigabyte.
BAND = 512
PEAK = 255


@dataclass(frozen=True)
class Likeness:
    """
    Attributes:
        psnr: peak signal-to-noise ratio in dB, of a clip over all its frames together; infinite where nothing differs.
        ssim: mean structural similarity, at most 1; None for pictures of less than three pixels a side.
        worst_psnr: of the frame that is farthest off.
        worst_ssim: likewise.
    """

    psnr: float
    ssim: float | None
    worst_psnr: float
    worst_ssim: float | None

    @property
    def identical(self) -> bool:
        return math.isinf(self.psnr)


@dataclass
class Tally:
    """Collects the frames of a clip; a picture is one of a single frame."""

    errors: list[float] = field(default_factory=list)
    similarities: list[float | None] = field(default_factory=list)

    def add(self, frame: Frame, dense: Frame) -> None:
        """
        Raises:
            ValueError: the two are of different sizes.
        """
        self.errors.append(float(mean_squared_error(dense, frame)))
        self.similarities.append(ssim(frame, dense))

    def likeness(self) -> Likeness:
        known = [value for value in self.similarities if value is not None]
        return Likeness(
            psnr=decibels(math.fsum(self.errors) / len(self.errors)),
            ssim=math.fsum(known) / len(known) if known else None,
            worst_psnr=decibels(max(self.errors)),
            worst_ssim=min(known, default=None),
        )


def of_pictures(picture: Frame, dense: Frame) -> Likeness:
    """Of a picture [H, W, 3] to that of dense attention."""
    tally = Tally()
    tally.add(picture, dense)
    return tally.likeness()


def of_clips(frames: Path, dense: Path) -> Likeness:
    """Of a clip to that of dense attention, both folders of PNGs; two frames are in memory at a time.

    Raises:
        ValueError: they have not as many frames, or of different sizes.
    """
    tally = Tally()
    for frame, original in zip(read_frames(frames), read_frames(dense), strict=True):
        tally.add(frame, original)
    return tally.likeness()


def read_frames(folder: Path) -> Iterator[Frame]:
    """The pictures [H, W, 3] in a folder that `video_writer.pngs` wrote, in order."""
    for path in _frames(folder):
        yield np.asarray(read_picture(path))


def middle_frame(folder: Path) -> Image.Image:
    """Of a clip, from its folder of PNGs."""
    paths = _frames(folder)
    return read_picture(paths[len(paths) // 2])


def read_picture(path: Path) -> Image.Image:
    with save.open_png(path) as image:
        return image.convert("RGB")


def decibels(error: float) -> float:
    """PSNR of a mean squared error of pictures in 0..255."""
    return 10 * math.log10(PEAK**2 / error) if error else math.inf


def ssim(picture: Frame, dense: Frame) -> float | None:
    """Mean structural similarity of two pictures [H, W, 3]; None where they are too small for any window."""
    height, width = picture.shape[:2]
    shortest = min(height, width)
    window = min(WINDOW, shortest - (shortest + 1) % 2)
    if window < SMALLEST_WINDOW:
        return None
    # The mean goes over the pixels around which a whole window fits; a band has those of its own rows.
    rim = window // 2
    total = 0.0
    for first in range(rim, height - rim, BAND):
        last = min(first + BAND, height - rim)
        rows = slice(first - rim, last + rim)
        mean = structural_similarity(dense[rows], picture[rows], win_size=window, channel_axis=-1, data_range=PEAK)
        total += float(mean) * (last - first)
    return total / (height - 2 * rim)


def _frames(folder: Path) -> list[Path]:
    return sorted(folder.glob("frame-*.png"), key=lambda path: int(path.stem.rpartition("-")[2]))
