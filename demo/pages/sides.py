"""The two sides of the slider."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ...pipelines.compare.variants import DENSE
from ..forms.reading import plain

if TYPE_CHECKING:
    from ...pipelines.compare.figures import Comparison, Outcome

BOTH = "both, with a handle"
#: What can be seen of the two sides → percent of the width that the left one takes.
POSITIONS = {BOTH: 50, "the left one alone": 100, "the right one alone": 0}


def pictures(found: Comparison, folder: Path, name: str) -> tuple[Any, str]:
    """Of the slider: dense attention on the left and a method on the right, and Markdown that says so.

    Where one of them is missing, the other takes both sides; where both are, there is none.
    """
    [shot] = found.shots
    outcomes = {variant.name: found.outcome(shot, variant) for variant in found.variants}
    dense, other = (_picture(folder, outcomes.get(each)) for each in (DENSE.name, name))
    what = "middle frame" if found.frames else "picture"
    if dense and other:
        of = " The middle frame; the clips are below." if found.frames else ""
        said = f"Left: dense attention. Right: {name}. Drag the handle.{of}"
    elif dense or other:
        there, missing = ("dense attention", name) if dense else (name, "dense attention")
        said = f"The {what} of {there} alone: there is none of {missing}."
    else:
        said = f"There is no {what}."
    left, right = dense or other, other or dense
    pair = (left, right) if left and right else None
    return gr.ImageSlider(pair, slider_position=POSITIONS[BOTH], visible=pair is not None), plain(said)


def _picture(folder: Path, outcome: Outcome | None) -> str | None:
    """Of a clip its middle frame, beside it."""
    if outcome is None or outcome.file is None:
        return None
    file = folder / outcome.file
    return str(file if file.suffix == ".png" else middle(file))


def middle(clip: Path) -> Path:
    """Where the middle frame of a clip is kept."""
    return clip.with_name(f"{clip.stem}-middle.png")
