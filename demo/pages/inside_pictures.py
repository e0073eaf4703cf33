"""Pictures of what ran: the density of every layer, and the steps in which HiDiffusion's parts were at work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from ...accel.heat_map import DENSE, FAINT, INK, PAPER, Cell, HeatMap, Mark, Scale, font, swatch, wrapped
from ...accel.report import Report
from ...accel.report_pictures import spans
from ...pipelines.compare.text import count
from .words import INACTIVE, LEFT

# Pixels. Narrow, so that letters are still read on a telephone.
_WIDTH = 560
_MARGIN = 24
_GAP = 22
_LINE = 24
_LETTERS = 17
_SWATCH = 40
_BAR = 26
_NUMBER = 34
# Layers in a row of the map.
_ACROSS = 10
AT_WORK = (31, 158, 137)
# Of shares, so that a colour means the same in every picture.
_SCALE = Scale(0.0, 1.0, 0.2)

#: What HiDiffusion does in some steps, by the name in its report.
PARTS = {
    "conv": "U-Net: stronger downsampling",
    "pool": "U-Net: halved map",
    "windows": "Attention in windows",
}


def by_layer(report: Report) -> Image.Image:
    """The density of every attention layer, in the order of the model; those that were left dense are grey."""
    maps = []
    first = 0
    reasons: dict[str, list[int]] = {}
    for denoiser in report.denoisers:
        layers = denoiser["layers"]
        cells: list[Cell] = [layer["density"] if counted(layer) else Mark.DENSE for layer in layers]
        rows = [cells[start : start + _ACROSS] for start in range(0, len(cells), _ACROSS)]
        maps.append(HeatMap("Density of each layer", _range(cells), rows, first, _SCALE, _ACROSS))
        for number, layer in enumerate(layers, first):
            if not counted(layer):
                why = "was not called" if layer["accelerated"] else layer["reason"]
                reasons.setdefault(why, []).append(number)
        first += len(layers)

    width = max(_WIDTH - 2 * _MARGIN, *(each.size[0] for each in maps))
    legend = [
        _wrapped(f"left dense, {LEFT.get(why, why)}: {spans(numbers)}", width - _SWATCH)
        for why, numbers in reasons.items()
    ]
    below = _wrapped("Layers are counted in the order of the model; the table has their names.", width)
    heading = _LINE + 6 if len(maps) > 1 else 0
    height = sum(heading + each.size[1] + _GAP for each in maps) + _LINE * (sum(map(len, legend)) + len(below))
    image = Image.new("RGB", (width + 2 * _MARGIN, height + 2 * _MARGIN), PAPER)
    pen = ImageDraw.Draw(image)
    y = _MARGIN
    for number, (each, denoiser) in enumerate(zip(maps, report.denoisers, strict=True), 1):
        if heading:
            said = f"{number} of {len(maps)}: {' + '.join(denoiser['method'])} on {denoiser['model']}"
            pen.text((_MARGIN, y), said, fill=INK, font=font(_LETTERS))
        each.draw(image, _MARGIN, y + heading, down="layer", across="+")
        y += heading + each.size[1] + _GAP
    for lines in legend:
        swatch(image, (_MARGIN, y + 2, _MARGIN + _SWATCH - 12, y + 18), Mark.DENSE)
        y = _write(pen, (_MARGIN + _SWATCH, y), lines)
    _write(pen, (_MARGIN, y), below)
    return image


def counted(layer: Mapping[str, Any]) -> bool:
    """Whether a layer of a report was one that a method acts on, and called."""
    return bool(layer["accelerated"] and layer["accelerated_calls"] + layer["dense_calls"])


def _range(cells: Sequence[Cell]) -> str:
    values = [cell for cell in cells if not isinstance(cell, Mark)]
    if not values:
        return "no layer accelerated"
    return f"{len(values)} of {len(cells)} accelerated, from {min(values):.3f} to {max(values):.3f}"


@dataclass(frozen=True)
class Phases:
    """One run of HiDiffusion.

    Attributes:
        latent: its size, as text.
        steps: None where nobody knew how many.
        state: as the report has it.
        at_work: by part, the steps from one to before another, counted from 0.
    """

    latent: str
    steps: int | None
    state: str
    at_work: Mapping[str, range]

    @property
    def rested(self) -> bool:
        return self.state.startswith(INACTIVE)


def phases_of(report: Report) -> tuple[Phases, ...]:
    """Of the runs that a report tells of, in their order."""
    # What ran before with fewer methods stands after in a report.
    return tuple(_phases(run) for denoiser in reversed(report.denoisers) for run in denoiser["runs"])


def _phases(run: Mapping[str, Any]) -> Phases:
    conv = range(run["conv_steps"])
    # The halved map goes on where the downsampling ends, or begins with it.
    start = len(conv) if run.get("pool", [0])[0] else 0
    pool = range(start, start + run["pool_steps"])
    at_work = {"conv": conv, "pool": pool, "windows": range(run["windows_steps"])}
    return Phases(run["latent"], run["steps"], run["state"], at_work)


def strip(phases: Sequence[Phases]) -> Image.Image | None:
    """For each run a bar of its steps for each part of HiDiffusion, coloured where that was at work.

    None where it was at rest in all of them.
    """
    active = [(number, each) for number, each in enumerate(phases, 1) if each.steps and not each.rested]
    if not active:
        return None
    one = _LINE + 4 + len(PARTS) * (_LINE + _BAR + 6) + _LINE + _GAP
    image = Image.new("RGB", (_WIDTH, 2 * _MARGIN + len(active) * one + _LINE), PAPER)
    pen = ImageDraw.Draw(image)
    y = _MARGIN
    for number, each in active:
        assert each.steps
        run = f"Run {number} of {len(phases)}: " if len(phases) > 1 else ""
        said = f"{run}latent {each.latent}, {count(each.steps, 'step')}"
        pen.text((_MARGIN, y), said, fill=INK, font=font(_LETTERS + 1))
        y += _LINE + 4
        for part, named in PARTS.items():
            steps = each.at_work[part]
            pen.text((_MARGIN, y), f"{named}: {in_words(steps, each.steps)}", fill=FAINT, font=font(_LETTERS))
            y += _LINE
            for step in range(each.steps):
                pen.rectangle(step_box(step, each.steps, y), fill=AT_WORK if step in steps else DENSE)
            y += _BAR + 6
        inner = _WIDTH - 2 * _MARGIN
        every = next((n for n in (1, 2, 5, 10, 20, 50) if n * inner / each.steps >= _NUMBER), each.steps)
        for step in range(every - 1, each.steps, every):
            left, _, right, _ = step_box(step, each.steps, y)
            pen.text(((left + right) / 2, y - 2), str(step + 1), fill=INK, font=font(15), anchor="ma")
        y += _LINE + _GAP
    x = _MARGIN
    for colour, said in ((AT_WORK, "at work"), (DENSE, "at rest; steps from left to right")):
        pen.rectangle((x, y + 2, x + _SWATCH - 12, y + 18), fill=colour)
        pen.text((x + _SWATCH, y), said, fill=FAINT, font=font(_LETTERS))
        x += 140
    return image


def step_box(step: int, steps: int, top: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom pixel of a step in its bar."""
    inner = _WIDTH - 2 * _MARGIN
    left, right = (_MARGIN + inner * place // steps for place in (step, step + 1))
    return left, top, max(left, right - 2), top + _BAR - 1


def in_words(steps: range, of: int) -> str:
    """Some of the steps of a run, counted from 1: "steps 4 to 6 of 12"."""
    if not steps:
        return "never"
    if len(steps) == of:
        return f"all {of} steps" if of > 1 else "the one step"
    if len(steps) == 1:
        return f"step {steps[0] + 1} of {of}"
    return f"steps {steps[0] + 1} to {steps[-1] + 1} of {of}"


def with_axes(mask: Image.Image) -> Image.Image:
    """A block mask with its axes named, and room in the corner for the buttons of the page."""
    # Of the height of those, and of the letters.
    above, beside = 44, 40
    image = Image.new("RGB", (mask.width + 2 * beside, mask.height + above + beside // 2), PAPER)
    image.paste(mask, (beside, above))
    pen = ImageDraw.Draw(image)
    pen.text((beside, above - 8), "blocks of keys, from left to right", fill=FAINT, font=font(_LETTERS), anchor="ls")
    said = Image.new("RGB", (mask.height, _LINE), PAPER)
    upright = ImageDraw.Draw(said)
    upright.text((mask.height, 2), "blocks of queries, down", fill=FAINT, font=font(_LETTERS), anchor="ra")
    image.paste(said.rotate(90, expand=True), (beside - _LINE - 6, above))
    return image


def _wrapped(text: str, width: int) -> list[str]:
    return wrapped(text, font(_LETTERS), width)


def _write(pen: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str]) -> int:
    """Write lines from `at` on; the y of the next."""
    x, y = at
    for line in lines:
        pen.text((x, y), line, fill=FAINT, font=font(_LETTERS))
        y += _LINE
    return y
