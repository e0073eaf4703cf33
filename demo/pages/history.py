"""The page of what was made in this visit, and of files made earlier: one click brings their settings back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from ...pipelines.compare.text import seconds
from ...pipelines.errors import BadInput
from .. import endpoint
from ..forms.reading import plain
from . import restore
from .inside import tab_of

if TYPE_CHECKING:
    from ..forms.job_form import JobForm
    from ..server.visitors import Entry
    from ..site import Site

NOTHING = (
    "Nothing made yet in this visit. What you make on Image, Video and Compare will be here, and a click on it will "
    "bring its settings back."
)
CLICK = "Made in this visit, the newest first. Click one to have its settings back on the Image or Video page."
# Of a prompt, below a thumbnail.
PROMPT = 60


class HistoryPage:
    """Thumbnails of what a visitor has made, and a place to drop files."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.hint = gr.Markdown(NOTHING)
        self.gallery = gr.Gallery(
            label="Made in this visit",
            show_label=False,
            columns=6,
            height="auto",
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            buttons=[],
            visible=False,
            elem_id="history-gallery",
        )
        self.numbers = gr.State([])
        self.number = gr.Number(label="Number", precision=0, visible=False)
        gr.Markdown("Or drop a PNG, MP4 or GIF that was made here or by `attnswap`: it remembers its settings.")
        self.file = gr.File(
            label="Made earlier",
            file_types=[".png", ".mp4", ".gif"],
            height=140,
            elem_id="history-file",
        )
        self.said = gr.Markdown(elem_id="history-said")
        with gr.Accordion("How it was made, as its file says", open=False):
            self.record = gr.JSON(label="Settings", show_label=False, open=True)

    def wire(self, image_form: JobForm, video_form: JobForm, tabs: gr.Tabs) -> None:
        """Its events; settings go into one of the forms, and its tab is shown."""
        self.forms = image_form, video_form
        self.ids = [tab.id if (tab := tab_of(form.inputs[0])) else None for form in self.forms]
        self.outputs = outputs = [self.record, self.said, tabs, *image_form.inputs, *video_form.inputs, self.file]
        tab = tab_of(self.gallery)
        if tab is not None:
            tab.select(
                self.entries,
                [self.numbers],
                [self.gallery, self.hint, self.numbers],
                queue=False,
                show_progress="hidden",
                api_name="history",
                api_description="Thumbnails of what you have made, the newest first; captions begin with the number.",
            )
        self.gallery.select(
            self.pick,
            [self.numbers],
            [self.number, self.gallery],
            queue=False,
            show_progress="hidden",
            api_name="pick_entry",
            api_visibility="undocumented",
        ).success(
            self.restore_entry,
            [self.number],
            outputs,
            show_progress="hidden",
            api_name="restore_entry",
            api_description="How something you have made was made, by its number.",
        )
        self.file.upload(
            self.restore,
            [self.file],
            outputs,
            show_progress="hidden",
            api_name="restore",
            api_description="How the PNG, MP4 or GIF was made, as it says itself.",
        )

    def entries(self, request: gr.Request, numbers: Any = ()) -> list[Any]:
        """Thumbnails with captions, what to do with them, and their numbers."""
        found = self.site.visitors.of(request).entries[::-1]
        now = [entry.number for entry in found]
        if now and now == list(numbers or ()):
            return [gr.skip()] * 3
        thumbnails = [(str(entry.thumbnail), caption(entry)) for entry in found]
        return [gr.update(value=thumbnails, visible=bool(found)), CLICK if found else NOTHING, now]

    def pick(self, request: gr.Request, numbers: list[int], event: gr.SelectData) -> tuple[int, Any]:
        """The number of the thumbnail that was clicked, which can be clicked again."""
        return numbers[event.index], gr.update(selected_index=None)

    def restore_entry(self, request: gr.Request, number: float | None) -> list[Any]:
        """The settings of an entry: as JSON, in words, and into its form."""
        entries = {entry.number: entry for entry in self.site.visitors.of(request).entries}
        if number not in entries:
            raise endpoint.message(f"no entry {str(number)[:20]} of yours any more.")
        return self._restored(f"number {number:.0f}", entries[int(number)].result.record)

    def restore(self, request: gr.Request, file: str | None) -> Iterator[list[Any]]:
        """The settings that a dropped file remembers: as JSON, in words, and into the form of its kind."""
        if not file:
            raise endpoint.message("no file was given.")
        try:
            yield self._restored(restore.name_of(file), restore.record_of(file))
        except BadInput as error:
            # The message goes with a click; below the place for files, which is empty for the next, it stays.
            yield [None, plain(str(error)), *[gr.skip()] * (len(self.outputs) - 3), None]
            raise endpoint.message(str(error)) from error

    def _restored(self, name: str, record: dict[str, Any]) -> list[Any]:
        found = restore.restored(record, *self.forms)
        # The page that is shown now has no other place for it.
        endpoint.told("\n".join(found.lines(name)), warn=bool(found.remarks))
        # Empty, for the next file.
        return [record, found.said(name), gr.update(selected=self.ids[found.clip]), *found.updates, None]


def caption(entry: Entry) -> str:
    """Number, method, size, seconds and prompt."""
    job = entry.result.job
    size = f"{job.width}×{job.height}" + (f", {job.frames} frames" if job.frames else "")
    prompt = job.prompt if len(job.prompt) <= PROMPT else f"{job.prompt[: PROMPT - 1]}…"
    method = "+".join(job.methods) or "dense"
    return f"{entry.number}: {method}, {size}, {seconds(entry.result.seconds)}: {prompt}"
