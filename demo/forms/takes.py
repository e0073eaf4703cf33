"""What a model takes beside words and numbers."""

from __future__ import annotations

import dataclasses
import inspect
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ...pipelines import guidance, image_input
from ...pipelines.errors import BadInput
from ...pipelines.job import Job

if TYPE_CHECKING:
    from ..server.shelf import Offer


def examples(offer: Offer) -> tuple[str, ...]:
    """Prompts that the model's folder proposes."""
    return tuple(offer.preset.examples)


def with_picture(job: Job, offer: Offer, picture: Path, most: int) -> Job:
    """`job` that begins with `picture`, by default in its shape and of about as many pixels as the model's own.

    Args:
        most: pixels that a side of what is not given may have.
    """
    job = dataclasses.replace(job, image=picture)
    native = offer.native
    if job.width or job.height or not (native.width and native.height):
        return job
    taker, area = image_input.taker(job, offer.pipe), (native.width, native.height)
    width, height = image_input.size(job, taker, area, offer.multiple)
    if max(width, height) > most:
        side = max(most // offer.multiple, 1) * offer.multiple
        lower = dataclasses.replace(job, width=side) if width > height else dataclasses.replace(job, height=side)
        with suppress(BadInput):  # the pipeline has a size of its own, which is beyond what is allowed
            width, height = image_input.size(lower, taker, area, offer.multiple)
            return dataclasses.replace(job, width=width, height=height)
    return job if offer.clips else dataclasses.replace(job, width=width, height=height)


def has_true_cfg(offer: Offer) -> bool:
    """Whether the pipeline knows a second kind of guidance beside the one it is trained on."""
    accepted = inspect.signature(offer.pipe.__call__).parameters
    return "true_cfg_scale" in accepted and not guidance.is_true(offer.pipe)


def takes_strength(offer: Offer) -> bool:
    """Whether how much of a picture changes can be said."""
    if not offer.takes_picture:
        return False
    taker = image_input.taker(Job("", model=offer.label, image=Path("picture.png")), offer.pipe)
    return "strength" in inspect.signature(taker.__call__).parameters
