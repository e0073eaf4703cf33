"""Heat maps drawn with Pillow alone: rows down, columns across, a scale with its numbers above."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
INK: Colour = (28, 28, 34)
FAINT: Colour = (100, 100, 110)
DENSE: Colour = (214, 214, 218)
STRIPE: Colour = (200, 70, 0)

# Viridis of Matplotlib (CC0) at ninths: lightness grows evenly, and every kind of colour vision sees the same order.
_VIRIDIS = (
    (68, 1, 84),
    (72, 40, 120),
    (62, 73, 137),
    (49, 104, 142),
    (38, 130, 142),
    (31, 158, 137),
    (53, 183, 121),
    (109, 205, 89),
    (180, 222, 44),
    (253, 231, 37),
)
_STEPS = (0.02, 0.05, 0.1, 0.2)
_MOST_STEPS = 5
# A narrower scale would make much of nothing.
_NARROWEST_SCALE = 0.1

# Pixels.
_MAP = (480, 720)
_SMALLEST_CELL = (10, 11)
_LARGEST_CELL = (110, 56)
_CELL_WITH_NUMBER = (48, 24)
_GUTTER = 64
_SCALE_WIDTH = 300
_HEADER = 126
_FOOTER = 34
_NARROWEST = 470


class Mark(Enum):
    """Why a cell has no value."""

    DENSE = "stayed dense"
    FELL_BACK = "fell back to dense"


Cell = float | Mark


@dataclass(frozen=True)
class Scale:
    """Colours of the values from `low` to `high`, and where its numbers stand."""

    low: float
    high: float
    step: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Scale:
        """From one round number to another, around shares of 0 to 1."""
        # Shares come in single precision: 0.30000001 is not above 0.3.
        span = max(max(values) - min(values) - 1e-6, _NARROWEST_SCALE)
        step = next((step for step in _STEPS if span <= step * _MOST_STEPS), _STEPS[-1])
        first, last = math.floor(min(values) / step + 1e-4), math.ceil(max(values) / step - 1e-4)
        fewest = math.ceil(_NARROWEST_SCALE / step)
        last = max(last, min(first + fewest, round(1 / step)))
        return cls(min(first, last - fewest) * step, last * step, step)

    @property
    def ticks(self) -> list[float]:
        return [self.low + number * self.step for number in range(round((self.high - self.low) / self.step) + 1)]

    def colour(self, value: float) -> Colour:
        place = min(max((value - self.low) / (self.high - self.low), 0), 1) * (len(_VIRIDIS) - 1)
        before = min(int(place), len(_VIRIDIS) - 2)
        red, green, blue = (
            round(a + (b - a) * (place - before)) for a, b in zip(_VIRIDIS[before], _VIRIDIS[before + 1], strict=True)
        )
        return red, green, blue


@dataclass(frozen=True)
class Geometry:
    """Where the cells of a map lie, `left` and `top` being those of the first."""

    rows: int
    columns: int
    left: int = 0
    top: int = 0

    @property
    def cell(self) -> tuple[int, int]:
        """Width and height."""
        width, height = (
            min(max(room // number, least), most)
            for room, number, least, most in zip(
                _MAP, (self.columns, self.rows), _SMALLEST_CELL, _LARGEST_CELL, strict=True
            )
        )
        return width, height

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom pixel, all within the cell; between cells lies a thin line."""
        width, height = self.cell
        left, top = self.left + column * width, self.top + row * height
        return left, top, left + width - 2, top + height - 2

    @property
    def width(self) -> int:
        return self.columns * self.cell[0]

    @property
    def height(self) -> int:
        return self.rows * self.cell[1]


@dataclass(frozen=True)
class HeatMap:
    """One map with what stands around it.

    Attributes:
        title: what the values are.
        says: a second line, about these values.
        cells: by row and column; rows may differ in length.
        first_row: number of the first row.
        scale: of the values.
        row_step: from the number of a row to that of the next.
    """

    title: str
    says: str
    cells: Sequence[Sequence[Cell]]
    first_row: int
    scale: Scale
    row_step: int = 1

    @property
    def _shape(self) -> tuple[int, int]:
        return len(self.cells), max(map(len, self.cells))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the whole."""
        place = Geometry(*self._shape)
        return max(_NARROWEST, _GUTTER + place.width), _HEADER + place.height + _FOOTER

    def geometry(self, left: int, top: int) -> Geometry:
        """Of the cells, where the whole is drawn at `left` and `top`."""
        return Geometry(*self._shape, left + _GUTTER, top + _HEADER)

    def draw(self, image: Image.Image, left: int, top: int, *, down: str, across: str) -> None:
        """With the axes named `down` and `across`."""
        pen = ImageDraw.Draw(image)
        place = self.geometry(left, top)
        pen.text((place.left, top), self.title, fill=INK, font=font(21))
        pen.text((place.left, top + 28), self.says, fill=FAINT, font=font(17))
        self._draw_scale(pen, place.left, top + 62)
        numbered = all(side >= least for side, least in zip(place.cell, _CELL_WITH_NUMBER, strict=True))
        for row, cells in enumerate(self.cells):
            for column, cell in enumerate(cells):
                box = place.box(row, column)
                if isinstance(cell, Mark):
                    # Up to the next, so that the row is one.
                    swatch(image, (box[0], box[1], box[2] + 1, box[3]), cell)
                    continue
                pen.rectangle(box, fill=self.scale.colour(cell))
                if numbered:
                    middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
                    ink = PAPER if _is_dark(self.scale.colour(cell)) else INK
                    pen.text(middle, f"{cell:.2f}", fill=ink, font=font(17), anchor="mm")
        self._draw_axes(pen, place, down, across)

    def _draw_scale(self, pen: ImageDraw.ImageDraw, left: int, top: int) -> None:
        for x in range(_SCALE_WIDTH):
            value = self.scale.low + (self.scale.high - self.scale.low) * x / (_SCALE_WIDTH - 1)
            pen.line((left + x, top, left + x, top + 13), fill=self.scale.colour(value))
        for tick in self.scale.ticks:
            x = left + round((tick - self.scale.low) / (self.scale.high - self.scale.low) * (_SCALE_WIDTH - 1))
            pen.line((x, top + 14, x, top + 18), fill=FAINT)
            pen.text((x, top + 20), f"{tick:.2f}", fill=FAINT, font=font(15), anchor="ma")

    def _draw_axes(self, pen: ImageDraw.ImageDraw, place: Geometry, down: str, across: str) -> None:
        labels = font(16)
        width, height = place.cell
        every = _every(26, height)
        for row in range(place.rows):
            number = self.first_row + row * self.row_step
            if (row if self.row_step > 1 else number) % every == 0:
                y = place.top + row * height + height / 2 - 1
                pen.text((place.left - 9, y), str(number), fill=INK, font=labels, anchor="rm")
        pen.text((place.left - 9, place.top - 8), down, fill=FAINT, font=labels, anchor="rs")
        every = _every(pen.textlength(str(place.columns), font=labels) + 12, width)
        below = place.top + place.height + 6
        for column in range(0, place.columns, every):
            middle = place.left + column * width + width / 2 - 1
            pen.text((middle, below), str(column), fill=INK, font=labels, anchor="ma")
        pen.text((place.left - 9, below), across, fill=FAINT, font=labels, anchor="ra")


def swatch(image: Image.Image, box: tuple[int, int, int, int], mark: Mark) -> None:
    """Fill a box as `mark` has it: plain grey, or stripes that run on from box to box."""
    left, top, right, bottom = box
    pen = ImageDraw.Draw(image)
    if mark is Mark.DENSE:
        pen.rectangle(box, fill=DENSE)
        return
    stripes = Image.new("RGB", (right - left + 1, bottom - top + 1), PAPER)
    drawn = ImageDraw.Draw(stripes)
    width, height = stripes.size
    for start in range(-(left + top) % 10 - 10 * (height // 10 + 1), width + height, 10):
        # Along x + y = const.
        drawn.line((start + height, 0, start, height), fill=STRIPE, width=3)
    image.paste(stripes, (left, top))


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The face that comes with Pillow; it has little beyond ASCII."""
    return ImageFont.load_default(size)


def wrapped(text: str, face: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of at most `width` pixels; a longer word stands alone."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and face.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _every(room: float, cell: int) -> int:
    """Each how many-th cell gets its number, where a number needs `room`."""
    return next(number for number in (1, 2, 5, 10, 20, 50, 100) if number * cell >= room)


def _is_dark(colour: Colour) -> bool:
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue < 115
