"""Judges clips of emoji: is it the asked subject, on the asked colour, and does it move as asked?

Motion is seen in the clip alone: the subject is what differs from the colour at the border, a direction is where its
centroid goes, growth is a larger area, a turn is the angle by which the first frame best covers a later one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..pipelines.emoji_reference import Reference, background_colour
from . import emoji_export
from .emoji_video_clips import Ask, over, place, pose

DIFFERENT = 0.12  # from the background, in any colour
FAR = 0.18  # of the side, between the first and the last frames
LARGER = 1.7  # times the area
ANGLES = range(0, 360, 15)  # degrees, clockwise
ENDS = 3  # frames at either end
LOOKS = 5  # frames of a clip that are compared with the subjects


@dataclass(frozen=True)
class Score:
    """Shares (0..1) over the judged clips."""

    nearest: float
    motion: float
    colour: float
    count: int


def without_background(clip: np.ndarray) -> np.ndarray:
    """The clip minus the median of its border, pixel by pixel."""
    border = [clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]]
    return clip - np.median(np.concatenate([part.reshape(-1, 3) for part in border]), 0)


def shape_of(frame: np.ndarray) -> tuple[float, np.ndarray]:
    """Area (share of the picture) and centroid (x, y in pixels) of what differs from zero; NaN where nothing does."""
    rows, columns = np.nonzero((np.abs(frame) > DIFFERENT).any(-1))
    if not len(rows):
        return 0.0, np.full(2, np.nan)
    return len(rows) / frame[..., 0].size, np.array([columns.mean(), rows.mean()])


def turned_by(first: np.ndarray, later: np.ndarray) -> int:
    """Degrees clockwise by which `first` best covers `later`, both around their centroids."""
    side = first.shape[0]
    (_, from_centre), (_, to_centre) = shape_of(first), shape_of(later)
    if np.isnan([from_centre, to_centre]).any():
        return 0
    errors = []
    for degrees in ANGLES:
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        x = from_centre[0] - cosine * to_centre[0] - sine * to_centre[1]
        y = from_centre[1] + sine * to_centre[0] - cosine * to_centre[1]
        backwards = (cosine, sine, x, -sine, cosine, y)
        planes = [
            Image.fromarray(plane).transform((side, side), Image.Transform.AFFINE, backwards, Image.Resampling.BILINEAR)
            for plane in np.moveaxis(first.astype(np.float32), -1, 0)
        ]
        errors.append(np.square(np.stack([np.asarray(plane) for plane in planes], -1) - later).mean())
    return ANGLES[int(np.argmin(errors))]


def motion_of(clip: np.ndarray) -> str | None:
    """Which of the motions a clip `[F, side, side, 3]` shows; `None` when it shows none."""
    subject = without_background(clip)
    shapes = [shape_of(frame) for frame in subject]
    areas = np.array([area for area, _ in shapes])
    if not areas[:ENDS].all() or not areas[-ENDS:].all():
        return None
    centres = np.stack([centre for _, centre in shapes]) / clip.shape[1]
    x, y = centres[-ENDS:].mean(0) - centres[:ENDS].mean(0)
    if max(abs(x), abs(y)) >= FAR:
        horizontal = abs(x) > abs(y)
        return "moving " + (("left", "right")[int(x > 0)] if horizontal else ("up", "down")[int(y > 0)])
    if areas[-ENDS:].mean() >= LARGER * areas[:ENDS].mean():
        return "growing"
    middle, last = turned_by(subject[0], subject[len(clip) // 2]), turned_by(subject[0], subject[-1])
    return "turning" if abs(middle - 90) <= 45 and abs(last - 180) <= 45 else None


class Shelf:
    """All subjects in one motion, at five moments of a clip of so many frames and pixels a side."""

    def __init__(self, reference: Reference, motion: str, frames: int, side: int):
        self.looks = [round(index * (frames - 1) / (LOOKS - 1)) for index in range(LOOKS)]
        poses = [pose(motion, look, frames) for look in self.looks]
        self.sprites = np.stack([[place(sprite, one, side) for one in poses] for sprite in reference.sprites])

    def rank(self, clip: np.ndarray, subject: int, colour: tuple[int, int, int]) -> int:
        """Where the asked subject stands among all, 0 = nearest, on the asked colour.

        The distance is the mean squared error over the five frames, the subject shifted in each to where it fits best.
        """
        behind = np.array(colour, np.float32) / 255
        seen = np.fft.rfft2(clip[self.looks] - behind, axes=(1, 2))
        distances = []
        for sprite in self.sprites:
            wanted = over(sprite, colour) - behind
            cross = (np.fft.rfft2(wanted, axes=(1, 2)).conj() * seen).sum(-1)
            fits = np.fft.irfft2(cross, clip.shape[1:3], axes=(1, 2)).max((1, 2))
            distances.append(np.square(wanted).sum() - 2 * fits.sum())
        return int((np.array(distances) < distances[subject]).sum())


def ranks_of_subjects(clips: np.ndarray, asks: list[Ask], reference: Reference) -> list[int]:
    """`Shelf.rank` of every clip."""
    shelves = {motion: Shelf(reference, motion, *clips.shape[1:3]) for motion in {motion for _, motion, _ in asks}}
    return [
        shelves[motion].rank(clip, subject, reference.colours[colour])
        for clip, (subject, motion, colour) in zip(clips, asks, strict=True)
    ]


def judge(clips: np.ndarray, asks: list[Ask], reference: Reference) -> Score:
    """Judge clips `[N, F, side, side, 3]` against what was asked for."""
    pairs = list(zip(clips, asks, strict=True))
    return Score(
        nearest=float(np.mean([rank == 0 for rank in ranks_of_subjects(clips, asks, reference)])),
        motion=float(np.mean([motion_of(clip) == motion for clip, (_, motion, _) in pairs])),
        colour=float(np.mean([background_colour(clip[len(clip) // 2], reference) == c for clip, (*_, c) in pairs])),
        count=len(asks),
    )


def contact_sheet(clips: np.ndarray, frames: int = LOOKS) -> Image.Image:
    """A row for every clip, with that many of its frames."""
    chosen = [round(index * (clips.shape[1] - 1) / (frames - 1)) for index in range(frames)]
    return emoji_export.contact_sheet(clips[:, chosen].reshape(-1, *clips.shape[2:]), frames)
