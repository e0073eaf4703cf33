"""Reference pictures for the bundled emoji models, and the numbers that judge a generated picture against them.

A bundled emoji model ships `reference/atlas.png` (every subject once, RGBA, in a square grid of cells) and
`reference/subjects.json` (names and colours), so that judging needs neither the font nor the `emoji` package the
model was trained with. All pictures here are float arrays `[N, H, W, 3]` in 0..1.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ATLAS_COLUMNS = 12
NO_ARTICLE = frozenset(["bread", "broccoli", "cherries", "grapes", "pancakes", "peanuts", "sushi"]) | {"french fries"}


def caption(subject: str, colour: str | None = None) -> str:
    """The caption a model was trained on; no colour means the plain (white) background."""
    article = "" if subject in NO_ARTICLE else "an " if subject[0] in "aeio" and subject != "ewe" else "a "
    text = article + subject
    return text if colour is None else f"{text} on {'an' if colour[0] in 'aeiou' else 'a'} {colour} background"


@dataclass(frozen=True)
class Reference:
    """Subjects as RGBA sprites `[N, side, side, 4]` (uint8) and the background colours by name.

    `plain` is the colour behind a subject whose caption names none.
    """

    names: tuple[str, ...]
    sprites: np.ndarray
    colours: dict[str, tuple[int, int, int]]
    plain: tuple[int, int, int] = (255, 255, 255)

    @property
    def side(self) -> int:
        return self.sprites.shape[1]

    def compose(self, subject: int | str, colour: str | None = None) -> np.ndarray:
        """The picture `[side, side, 3]` (0..1) a model should draw for this caption."""
        index = self.names.index(subject) if isinstance(subject, str) else subject
        rgba = self.sprites[index].astype(np.float32) / 255
        behind = np.array(self.plain if colour is None else self.colours[colour], np.float32) / 255
        alpha = rgba[..., 3:]
        return rgba[..., :3] * alpha + behind * (1 - alpha)

    def all_on(self, colour: str | None = None) -> np.ndarray:
        """Every subject on one background, `[N, side, side, 3]`."""
        return np.stack([self.compose(index, colour) for index in range(len(self.names))])

    def save(self, folder: str | Path) -> None:
        """Write `atlas.png` and `subjects.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        count, side = len(self.names), self.side
        rows = math.ceil(count / ATLAS_COLUMNS)
        atlas = np.zeros((rows * side, ATLAS_COLUMNS * side, 4), np.uint8)
        for index, sprite in enumerate(self.sprites):
            y, x = divmod(index, ATLAS_COLUMNS)
            atlas[y * side : (y + 1) * side, x * side : (x + 1) * side] = sprite
        Image.fromarray(atlas).save(folder / "atlas.png", optimize=True)
        about = {
            "side": side,
            "columns": ATLAS_COLUMNS,
            "plain": self.plain,
            "colours": self.colours,
            "subjects": self.names,
        }
        (folder / "subjects.json").write_text(json.dumps(about, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Reference:
        """Read what `save` wrote. Raises `ValueError` when the atlas is too small for its list of names."""
        folder = Path(folder)
        about = json.loads((folder / "subjects.json").read_text())
        side, columns, names = about["side"], about["columns"], tuple(about["subjects"])
        atlas = np.asarray(Image.open(folder / "atlas.png").convert("RGBA"))
        rows = math.ceil(len(names) / columns)
        if atlas.shape[0] < rows * side or atlas.shape[1] < columns * side:
            raise ValueError(
                f"{folder}: the atlas is {atlas.shape[1]}×{atlas.shape[0]} px, too small for "
                f"{len(names)} sprites of {side} px in {columns} columns"
            )
        cells = atlas[: rows * side, : columns * side].reshape(rows, side, columns, side, 4)
        sprites = cells.transpose(0, 2, 1, 3, 4).reshape(rows * columns, side, side, 4)[: len(names)]
        colours = {name: tuple(value) for name, value in about["colours"].items()}
        return cls(names, sprites.copy(), colours, tuple(about["plain"]))


def sample_captions(reference: Reference, count: int, seed: int = 0) -> list[tuple[int, str | None]]:
    """`count` different (subject, colour) pairs, the plain background being as likely as each colour."""
    rng = np.random.default_rng(seed)
    colours = [None, *reference.colours]
    chosen = rng.choice(len(reference.names) * len(colours), size=count, replace=False)
    return [(int(index) // len(colours), colours[int(index) % len(colours)]) for index in chosen]


def rank_of_subject(pictures: np.ndarray, asked: list[tuple[int, str | None]], reference: Reference) -> np.ndarray:
    """Where the asked subject stands, 0 = nearest, among all subjects on the asked background (mean squared error)."""
    shelves = {colour: reference.all_on(colour) for colour in {colour for _, colour in asked}}
    ranks = []
    for picture, (subject, colour) in zip(pictures, asked, strict=True):
        distance = np.square(shelves[colour] - picture).mean(axis=(1, 2, 3))
        ranks.append(int((distance < distance[subject]).sum()))
    return np.array(ranks)


def background_colour(picture: np.ndarray, reference: Reference) -> str | None:
    """Name of the colour nearest to the median of the picture's border; `None` is the plain background."""
    edge = max(1, picture.shape[0] // 32)
    border = np.concatenate(
        [
            picture[:edge].reshape(-1, 3),
            picture[-edge:].reshape(-1, 3),
            picture[:, :edge].reshape(-1, 3),
            picture[:, -edge:].reshape(-1, 3),
        ]
    )
    seen = np.median(border, axis=0)
    choices: dict[str | None, tuple[int, ...]] = {None: reference.plain}
    choices.update(reference.colours)
    return min(choices, key=lambda name: float(np.square(np.array(choices[name]) / 255 - seen).sum()))


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of pictures in 0..1, over all of them together; infinite when equal."""
    error = float(np.square(np.asarray(first, np.float64) - second).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


@dataclass(frozen=True)
class Score:
    """Shares (0..1) over the judged pictures."""

    nearest: float
    nearest_of_five: float
    colour: float
    count: int


def judge(pictures: np.ndarray, asked: list[tuple[int, str | None]], reference: Reference) -> Score:
    """Judge generated pictures `[N, side, side, 3]` against the captions they were asked for."""
    ranks = rank_of_subject(pictures, asked, reference)
    colours = [
        background_colour(picture, reference) == colour for picture, (_, colour) in zip(pictures, asked, strict=True)
    ]
    return Score(float((ranks == 0).mean()), float((ranks < 5).mean()), float(np.mean(colours)), len(asked))
