"""A contact sheet: a row for every prompt and seed, a column for every variant, with captions."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ...accel.heat_map import FAINT, INK, PAPER, font, wrapped
from . import text
from .figures import Comparison, Outcome, Shot

# Pixels. A smaller picture is enlarged by a whole number, until its captions have room; a larger one is reduced.
SMALLEST_CELL, LARGEST_CELL = 224, 1024
GAP = 16
MOST_PIXELS, LONGEST_SIDE = 48_000_000, 16_384
SMALLEST_FONT, LARGEST_FONT = 14, 44
CAPTIONS_A_WIDTH = 18  # a caption's letters are this part of the cell high
PROMPT_LINES, NAME_LINES, FIGURE_LINES = 2, 2, 2
LEADING = 1.35
# Of a text that is to be cut to a few lines anyway.
LONGEST_TEXT = 400
PLAIN = str.maketrans({"–": "-", "—": "-", "×": "x", "ß": "ss", "ø": "o", "æ": "ae", "œ": "oe"})
EMPTY, FAILED = (236, 236, 240), (160, 30, 30)

#: The picture in a file, or one frame of the clip there.
Picture = Callable[[str], Image.Image | None]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Layout:
    """Where things are, in pixels.

    Attributes:
        picture: width and height at which pictures are shown.
        column: width of a column.
        letters: size of the captions.
        prompt_lines, name_lines: that are left room for.
    """

    picture: tuple[int, int]
    column: int
    columns: int
    letters: int
    prompt_lines: int
    name_lines: int

    @classmethod
    def of(cls, comparison: Comparison, rows: int, widest: int = LONGEST_SIDE) -> Layout:
        """As large as `rows` rows can be shown, the whole at most `widest`.

        Raises:
            ValueError: that many rows do not fit.
        """
        limit = LARGEST_CELL
        while True:
            layout = cls._within(limit, comparison)
            height = rows * (layout.row_height + GAP)
            if layout.width <= widest and height <= LONGEST_SIDE and layout.width * height <= MOST_PIXELS:
                return layout
            if limit <= SMALLEST_CELL:
                raise ValueError(f"{rows} rows of {layout.columns} pictures do not fit on a sheet")
            limit = max(SMALLEST_CELL, int(limit * 0.9))

    @classmethod
    def _within(cls, limit: int, comparison: Comparison) -> Layout:
        longest = max(comparison.size)
        scale = limit / longest if longest > limit else math.ceil(SMALLEST_CELL / longest)
        picture = round(comparison.size[0] * scale) or 1, round(comparison.size[1] * scale) or 1
        column = max(picture[0], min(SMALLEST_CELL, limit))
        letters = min(max(SMALLEST_FONT, column // CAPTIONS_A_WIDTH), LARGEST_FONT)
        face, columns = font(letters), len(comparison.variants)
        whole = columns * (column + GAP) - GAP
        return cls(
            picture,
            column,
            columns,
            letters,
            max(len(fitted(heading(shot), face, whole, PROMPT_LINES)) for shot in comparison.shots),
            max(len(fitted(variant.name, face, column, NAME_LINES)) for variant in comparison.variants),
        )

    @property
    def width(self) -> int:
        return self.columns * (self.column + GAP) + GAP

    @property
    def line(self) -> int:
        return round(self.letters * LEADING)

    @property
    def top(self) -> int:
        """Of the pictures in a row."""
        return self.prompt_lines * self.line + GAP // 2

    @property
    def row_height(self) -> int:
        return self.top + self.picture[1] + (self.name_lines + FIGURE_LINES) * self.line + GAP

    def place(self, column: int) -> tuple[int, int]:
        """The upper left corner of a picture in a row."""
        return GAP + column * (self.column + GAP) + (self.column - self.picture[0]) // 2, self.top

    def resized(self, picture: Image.Image) -> Image.Image:
        enlarged = self.picture[0] >= picture.width
        return picture.resize(self.picture, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def draw(comparison: Comparison, picture_of: Picture) -> Image.Image:
    """The sheet, with as many rows as fit."""
    shown = len(comparison.begun)
    while True:
        try:
            layout = Layout.of(comparison, shown)
            break
        except ValueError:
            if shown == 1:
                raise
            shown //= 2
    face = font(layout.letters)
    above = fitted(", ".join(comparison.about.values()), face, layout.width - 2 * GAP, 4)
    left_out = len(comparison.begun) - shown
    below = [f"and {text.count(left_out, 'row')} more in compare.html"] if left_out else []
    lines = len(above) + len(below)
    sheet = Image.new("RGB", (layout.width, shown * (layout.row_height + GAP) + lines * layout.line + 2 * GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    y = _write(pen, (GAP, GAP), above, face, FAINT, layout.line) + GAP
    for shot in comparison.begun[:shown]:
        sheet.paste(row(layout, comparison, shot, picture_of), (0, y))
        y += layout.row_height + GAP
    _write(pen, (GAP, y), below, face, FAINT, layout.line)
    return sheet


def row(layout: Layout, comparison: Comparison, shot: Shot, picture_of: Picture) -> Image.Image:
    """All variants of a shot side by side, under its prompt; grey where a picture is missing."""
    image = Image.new("RGB", (layout.width, layout.row_height), PAPER)
    pen, face = ImageDraw.Draw(image), font(layout.letters)
    prompt = fitted(heading(shot), face, layout.width - 2 * GAP, PROMPT_LINES)
    _write(pen, (GAP, (layout.prompt_lines - len(prompt)) * layout.line), prompt, face, INK, layout.line)
    for column, variant in enumerate(comparison.variants):
        outcome = comparison.outcome(shot, variant)
        left, top = layout.place(column)
        picture = picture_of(outcome.file) if outcome and outcome.file else None
        if picture is None:
            _missing(pen, layout, (left, top), outcome)
        else:
            image.paste(layout.resized(picture.convert("RGB")), (left, top))
        at = GAP + column * (layout.column + GAP), top + layout.picture[1] + GAP // 2
        y = _write(pen, at, fitted(variant.name, face, layout.column, NAME_LINES), face, INK, layout.line)
        lines = text.caption(outcome, comparison.speedup(shot, variant))
        _write(pen, (at[0], y), [fit(line, face, layout.column) for line in lines], face, FAINT, layout.line)
    return image


def heading(shot: Shot) -> str:
    return f"{shot.number}. seed {shot.seed}: {text.one_line(shot.prompt[:LONGEST_TEXT])}"


def fitted(said: str, face: Font, width: int, most: int) -> list[str]:
    """`said` as at most `most` lines of `width` pixels, the last cut where it is longer."""
    lines = wrapped(drawable(text.one_line(said[:LONGEST_TEXT])), face, width)
    kept = [*lines[: most - 1], " ".join(lines[most - 1 :])] if len(lines) > most else lines
    return [fit(line, face, width) for line in kept]


def fit(said: str, face: Font, width: int) -> str:
    """As much of `said` as `width` pixels hold, with an ellipsis where that is not all."""
    said = drawable(said)
    if face.getlength(said) <= width:
        return said
    while said and face.getlength(f"{said}…") > width:
        said = said[:-1]
    return f"{said.rstrip()}…"


def drawable(said: str) -> str:
    """`said` in the letters of Pillow's own font as far as there are any: accents are dropped, dashes are hyphens."""
    letters = "".join(letter for letter in unicodedata.normalize("NFKD", said) if not unicodedata.combining(letter))
    return unicodedata.normalize("NFC", letters).translate(PLAIN)


def _missing(pen: ImageDraw.ImageDraw, layout: Layout, at: tuple[int, int], outcome: Outcome | None) -> None:
    (left, top), (width, height) = at, layout.picture
    pen.rectangle((left, top, left + width - 1, top + height - 1), EMPTY)
    said, colour = ("not run", FAINT) if outcome is None else (f"failed: {outcome.error}", FAILED)
    face, room = font(layout.letters), GAP // 2
    lines = fitted(said, face, width - 2 * room, max(1, (height - 2 * room) // layout.line))
    _write(pen, (left + room, top + room), lines, face, colour, layout.line)


def _write(
    pen: ImageDraw.ImageDraw,
    at: tuple[int, int],
    lines: Sequence[str],
    face: Font,
    colour: tuple[int, int, int],
    line: int,
) -> int:
    """Writes lines from `at` on; the y of the next."""
    x, y = at
    for said in lines:
        pen.text((x, y), said, fill=colour, font=face)
        y += line
    return y
