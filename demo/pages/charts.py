"""Bars of what a comparison measured. Every axis begins at zero: a bar is as long as what it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
import pandas as pd

from ...pipelines.compare import text
from ...pipelines.compare.figures import Comparison, Summary
from ...pipelines.compare.variants import DENSE, Variant

# Of dense attention and of the others, in order: of about the same lightness, which stands out from a white page and
# from a dark one, and of hues that nearly everybody tells apart (after Okabe and Ito).
COLOURS = ("#808080", "#1f83c9", "#d55e00", "#9a6fb0", "#2b8a57", "#a07d00", "#c75b8a")
# Of the highest bar, above it.
HEADROOM = 1.1
# Pixels.
HEIGHT = 230
# Bars of the same figure would become one under the same label; of these nothing is seen.
NOTHING = "\u200b"


@dataclass(frozen=True)
class Figure:
    """
    Attributes:
        axis: its title, with the unit.
        value: of a variant, in that unit; None where there is none.
        shown: the same below a bar, where there is no room for the unit.
        whole: where the axis ends at least; None: above the highest bar.
    """

    name: str
    title: str
    axis: str
    value: Callable[[Variant, Summary], float | None]
    shown: Callable[[float], str]
    whole: float | None = None


def density(variant: Variant, summary: Summary) -> float | None:
    """That of dense attention, too, which computes all."""
    return 1.0 if variant == DENSE and summary.made else summary.density


FIGURES = (
    Figure(
        "time",
        "Time",
        "seconds",
        lambda _, summary: summary.seconds,
        lambda value: text.seconds(value).removesuffix(" s"),
    ),
    Figure(
        "memory",
        "Peak memory",
        "MiB",
        lambda _, summary: summary.peak_bytes and summary.peak_bytes / 2**20,
        lambda value: f"{value:.0f}",
    ),
    Figure("density", "Attention density", "share of dense attention", density, text.share, whole=1.0),
)


class Charts:
    """One chart a figure, with a key to all of them; built inside `gr.Blocks`.

    Attributes:
        outputs: what `of` gives updates for.
    """

    def __init__(self, elem: str) -> None:
        self._key = gr.HTML(elem_id=f"{elem}-key", padding=False)
        with gr.Row():
            self._plots = [
                gr.BarPlot(
                    x="figure",
                    y="value",
                    color="variant",
                    title=figure.title,
                    x_title=" ",
                    y_title=figure.axis,
                    y_lim=[0, figure.whole],
                    colors_in_legend=[],
                    tooltip="all",
                    height=HEIGHT,
                    min_width=160,  # three fit beside a form
                    show_label=False,
                    elem_id=f"{elem}-{figure.name}",
                )
                for figure in FIGURES
            ]
        self.outputs: list[Any] = [self._key, *self._plots]

    def of(self, comparison: Comparison) -> list[Any]:
        return [key(comparison), *(plot(comparison, figure) for figure in FIGURES)]


def key(comparison: Comparison) -> str:
    """HTML: which bar is of which variant."""
    entries = "".join(
        f'<li style="display: flex; gap: 0.4em; align-items: baseline">'
        f'<span style="flex: none; width: 0.8em; height: 0.8em; background: {colour}"></span>{escape(name)}</li>'
        for name, colour in colours(comparison).items()
    )
    return (
        '<ul aria-label="The bars from left to right" style="display: flex; flex-wrap: wrap; gap: 0.2em 1.2em; '
        f'list-style: none; margin: 0; padding: 0">{entries}</ul>'
    )


def colours(comparison: Comparison) -> dict[str, str]:
    """By the name of the variant, the same in all charts."""
    return {variant.name: COLOURS[place % len(COLOURS)] for place, variant in enumerate(comparison.variants)}


def plot(comparison: Comparison, figure: Figure) -> Any:
    """An update of a chart."""
    bars = table(comparison, figure)
    highest = float(bars["value"].fillna(0).max())
    # Linear attention over few tokens is more than the whole.
    top = max(figure.whole, highest) if figure.whole else highest * HEADROOM
    return gr.BarPlot(bars, sort=list(bars["figure"]), color_map=colours(comparison), y_lim=[0, top or None])


def table(comparison: Comparison, figure: Figure) -> pd.DataFrame:
    """A row for every variant, in order: its name, the value, and that as it stands below the bar."""
    rows = []
    for place, variant in enumerate(comparison.variants):
        summary = comparison.summary(variant)
        value = figure.value(variant, summary)
        said = figure.shown(value) if value is not None else "failed" if summary.failed else text.NONE
        rows.append((variant.name, value, said + place * NOTHING))
    return pd.DataFrame(rows, columns=["variant", "value", "figure"]).astype({"value": float})
