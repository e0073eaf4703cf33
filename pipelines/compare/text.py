"""Figures as people read them, the same in the table, on the sheet and on the page."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..settings import AUTO
from .figures import Comparison, Outcome, Shot, Summary
from .variants import DENSE, Variant

if TYPE_CHECKING:
    from ..task import Task

NONE, IDENTICAL = "–", "identical"
WIDTH = 100
# A path among the settings may be long.
LONGEST_NAME = 44


def seconds(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return NONE
    return f"{value:.2f} s" if value < 9.995 else f"{value:.1f} s" if value < 99.95 else f"{value:.0f} s"


def times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}x"


def memory(value: int | None) -> str:
    if value is None:
        return NONE
    return f"{value / 2**20:.0f} MiB" if value < 10 * 2**30 else f"{value / 2**30:.1f} GiB"


def share(value: float | None) -> str:
    """A density: a large picture's is a few hundredths."""
    return NONE if value is None else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def percent(share: float) -> str:
    """ "37 %", "1.9 %"."""
    if 0 < share < 0.0005:
        return "less than 0.1 %"
    return f"{100 * share:.1f} %" if 0 < share < 0.0995 else f"{100 * share:.0f} %"


def decibels(value: float | None) -> str:
    if value is None:
        return NONE
    return IDENTICAL if math.isinf(value) else f"{value:.1f} dB"


def similarity(value: float | None) -> str:
    """With a fourth decimal where three would make it 1."""
    return NONE if value is None else f"{value:.4f}" if value >= 0.9995 else f"{value:.3f}"


def caption(outcome: Outcome | None, speedup: float | None) -> list[str]:
    """What stands below a picture, the name apart: two lines."""
    if outcome is None or outcome.error is not None:
        return ["", ""]
    cost = [seconds(outcome.seconds)]
    if outcome.likeness is None:
        return ["  ".join([*cost, f"peak {memory(outcome.peak_bytes)}"]), _density(outcome)]
    cost.append(times(speedup))
    cost.append(_density(outcome))
    likeness = outcome.likeness
    if likeness.identical:
        return ["  ".join(filter(None, cost)), f"{IDENTICAL} to dense"]
    nearness = f"PSNR {decibels(likeness.psnr)}  SSIM {similarity(likeness.ssim)}"
    return ["  ".join(filter(None, cost)), nearness]


def _density(outcome: Outcome) -> str:
    return "" if outcome.density is None else f"density {share(outcome.density)}"


def about(dense: Task, shots: Sequence[Shot]) -> dict[str, str]:
    """What all pictures have in common, in words."""
    job, record = dense.job, dense.record
    device = f"{record['device']} ({record['device_name']})"
    threads = f" with {count(record['threads'], 'thread')}" if record.get("threads") else ""
    found = {
        "model": job.model,
        "size": f"{job.width}x{job.height}",
        "frames": f"{count(job.frames, 'frame')} at {job.fps} a second" if job.frames else "",
        "steps": count(job.steps or 0, "step"),
        "guidance": "" if job.guidance is None else f"guidance {job.guidance:g}",
        "scheduler": job.scheduler or "",
        "image": f"from {job.image.name}" if job.image else "",
        "strength": "" if job.strength is None else f"strength {job.strength:g}",
        "route": "" if job.route == "direct" else f"route {job.route}",
        "loras": ", ".join(f"LoRA {lora}" for lora in job.loras),
        "dtype": job.dtype,
        "compiled": "compiled" if job.compile else "",
        "shots": f"{count(len({shot.prompt for shot in shots}), 'prompt')} x "
        f"{count(len({shot.seed for shot in shots}), 'seed')}",
        "device": f"on {device}{threads}",
    }
    return {name: said for name, said in found.items() if said}


def headings(comparison: Comparison) -> tuple[str, ...]:
    """Those of `cells`."""
    worst = ("worst PSNR", "worst SSIM") if comparison.frames else ()
    return ("variant", "time", "speed-up", "peak memory", "density", "PSNR", "SSIM", *worst)


def cells(comparison: Comparison, name: str, summary: Summary) -> tuple[str, ...]:
    """One row of the table."""
    nearness = decibels(summary.psnr)
    if nearness == IDENTICAL and summary.identical < summary.made:  # the median alone is
        nearness = f"{summary.identical} of {summary.made} {IDENTICAL}"
    worst = (decibels(summary.worst_psnr), similarity(summary.worst_ssim)) if comparison.frames else ()
    return (
        name,
        seconds(summary.seconds),
        times(summary.speedup) if name != DENSE.name else NONE,
        memory(summary.peak_bytes),
        share(summary.density),
        nearness,
        similarity(summary.ssim),
        *worst,
    )


def report(comparison: Comparison) -> str:
    """What is printed: the model, a line for every variant, what failed, and what is to be known of it."""
    lines = textwrap.wrap(", ".join(comparison.about.values()), WIDTH)
    rows = [headings(comparison)]
    failures, notes = [], []
    for variant in comparison.variants:
        summary = comparison.summary(variant)
        name = shortened(variant.name, LONGEST_NAME)
        if summary.made:
            rows.append((name, *cells(comparison, variant.name, summary)[1:]))
        if summary.failed:
            tried = summary.made + summary.failed
            failures.append(f"{name}: failed in {summary.failed} of {tried}: {summary.error}")
        notes += notes_of(comparison, variant, name)
    lines += ["", *columns(rows), ""]
    for line in (*failures, *notes, *remarks(comparison)):
        lines += textwrap.wrap(one_line(line), WIDTH, subsequent_indent="  ")
    return "\n".join(lines).rstrip()


def notes_of(comparison: Comparison, variant: Variant, name: str) -> list[str]:
    """Each with the name of its variant, with which what `auto` says of its choice begins anyway."""
    notes = comparison.notes_of(variant)
    return [note if AUTO in variant.methods and note.startswith(f"{AUTO}: ") else f"{name}: {note}" for note in notes]


def remarks(comparison: Comparison) -> list[str]:
    """What is to be known of the figures: a line for each kind of them, last."""
    since_start = any(outcome.peak_since_start for outcome in comparison.outcomes.values())
    runs = comparison.of(DENSE).values()
    found = [*comparison.notes]
    if runs and all(outcome.error is not None for outcome in runs):
        found.append("dense attention failed, so there is nothing to compare with: no speed-up, no PSNR, no SSIM.")
    if comparison.interrupted:
        planned = len(comparison.shots) * len(comparison.variants)
        found.append(f"interrupted after {len(comparison.outcomes)} of {planned} runs.")
    warm = f"after a warm-up of {count(comparison.warm_up_steps, 'step')} each"
    memory_of = "the process, weights included" if comparison.record.get("device") == "cpu" else "the accelerator"
    since = "since it started, so no run shows less than those before it" if since_start else "during the run"
    found += [
        f"time: denoising and decoding, {warm}; the median where there are several.",
        "speed-up: how many times as fast as dense attention.",
        f"peak memory: the most held by {memory_of}, {since}.",
        "density: the share of dense attention's query-key pairs that was computed, in the layers that were replaced.",
    ]
    if comparison.frames:
        near = "how near to the clip of dense attention, not how good; of all frames, before encoding."
        worst = "worst PSNR, worst SSIM: those of the single frame that is farthest off."
        return [*found, f"PSNR, SSIM: {near}", worst]
    return [*found, "PSNR, SSIM: how near to the picture of dense attention, not how good."]


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of the same length as lines: the first column to the left, the others to the right."""
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        padded = [first + " " * (widths[0] - width(first))]
        padded += [" " * (wide - width(text)) + text for wide, text in zip(widths[1:], rest, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return lines


def width(text: str) -> int:
    """Columns of a terminal that `text` takes."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "FW" else 1
        for letter in text
    )


def one_line(text: str) -> str:
    """Without line breaks and other characters that do not show."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def shortened(text: str, most: int) -> str:
    """At most `most` columns of it, cut with an ellipsis."""
    text = one_line(text[: 10 * most])
    if width(text) <= most:
        return text
    while width(text) > most - 1:
        text = text[:-1]
    return f"{text.rstrip()}…"


def count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
