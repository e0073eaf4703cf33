"""What a job will cost, told before it runs."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ...accel.auto import AUTO
from ...accel.errors import UnsupportedModel
from ...pipelines.compare.run import WARM_UP_STEPS
from ...pipelines.compare.text import percent
from ...pipelines.errors import BadInput, JobFailed
from ...pipelines.task import Task, extension, plan
from ..server.live import duration

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...pipelines.job import Job
    from ...pipelines.session import Session
    from ..server.live import Live
    from ..server.shelf import Offer
    from ..site import Site
    from .counts import Call
    from .pace import Prediction

# Of a run that is made to measure: the first does more, and does not count. The native size is left out where a small
# run was SLOW, in seconds; where it was QUICK, a larger is timed too, as a step of a small model hardly grows below.
STEPS, SLOW, QUICK = 3, 10.0, 1.0


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
        predicted = site.pace.predict(offer, task)
    except UnsupportedModel as error:
        raise BadInput(str(error)) from error
    of_clip = f", {frames} frames{' at a time' if task.job.window else ''}" if frames else ""
    size = f"**{call.tokens:,} tokens** at {stage.width}×{stage.height}{of_clip}, {compared}."
    text = " ".join(filter(None, [size, _method(job, task, call), _time(predicted)]))
    return Estimate(call.tokens, None if predicted is None else predicted.seconds, text, task)


def of_comparison(site: Site, offer: Offer, job: Job, methods: Iterable[dict[str, dict[str, Any]]]) -> str:
    """How long dense attention and each of `methods` (as in a `Job`) take together, in words; "" where that is not
    known yet.

    Raises:
        BadInput: as `estimate`, of any of them.
    """
    total = 0.0
    for chosen in ({}, *methods):
        run = estimate(site, offer, replace(job, methods=chosen))
        if run.seconds is None or run.task is None:
            return ""
        few = site.shelf.device.type == "cpu" and not job.compile
        warm_up = min(1.0, WARM_UP_STEPS / min(stage.steps for stage in run.task.stages)) if few else 1.0
        total += (1 + warm_up) * run.seconds
    return f"That is for dense attention alone; roughly {_rounded(total)} for all runs, each with its warm-up."


def prepare(site: Site, offer: Offer, live: Live) -> None:
    """Loads the model, and times it at several sizes where nothing is known of it. For the worker's thread.

    Raises:
        BadInput, UnsupportedModel, JobFailed: it cannot be loaded.
    """
    live.say(f"loading {offer.label}")
    session = site.shelf.session(offer)
    if site.pace.knows(offer):
        return
    _timed(site, offer, session, live, 0.5, steps=1)  # warms up
    if _timed(site, offer, session, live, 0.5) < SLOW and 0 < _timed(site, offer, session, live, 1) < QUICK:
        _timed(site, offer, session, live, 2)
    with suppress(BadInput, UnsupportedModel):
        _native(site, offer)  # so that the first estimate need not count


def _timed(site: Site, offer: Offer, session: Session, live: Live, share: float, steps: int = STEPS) -> float:
    """Seconds that a run with sides of this share of the native ones takes; none where there can be no such run.

    One of a single step is not learned from.
    """
    native = offer.native
    width, height = (
        max(1, int((side or 0) * share) // offer.multiple) * offer.multiple for side in (native.width, native.height)
    )
    # What goes wrong here is said of the first job that it matters to.
    with tempfile.TemporaryDirectory(dir=site.folder) as name, suppress(BadInput, UnsupportedModel, JobFailed):
        folder, image = Path(name), None
        if offer.needs_picture:
            image = folder / "grey.png"
            Image.new("RGB", (width, height), "grey").save(image)
        output = folder / f"timed{extension(offer.model)}"
        job = site.shelf.job(offer, prompt="a", image=image, width=width, height=height, steps=steps, output=output)
        site.limits.check(job)
        task = session.plan(job)
        live.expect(task.stages)
        live.say(f"timing {offer.label} at {width}×{height}")
        [result] = session.make([task], watch=live)
        if steps > 1:
            site.pace.learn(task, live, result.seconds)
        return result.seconds
    return 0.0


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
        return f"{percent(ratio)} of those at the native size"
    if ratio == 1:
        return "as many as at the native size"
    return f"{f'{ratio:.2g}' if ratio < 10 else f'{ratio:,.0f}'} times as many as at the native size"


def _time(predicted: Prediction | None) -> str:
    if predicted is None:
        return "The first run will tell how long."
    if not predicted.rough:
        return f"About {duration(predicted.seconds)} ({predicted.basis})."
    return f"Roughly {_rounded(predicted.seconds)} ({predicted.basis})."


def _rounded(seconds: float) -> str:
    """To one digit: "20 s", "3 min", "2 h"."""
    size, unit = next(
        (size, unit) for size, unit in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= 1.5 * size or size == 1
    )
    return f"{float(f'{max(1.0, seconds / size):.1g}'):g} {unit}"


def _method(job: Job, task: Task, call: Call) -> str:
    """What the methods of the job leave of dense attention, and which they are where `auto` has chosen them."""
    names, by_auto = " + ".join(task.job.methods), AUTO in job.methods
    if not names:
        return "auto chooses dense attention." if by_auto else ""
    who, several = f"{AUTO} chooses {names}, which" if by_auto else names, len(task.job.methods) > 1
    if call.share > 0.995:
        return f"{who} {'have' if several else 'has'} nothing to do at this size."
    # Of all layers, the dense ones too; what is said of a run is of those that a method has replaced.
    return f"{who} {'leave' if several else 'leaves'} {percent(call.share)} of the self-attention in the whole model."
