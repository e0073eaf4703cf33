"""What came of a comparison, in words and as a table."""

from __future__ import annotations

import html
from dataclasses import replace
from typing import Any

import gradio as gr

from ...pipelines.compare import text
from ...pipelines.compare.figures import Comparison, Summary
from ...pipelines.compare.variants import DENSE, Variant
from ..forms.reading import in_words
from ..server.live import without_folders
from . import charts

# Times that differ by less are the same: a machine is not steadier.
STEADY = 0.05
# PSNR in dB, up to which two pictures have little in common, and from which they are hard to tell apart.
ANOTHER, NEAR = 20, 35

DENSE_NAME = "dense attention"
LARGE = "margin: 0 0 0.5em; overflow-wrap: anywhere"
SMALL = "margin: 0 0 0.4em; overflow-wrap: anywhere; font-size: var(--text-sm)"


def sentences(comparison: Comparison) -> list[str]:
    """One or two for each method, of nothing but what was measured; then how to read it."""
    dense = comparison.summary(DENSE)
    said, differ = [], False
    for variant in comparison.variants[1:]:
        summary = comparison.summary(variant)
        differ |= summary.psnr is not None and not summary.identical
        if summary.made and summary.identical == summary.made and _idle(comparison, variant):
            said.append(
                f"{variant.name} replaced no attention in this run, so it changed nothing; it may do more at a larger "
                "size."
            )
        elif summary.made:
            said.append(f"{_speed(variant, summary, dense)}{_work(summary)}{_likeness(comparison, summary)}.")
    if differ:
        said.append(f"The higher the PSNR, the closer to the {_what(comparison)} of dense attention.")
    return said or ["There is nothing to compare."]


def stopped(comparison: Comparison, message: str) -> str:
    """Of one that was stopped: where, and which of its runs are there; `message` is the worker's."""
    where = message.rstrip(".") if message.startswith("Stopped after") else "Stopped"
    said = []
    for there, end in ((True, "done"), (False, "not")):
        names = [
            DENSE_NAME if each == DENSE else each.name
            for each in comparison.variants
            if bool(comparison.summary(each).made) == there
        ]
        if names:
            said.append(f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} {end}")
    return f"{where}: {', '.join(said)}."


def problems(comparison: Comparison) -> list[str]:
    """What failed and why, and what is missing."""
    found = []
    for variant in comparison.variants:
        summary = comparison.summary(variant)
        name = _called(variant)
        if summary.failed:
            found.append(f"{name} failed: {in_words(without_folders(summary.error or ''))}")
        elif not summary.made:
            found.append(f"{name} was not run to its end.")
    if comparison.interrupted:
        found.insert(0, "Stopped, so this is incomplete: it shows what was finished until then.")
    return found


def remarks(comparison: Comparison) -> list[str]:
    """What is to be known of the figures, warm-up included; then what the methods themselves have to say."""
    notes = [note for variant in comparison.variants for note in text.notes_of(comparison, variant, variant.name)]
    return [without_folders(line) for line in dict.fromkeys((*notes, *text.remarks(comparison)))]


def paragraphs(lines: list[str], *, small: bool = False) -> str:
    """HTML of them."""
    style = SMALL if small else LARGE
    return "".join(f'<p style="{style}">{html.escape(line)}</p>' for line in lines)


def table(comparison: Comparison) -> Any:
    """An update of the table: a column for every variant, as a phone is narrow."""
    columns = [text.headings(comparison), *(_column(comparison, variant) for variant in comparison.variants)]
    headings, *rows = zip(*columns, strict=True)
    return gr.Dataframe([list(row) for row in rows], headers=["", *headings[1:]])


def _column(comparison: Comparison, variant: Variant) -> tuple[str, ...]:
    summary = comparison.summary(variant)
    as_charted = replace(summary, density=charts.density(variant, summary))
    name, time, *others = text.cells(comparison, variant.name, as_charted)
    if not summary.made:
        time = "failed" if summary.failed else "not run"
    return (name, time, *others)


def _idle(comparison: Comparison, variant: Variant) -> bool:
    reports = [outcome.report for outcome in comparison.of(variant).values()]
    return all(report is not None and not report["accelerated_calls"] for report in reports)


def _speed(variant: Variant, summary: Summary, dense: Summary) -> str:
    took = text.seconds(summary.seconds)
    if summary.speedup is None:
        return f"{variant.name} took {took}"
    if abs(summary.speedup - 1) < STEADY:
        said = "was as fast as dense attention"
    elif summary.speedup > 1:
        said = f"was {_times(summary.speedup)} times as fast as dense attention"
    else:
        said = f"took {_times(1 / summary.speedup)} times as long as dense attention"
    return f"{variant.name} {said} ({took} against {text.seconds(dense.seconds)})"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 1.5 else f"{ratio:.1f}"


def _work(summary: Summary) -> str:
    if summary.density is None:
        return ""
    return f"; the layers it replaced computed {_percent(summary.density)} of what dense attention computes there"


def _percent(share: float) -> str:
    return text.percent(share).replace(" ", "\u00a0")


def _likeness(comparison: Comparison, summary: Summary) -> str:
    what = _what(comparison)
    if summary.psnr is None:
        return ""
    if summary.identical:
        return f". The {what} is the same, to the last pixel"
    near = "similar; look for the differences"
    if summary.psnr < ANOTHER:
        near = f"a different {what}; judge it by eye"
    elif summary.psnr >= NEAR:
        near = "hard to tell apart"
    return f". PSNR {text.decibels(summary.psnr)}: {near}"


def _what(comparison: Comparison) -> str:
    return "clip" if comparison.frames else "picture"


def _called(variant: Variant) -> str:
    return DENSE_NAME.capitalize() if variant == DENSE else variant.name
