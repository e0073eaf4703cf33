"""What the controls say, read as a `Job`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipelines import clip, task
from ...pipelines.errors import BadInput
from ..server import uploads
from . import reading, takes
from .reading import label

if TYPE_CHECKING:
    from ...pipelines.job import Job
    from ..server.limits import Limits
    from ..server.shelf import Offer
    from ..server.visitors import Visitor
    from .job_form import JobForm


def job(form: JobForm, values: Sequence[Any], visitor: Visitor) -> tuple[Offer, Job]:
    """What `JobForm.job` returns.

    Raises:
        BadInput: a value that is none, is not offered, or is beyond the limits; with the control's label.
    """
    given = dict(zip(form.controls, values, strict=False))
    shelf, limits = form.site.shelf, form.site.limits
    offer = shelf.offer(reading.one_of(given["model"], label("model"), [each.label for each in form.offers]))
    read = _read(given, offer)
    if form.method is not None:
        read["methods"] = form.method.methods(values[len(form.controls) :], offer) or {}
    upload = reading.file(given["image"], label("image"))
    for name, most in lowered(offer, limits).items():
        if read[name] is None and (upload is None or name not in ("width", "height")):
            read[name] = most
        if name == "frames" and read["route"] == "windows" and read["window"] is None:
            read["window"] = most
    _check(offer, read, upload)
    try:
        asked = shelf.job(offer, **read)
        limits.check(asked)
        task.check(dataclasses.replace(asked, image=Path(upload) if upload else None))
    except BadInput as error:
        raise BadInput(reading.in_words(str(error))) from error
    if upload is not None:
        asked = takes.with_picture(asked, offer, uploads.picture(upload, visitor.folder), limits.max_size)
    return offer, asked


def lowered(offer: Offer, limits: Limits) -> dict[str, int]:
    """What is left empty and would be beyond this server's limits → the most that it may be."""
    of_clip = clip.temporal_factor(offer.pipe) if offer.clips else 1
    most = {
        "width": limits.max_size // offer.multiple * offer.multiple,
        "height": limits.max_size // offer.multiple * offer.multiple,
        "steps": limits.max_steps,
        "frames": (limits.max_frames - 1) // of_clip * of_clip + 1,
    }
    return {name: value for name, value in most.items() if (getattr(offer.native, name) or 0) > value > 0}


def _read(given: dict[str, Any], offer: Offer) -> dict[str, Any]:
    """Fields of a `Job` from the values of the controls, but for the method and the picture.

    Raises:
        BadInput: a value that is none.
    """
    read: dict[str, Any] = {
        "prompt": reading.text(given["prompt"], label("prompt")),
        "negative": reading.text(given["negative"], label("negative")) or None,
        "route": reading.one_of(given["route"], label("route"), offer.routes),
        "seed": reading.whole(given["seed"], label("seed")) or 0,
    }
    for name in ("width", "height", "steps", "frames", "window", "overlap"):
        read[name] = reading.whole(given.get(name), label(name))
    for name in ("guidance", "true_cfg", "strength"):
        read[name] = reading.number(given.get(name), label(name))
    read["fps"] = reading.rate(given.get("fps"))
    return read


def _check(offer: Offer, read: dict[str, Any], upload: str | None) -> None:
    """
    Raises:
        BadInput: something is missing, or is given to a model that knows nothing of it.
    """
    if not read["prompt"].strip():
        raise BadInput(f"{label('prompt')}: say what to show.")
    if read["negative"] is not None and not offer.takes_negative:
        raise BadInput(f"{label('negative')}: {offer.label} takes none.")
    if not offer.clips:
        for name in ("frames", "fps"):
            if read[name] is not None:
                raise BadInput(f"{label(name)}: {offer.label} makes pictures, not clips.")
    if upload is not None and not offer.takes_picture:
        raise BadInput(f"{label('image')}: {offer.label} begins with none.")
    if upload is None and offer.needs_picture:
        raise BadInput(f"{label('image')}: {offer.label} begins with one; choose it.")
    if upload is None and read["strength"] is not None:
        raise BadInput(f"{label('strength')}: there is no picture to change.")
