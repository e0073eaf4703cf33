"""The report of a distillation: loss curves, teacher and student side by side, and the figures as JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..accel.swap import enabled
from ..pipelines import save
from ..pipelines.emoji_reference import psnr
from ..pipelines.errors import BadInput
from .distill_checkpoint import writing
from .distill_drawing import draw
from .distill_evaluate import Figures, captions_of, measure
from .distill_settings import TERMS
from .distill_trainer import Run

INK, GRID, PAPER = "#222222", "#dddddd", "white"
COLOURS = {"target": "#0072b2", "teacher": "#d55e00", "layers": "#009e73"}  # told apart by the colour-blind, too
LEGEND = {
    "target": "prediction against the data's target",
    "teacher": "prediction against the teacher's",
    "layers": "attention against the teacher's",
}
WIDTH, HEIGHT = 960, 560
LEFT, RIGHT, TOP, BOTTOM = 90, 30, 60, 70
SMALLEST_PICTURE = 192  # smaller ones are shown enlarged
SHEET = 1320
PACKAGES = ("attnswap", "torch", "diffusers", "transformers", "accelerate")


def write_report(run: Run) -> dict[str, Any]:
    """Write `report/` beside the weights; returns what is in its report.json.

    Raises:
        JobFailed: it could not be written, or a picture came out black.
    """
    folder = run.settings.output / "report"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        loss_curves(run.losses).save(folder / "loss.png", optimize=True)
    report: dict[str, Any] = {
        "settings": dataclasses.asdict(run.settings) | {"output": str(run.settings.output)},
        **run.facts,
        "pictures_per_second": round(run.facts["pictures"] / run.seconds, 2) if run.seconds else None,
        "loss": {
            term: {"first_100_steps": _mean(run.losses[:100], term), "last_100_steps": _mean(run.losses[-100:], term)}
            for term in TERMS
        },
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    if run.settings.report_pictures:
        captions = _spread(list(dict.fromkeys(run.captions)), run.settings.report_pictures)
        pairs = teacher_and_student(run, captions)
        with writing(folder):
            side_by_side(captions, *pairs).save(folder / "pictures.png", optimize=True)
        report["psnr_to_teacher"] = round(psnr(*(np.stack([np.asarray(p) / 255 for p in part]) for part in pairs)), 2)
    report["measured"] = measured(run)
    with writing(folder):
        save.write_json(report, folder / "report.json")
    return report


def teacher_and_student(run: Run, captions: Sequence[str]) -> tuple[list[Image.Image], list[Image.Image]]:
    """Pictures of the same captions and seeds; the student's weights are read back from the output folder."""

    def pictures() -> list[Image.Image]:
        made: list[Image.Image] = []
        for first in range(0, len(captions), run.settings.batch):
            part = captions[first : first + run.settings.batch]
            made += draw(run.pipe, part, range(first, first + len(part)), run.sampling)
        return made

    teacher = pictures()
    with enabled(run.pipe, run.after):
        return teacher, pictures()


def measured(run: Run) -> Figures | None:
    """Dense attention, and the method before and after, by a model's own captions; None for a model without them.

    The weights are read back from the output folder.
    """
    count = run.settings.report_captions
    if not count or not (run.model.folder / "reference").is_dir():
        return None
    captions = captions_of(run.model, None, count, run.settings.seed)
    methods = {"before": run.before, "after": run.after}
    try:
        return measure(run.pipe, methods, captions, run.sampling, batch=run.settings.batch, seed=run.settings.seed)
    except BadInput as error:
        return {"skipped": str(error)}  # the training is done: what a report lacks must not end it


def loss_curves(rows: Sequence[dict[str, float]]) -> Image.Image:
    """The three terms by step on a logarithmic axis: each step faint, running means on top."""
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen = ImageDraw.Draw(image)
    steps = np.array([row["step"] for row in rows], float)
    values = {term: np.maximum([row[term] for row in rows], 1e-12) for term in TERMS}
    logs = np.log10(np.concatenate(list(values.values()))) if rows else np.zeros(1)
    low, high = math.floor(logs.min()), max(math.ceil(logs.max()), math.floor(logs.min()) + 1)
    last = max(steps[-1], 1.0) if rows else 1.0

    def x_of(step: Any) -> Any:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y_of(log: Any) -> Any:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (log - low) / (high - low)

    for exponent in range(low, high + 1):
        y = y_of(exponent)
        pen.line([LEFT, y, WIDTH - RIGHT, y], GRID)
        pen.text((LEFT - 10, y), f"{10.0**exponent:g}", INK, _font(15), anchor="rm")
    for step in _ticks(last):
        pen.line([x_of(step), HEIGHT - BOTTOM, x_of(step), HEIGHT - BOTTOM + 6], INK)
        pen.text((x_of(step), HEIGHT - BOTTOM + 12), f"{step:,.0f}", INK, _font(15), anchor="mt")
    pen.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12), "step", INK, _font(17), anchor="mb")
    pen.text((12, 12), "mean squared error", INK, _font(17), anchor="lt")
    x: float = LEFT + 30
    for term, series in values.items():
        pen.line([x - 30, 44, x - 8, 44], COLOURS[term], 4)
        pen.text((x, 44), LEGEND[term], INK, _font(14), anchor="lm")
        x += pen.textlength(LEGEND[term], _font(14)) + 60
        every = max(1, len(series) // 2000)
        pen.line(_points(x_of(steps[::every]), y_of(np.log10(series[::every]))), _faint(COLOURS[term]), 1)
    for term, series in values.items():
        smooth = _running_mean(series, max(1, len(series) // 50))
        pen.line(_points(x_of(steps), y_of(np.log10(smooth))), COLOURS[term], 3, joint="curve")
    pen.rectangle([LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM], outline=INK)
    return image


def side_by_side(
    captions: Sequence[str], teacher: Sequence[Image.Image], student: Sequence[Image.Image]
) -> Image.Image:
    """Pairs of the teacher's picture and the student's, each over its caption, as many in a row as fit `SHEET`."""
    scale = max(1, -(-SMALLEST_PICTURE // teacher[0].width))
    width, height = teacher[0].width * scale, teacher[0].height * scale
    gap, line, head = 10, 30, 34
    pair_width, pair_height = 2 * width + 4 * gap, head + height + line + gap
    columns = min(max(1, SHEET // pair_width), len(captions))
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * pair_width, rows * pair_height + gap), PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, (caption, *pair) in enumerate(zip(captions, teacher, student, strict=True)):
        left, top = place % columns * pair_width + gap, place // columns * pair_height + gap
        for side, (title, picture) in enumerate(zip(("teacher", "student"), pair, strict=True)):
            x = left + side * (width + gap)
            pen.text((x + width / 2, top + head / 2), title, INK, _font(15), anchor="mm")
            sheet.paste(picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (x, top + head))
        text = _shortened(pen, caption, pair_width - 2 * gap)
        pen.text((left, top + head + height + line / 2), text, INK, _font(15), anchor="lm")
    return sheet


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _shortened(pen: ImageDraw.ImageDraw, text: str, width: int) -> str:
    text = " ".join(text.split())
    if pen.textlength(text, _font(15)) <= width:
        return text
    while text and pen.textlength(text + "…", _font(15)) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _ticks(last: float) -> list[float]:
    """Five or so round numbers from 0 to `last`."""
    power = 10 ** math.floor(math.log10(last))
    step = next(factor * power for factor in (0.1, 0.2, 0.5, 1, 2, 5) if last / (factor * power) <= 6)
    return [step * i for i in range(int(last / step) + 1) if float(step * i).is_integer()]


def _points(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _running_mean(series: np.ndarray, window: int) -> np.ndarray:
    """Of the last `window` values, fewer at the start."""
    total = np.cumsum(np.insert(series, 0, 0.0))
    ends = np.arange(1, len(series) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def _faint(colour: str) -> tuple[int, int, int]:
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    red, green, blue = (round(255 - (255 - part) * 0.25) for part in parts)
    return red, green, blue


def _spread(captions: list[str], count: int) -> list[str]:
    """`count` of the captions from all over the list."""
    count = min(count, len(captions))
    return [captions[i * len(captions) // count] for i in range(count)]


def _mean(rows: Sequence[dict[str, float]], term: str) -> float | None:
    return sum(row[term] for row in rows) / len(rows) if rows else None
