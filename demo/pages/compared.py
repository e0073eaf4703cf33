"""What came of a comparison: the slider, the clips, the bars, the figures, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ...pipelines.compare import files
from ...pipelines.compare.variants import DENSE
from . import sides, verdict
from .charts import Charts
from .make import status_of

if TYPE_CHECKING:
    from ...pipelines.compare.figures import Comparison

# Pixels.
HIGHEST = 512
WELCOME = (
    "The same prompt and seed, once with dense attention, which is the model as it is, and once with each method. "
    "What they look like, and what they cost, will be here."
)


class Compared:
    """To be built inside `gr.Blocks`.

    Attributes:
        status: what is said of it.
        outputs: what `show` and `say` give values of; the status is the first.
        slider: dense attention and a method.
        whole, opposite, caption: how much of each is seen, which method it is, and both in words.
    """

    def __init__(self, elem: str) -> None:
        self.status = status_of(elem, WELCOME)
        with gr.Column(visible=False, elem_id=f"{elem}-result") as self._result:
            self._problems = gr.HTML(elem_id=f"{elem}-problems", padding=False)
            self.opposite = gr.Radio([], label="On the right", elem_id=f"{elem}-opposite")
            self.caption = gr.Markdown(elem_id=f"{elem}-caption")
            self.slider = gr.ImageSlider(
                label="Dense attention and a method",
                show_label=False,
                max_height=HIGHEST,
                interactive=False,
                buttons=["fullscreen"],
                elem_id=f"{elem}-slider",
            )
            # The handle of Gradio's slider takes no keys.
            self.whole = gr.Radio(list(sides.POSITIONS), label="Show", elem_id=f"{elem}-whole")
            self._clip = gr.Video(
                label="All clips side by side",
                show_label=False,
                autoplay=True,
                loop=True,
                interactive=False,
                buttons=[],
                elem_id=f"{elem}-clip",
            )
            self._charts = Charts(elem)
            self._table = gr.Dataframe(
                label="Figures", interactive=False, pinned_columns=1, buttons=["copy"], elem_id=f"{elem}-table"
            )
            self._remarks = gr.HTML(elem_id=f"{elem}-remarks", padding=False)
            with gr.Row():
                self._page = gr.DownloadButton("Download the page with sliders", elem_id=f"{elem}-download", size="md")
                self._sheet = gr.DownloadButton("Download all pictures", elem_id=f"{elem}-sheet", size="md")
            with gr.Accordion("Everything that was measured, and the settings", open=False, elem_id=f"{elem}-details"):
                self._details = gr.JSON(label="Details", show_label=False, elem_id=f"{elem}-json")
        self.outputs: list[Any] = [
            self.status,
            self._details,
            self.slider,
            self._clip,
            self._page,
            self._sheet,
            self.caption,
            self.opposite,
            self.whole,
            *self._charts.outputs,
            self._table,
            self._problems,
            self._remarks,
            self._result,
        ]

    def show(self, found: Comparison, folder: Path, stopped: str) -> tuple[Any, ...]:
        """Values of all outputs; `stopped` is said of one that was."""
        others = [variant.name for variant in found.variants[1:]]
        made = [variant.name for variant in found.variants[1:] if found.summary(variant).made]
        right = (made or others)[0]
        slider, caption = sides.pictures(found, folder, right)
        clip = folder / f"{files.STITCHED}.mp4"
        said = [verdict.stopped(found, stopped)] if found.interrupted else verdict.sentences(found)
        problems = verdict.problems(found)
        both = bool(made) and bool(found.summary(DENSE).made)
        return (
            gr.HTML("\n".join(said), preview=None),
            found.to_dict(),
            slider,
            gr.Video(str(clip) if clip.exists() else None, visible=clip.exists()),
            str(folder / files.PAGE),
            str(folder / files.SHEET),
            caption,
            gr.Radio(others, value=right, visible=len(others) > 1),
            gr.Radio(value=sides.BOTH, visible=both),
            *self._charts.of(found),
            verdict.table(found),
            gr.HTML(verdict.paragraphs(problems), visible=bool(problems)),
            verdict.paragraphs(verdict.remarks(found), small=True),
            gr.Column(visible=True),
        )

    def say(self, text: str, begins: bool = False) -> tuple[Any, ...]:
        """Values of all outputs while there is nothing to show."""
        stopping: dict[str, Any] = {"stopping": False} if begins else {}
        status = gr.HTML(text, preview=None, **stopping)
        return (status, *[gr.skip() for _ in self.outputs[2:]], gr.Column(visible=False))
