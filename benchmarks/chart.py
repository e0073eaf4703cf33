"""A line chart as a picture, for pages that show what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE = (760, 420)
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 64, 56
# Of Okabe and Ito: told apart by colour-blind people, too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, GRID = "#222222", "#dddddd"
STEPS = 5


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]], *, title: str, across: str, upwards: str
) -> Image.Image:
    """Points (x, y) of each series, joined in the order of x; the axes are as long as the points need.

    Raises:
        ValueError: there is no point to draw.
    """
    points = [point for line in series.values() for point in line]
    if not points:
        raise ValueError(f"{title}: no point to draw in {len(series)} series")
    picture = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(picture)
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    spans = [_span([point[axis] for point in points]) for axis in (0, 1)]

    def place(x: float, y: float) -> tuple[float, float]:
        share = [(value - low) / (high - low) for value, (low, high) in zip((x, y), spans, strict=True)]
        width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM
        return LEFT + share[0] * width, SIZE[1] - BOTTOM - share[1] * height

    for step in range(STEPS + 1):
        x, y = (low + (high - low) * step / STEPS for low, high in spans)
        draw.line([place(spans[0][0], y), place(spans[0][1], y)], GRID)
        draw.text((LEFT - 8, place(spans[0][0], y)[1]), f"{y:.1f}", INK, small, anchor="rm")
        draw.text((place(x, spans[1][0])[0], SIZE[1] - BOTTOM + 8), f"{x:.2f}", INK, small, anchor="mt")
    draw.text((LEFT, 12), title, INK, font)
    draw.text(((LEFT + SIZE[0] - RIGHT) / 2, SIZE[1] - 8), across, INK, small, anchor="mb")
    draw.text((8, TOP - 12), upwards, INK, small, anchor="ls")
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = [place(*point) for point in sorted(line)]
        if len(path) > 1:
            draw.line(path, colour, 3)
        for x, y in path:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
        level = TOP + 22 * number
        draw.line([(SIZE[0] - RIGHT + 14, level), (SIZE[0] - RIGHT + 38, level)], colour, 3)
        draw.text((SIZE[0] - RIGHT + 44, level), name, INK, small, anchor="lm")
    return picture


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low or abs(high) or 1.0) * 0.06
    return low - margin, high + margin
