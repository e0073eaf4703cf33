"""What a job will cost, told before it runs."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ...accel.auto import AUTO
from ...accel.errors import UnsupportedModel
from ...pipelines.errors import BadInput, JobFailed
from ...pipelines.task import Task, extension, plan
from ..server.live import duration

if TYPE_CHECKING:
    from ...pipelines.job import Job
    from ..server.live import Live
    from ..server.shelf import Offer
    from ..site import Site
    from .counts import Call

# Of a run that is made to measure: the first warms up.
STEPS = 2


@dataclass(frozen=True)
class Estimate:
    """
    Attributes:
        tokens: in the longest attention over the picture or clip, in the largest stage.
        seconds: of denoising and decoding; None before anything has run with the model.
        text: Markdown, a line or two.
        task: the job with everything filled in; None where it could not be.
    """

    tokens: int
    seconds: float | None
    text: str
    task: Task | None


def estimate(site: Site, offer: Offer, job: Job) -> Estimate:
    """Takes milliseconds, but for the first of a model, which counts its operations; reads no weights.

    Raises:
        BadInput: the model cannot do the job, or this server does not.
    """
    site.limits.check(job)
    try:
        task = plan(job, offer.model, offer.pipe, offer.preset, site.shelf.device)
        site.limits.check(task.job)
        stage = max(task.stages, key=lambda each: each.width * each.height)
        frames = task.job.window or task.job.frames
        call = site.pace.counts.call(offer, stage.width, stage.height, frames, stage.steps, task.configs)
        compared = _compared(call, offer, _native(site, offer), (stage.width, stage.height, frames))
        seconds, told_from = site.pace.predict(offer, task)
    except UnsupportedModel as error:
        raise BadInput(str(error)) from error
    of_clip = f", {frames} frames{' at a time' if task.job.window else ''}" if frames else ""
    size = f"**{call.tokens:,} tokens** at {stage.width}×{stage.height}{of_clip}, {compared}."
    time = f"About {duration(seconds)} ({told_from})." if seconds is not None else "The first run will tell how long."
    return Estimate(call.tokens, seconds, " ".join(filter(None, [size, _method(job, task, call), time])), task)


def prepare(site: Site, offer: Offer, live: Live) -> None:
    """Loads the model, and times two steps of its native size where nothing is known of it. For the worker's thread.

    Raises:
        BadInput, UnsupportedModel, JobFailed: it cannot be loaded.
    """
    live.say(f"loading {offer.label}")
    session = site.shelf.session(offer)
    if site.pace.knows(offer):
        return
    native = offer.native
    # What goes wrong here is said of the first job that it matters to.
    with tempfile.TemporaryDirectory(dir=site.folder) as name, suppress(BadInput, UnsupportedModel, JobFailed):
        folder, image = Path(name), None
        if offer.needs_picture:
            image = folder / "grey.png"
            Image.new("RGB", (native.width or 0, native.height or 0), "grey").save(image)
        output = folder / f"timed{extension(offer.model)}"
        job = site.shelf.job(offer, prompt="a", image=image, steps=STEPS, output=output)
        task = session.plan(job)
        live.expect(task.stages)
        live.say(f"timing {STEPS} steps of {offer.label}")
        [result] = session.make([task], watch=live)
        site.pace.learn(task, live, result.seconds)
        _native(site, offer)  # so that the first estimate need not count


def _native(site: Site, offer: Offer) -> Call:
    native = offer.native
    assert native.width is not None
    assert native.height is not None
    return site.pace.counts.call(offer, native.width, native.height, native.frames)


def _compared(call: Call, offer: Offer, native: Call, size: tuple[int, int, int | None]) -> str:
    if size == (offer.native.width, offer.native.height, offer.native.frames):
        return "the native size"
    ratio = call.tokens / native.tokens
    if ratio < 1:
        return f"{ratio:.0%} of those of the native size"
    if ratio == 1:
        return "as many as at the native size"
    return f"{f'{ratio:.2g}' if ratio < 10 else f'{ratio:,.0f}'} times those of the native size"


def _method(job: Job, task: Task, call: Call) -> str:
    """What the methods of the job leave of dense attention, and which they are where `auto` has chosen them."""
    names, by_auto = " + ".join(task.job.methods), AUTO in job.methods
    if not names:
        return "auto chooses dense attention." if by_auto else ""
    who, several = f"{AUTO} chooses {names}, which" if by_auto else names, len(task.job.methods) > 1
    if call.share > 0.995:
        return f"{who} {'have' if several else 'has'} nothing to do at this size."
    return f"{who} {'leave' if several else 'leaves'} {100 * call.share:.2g}% of dense attention's work."
