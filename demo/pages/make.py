"""The page on which pictures, or clips, are made."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import gradio as gr

from ...pipelines.preview import Preview
from ...pipelines.stages import StageFolder
from .. import endpoint
from ..forms import reading
from ..forms.job_form import JobForm
from ..server import log
from ..server.worker import NOTHING, Failed, Finished, Progress, Stopped
from . import words

if TYPE_CHECKING:
    from PIL import Image

    from ...pipelines.job import Job
    from ..server.live import Live
    from ..server.shelf import Offer
    from ..server.visitors import Entry, Visitor
    from ..site import Site

# As high as the picture, whatever is in its place, so that nothing below moves.
HEIGHT = "min(30rem, 84vw, 52vh)"
WAITING = "Waiting for its turn …"
TAKEN_OUT = "Stopped: it was taken out of the queue."
# Of a status in a browser: whether something is running, or waits.
RUNNING = f"/^([0-9]+ %|{WAITING})/"
# Where nothing was said of a job that failed, it never came to the server, or could not be begun there.
NOT_TAKEN = f"""(status) => status === "{WAITING}"
  ? "Not made: the server could not take it now. Try again." : status"""
# The text is escaped. That of a run begins with its share in percent, of which the bar is drawn; what has come about
# so far is shown meanwhile, and stays where the run is stopped.
STATUS = """
${preview && /^([0-9]+ %|Stopped)/.test(value)
  ? '<img class="preview" alt="Preview of what is being made" src="' + preview + '">' : ''}
<progress max="100" aria-label="Progress" ${/^[0-9]+ %/.test(value) ? 'value=' + parseInt(value) : 'hidden'}></progress>
<p role="status" aria-live="polite" ${stopping && /^[0-9]+ %/.test(value) ? 'hidden' : ''}>{{value}}</p>
<p role="status" aria-live="polite" ${stopping && /^[0-9]+ %/.test(value) ? '' : 'hidden'}>Stopping …</p>
"""
# The result is brought into view where it is below the form, or begins above what is seen.
SHOW = """for (const shown of document.querySelectorAll(".page > .result")) {
    const { top } = shown.getBoundingClientRect(), form = shown.previousElementSibling.getBoundingClientRect();
    if (shown.offsetParent && (top < 0 || top >= form.bottom)) shown.scrollIntoView({ behavior: "smooth" });
  }"""
# What stays where Stop is pressed and nothing runs.
ENDED = ("Done ", "Stopped", "Not ")
# Of a job whose end and the click on Stop have passed each other on the way.
OVER = "It had ended before it could be stopped. What it made, if anything, is in History."
# A click while something runs changes nothing but that.
BEGIN = f"""(status, words) => {{
  {SHOW}
  if (/^[0-9]+ %/.test(status)) return [status, words, {{ __type__: "update" }}];
  return ["{WAITING}", "", {{ value: null, interactive: false, __type__: "update" }}];
}}"""


class MakePage:
    """A form, and what comes of it.

    Args:
        clips: whether they are made, instead of pictures.

    Attributes:
        form: what is asked for.
        stop, status: the button, and where its effect is told.
        made: the event that Stop cancels.
    """

    def __init__(self, site: Site, clips: bool) -> None:
        self.site, self.clips = site, clips
        self.kind, what = ("video", "clip") if clips else ("image", "picture")
        with gr.Row(elem_classes="page"):
            with gr.Column(min_width=320):
                self.form = JobForm(site, clips=clips, elem=self.kind)
                with self.form.actions, gr.Row(elem_classes="buttons"):
                    self.go = gr.Button("Generate", variant="primary", min_width=120, elem_id=f"{self.kind}-go")
                    self.stop = gr.Button("Stop", min_width=120, elem_id=f"{self.kind}-stop")
            with gr.Column(min_width=320, elem_id=f"{self.kind}-result", elem_classes="result"):
                shared: dict[str, Any] = {
                    "label": what.capitalize(),
                    "interactive": False,
                    "height": HEIGHT,
                    "elem_classes": "made",
                }
                self.result = (
                    gr.Video(autoplay=True, loop=True, buttons=[], **shared)
                    if clips
                    else gr.Image(
                        type="filepath", buttons=["fullscreen"], alt_text="The picture that was made", **shared
                    )
                )
                self.status = status_of(self.kind, f"The {what} will be here.")
                self.words = gr.Markdown(elem_id=f"{self.kind}-words")
                self.download = gr.DownloadButton(
                    f"Download the {what}", elem_id=f"{self.kind}-download", size="md", interactive=False
                )
                with gr.Accordion("How it was made, and all figures", open=False, elem_id=f"{self.kind}-details"):
                    self.details = gr.JSON(label="Details", show_label=False, open=True)

    def wire(self) -> None:
        """Its events, but for Stop, which is one for all pages."""
        self.form.wire()
        begin = [self.go.click, self.form.controls["prompt"].submit]  # type: ignore[attr-defined]
        told = [self.status, self.words]
        gr.on(begin, None, told, [*told, self.download], js=BEGIN, api_visibility="private")
        made = gr.on(
            begin,
            endpoint.named(self.make, self.form.names),
            self.form.inputs,
            [self.result, self.status, self.details],
            preprocess=False,
            api_name=self.kind,
            api_description=f"Make a {'clip' if self.clips else 'picture'}: its file, how it went, how it was made.",
            concurrency_id=endpoint.DEVICE,
            concurrency_limit=1,
            show_progress_on=[self.result],
            trigger_mode="once",
        )
        made.success(
            self.explain,
            [self.details],
            [self.words, self.download],
            api_name=f"explain_{self.kind}",
            api_visibility="undocumented",
            queue=False,
            show_progress="hidden",
        )
        self.form.price_after(made, f"price_{self.kind}")
        made.failure(None, self.status, self.status, js=NOT_TAKEN, api_visibility="private")
        tell_of_stopping(self.stop, self.status, self.kind)
        self.made = made

    def price_after(self, event: Any, name: str) -> None:
        """As that of the form."""
        self.form.price_after(event, name)

    def make(self, request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Previews and how far it is, then the file, what is to be said of it, and how it was made."""
        visitor = self.site.visitors.of(request)
        try:
            offer, job = self.form.job(values, visitor)
            self.form.possible(offer, job)
        except endpoint.SAID as error:
            yield from self._failed(str(error))
            return
        yield None, gr.HTML(f"0 %: {words.preparing(offer)}", preview=None, stopping=False), None
        with closing(self.site.worker.run(visitor.name, lambda live: self._work(live, visitor, offer, job))) as events:
            for event in events:
                match event:
                    case Progress():
                        shown: dict[str, Any] = {"preview": _data_url(event.preview)} if event.preview else {}
                        yield gr.skip(), gr.HTML(f"{100 * event.share:.0f} %: {event.text}", **shown), gr.skip()
                    case Finished(entry):
                        yield str(entry.file), words.headline(entry.result), words.details(entry)
                    case Stopped(message):
                        yield None, message, None
                    case Failed(message):
                        yield from self._failed(message)

    def _work(self, live: Live, visitor: Visitor, offer: Offer, job: Job) -> Entry:
        live.say(words.preparing(offer))
        session = self.site.shelf.session(offer)
        output = visitor.new_file(".mp4" if self.clips else ".png", job)
        task = session.plan(dataclasses.replace(job, output=output))
        self.site.limits.check(task.job)
        live.what = log.described(task.job)
        preview = Preview(session.pipe)
        live.expect(task.stages, preview=preview)
        try:
            [result] = session.make([task], watch=live, say=live.say, look=live.look)
            self.site.pace.learn(task, live, result.seconds)
            if preview.why_not:
                notices = (*result.notices, f"no preview on the way: {preview.why_not}")
                result = dataclasses.replace(result, notices=notices)
            return visitor.keep(result)
        except BaseException:
            output.unlink(missing_ok=True)
            shutil.rmtree(StageFolder(output, {}).path, ignore_errors=True)
            raise

    def _failed(self, message: str) -> Iterator[tuple[Any, ...]]:
        message = reading.in_words(message)
        yield None, f"Not made: {message}", None
        raise endpoint.message(message)

    def explain(self, request: gr.Request, details: dict[str, Any] | None) -> tuple[str, Any]:
        """What was accelerated, and the file to take away; nothing where nothing was made."""
        entries = {entry.number: entry for entry in self.site.visitors.of(request).entries}
        entry = entries.get(details["entry"]) if details else None
        if entry is None:
            return "", gr.update(value=None, interactive=False)
        return words.explained(entry.result), gr.update(value=str(entry.file), interactive=True)

    def stopped(self, said: str, status: str) -> str:
        """What to show of a job that somebody has stopped.

        Args:
            said: by the worker.
            status: that was shown.
        """
        if status == WAITING:
            return TAKEN_OUT
        said = reading.in_words(said)
        if said == NOTHING and is_running(status):
            return OVER
        return status if said == NOTHING and str(status).startswith(ENDED) else said


def status_of(name: str, text: str) -> gr.HTML:
    """What is said of a job, with a bar and a preview while it runs; `text` at first."""
    return gr.HTML(
        text,
        html_template=STATUS,
        preview=None,
        stopping=False,
        label="Status",
        elem_id=f"{name}-status",
        elem_classes="status",
    )


def is_running(status: Any) -> bool:
    """Whether what is shown is said of a run that goes on."""
    return re.match("[0-9]+ %", str(status)) is not None


def tell_of_stopping(stop: gr.Button, status: gr.HTML, name: str) -> None:
    """Says so as soon as the button is pressed: the end is that of a step."""
    stop.click(
        lambda: gr.HTML(stopping=True),
        None,
        status,
        queue=False,
        show_progress="hidden",
        api_name=f"stopping_{name}",
        api_visibility="undocumented",
    )


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
