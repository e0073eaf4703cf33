"""What a model takes beside words and numbers."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import TYPE_CHECKING

from ...pipelines import guidance, image_input
from ...pipelines.job import Job

if TYPE_CHECKING:
    from ..server.shelf import Offer


def examples(offer: Offer) -> tuple[str, ...]:
    """Prompts that the model's folder proposes."""
    return tuple(offer.preset.examples)


def with_picture(job: Job, offer: Offer, picture: Path) -> Job:
    """`job` that begins with `picture`, by default in its shape and of about as many pixels as the model's own."""
    job = dataclasses.replace(job, image=picture)
    native = offer.native
    if offer.clips or job.width or job.height or not (native.width and native.height):
        return job
    taker = image_input.taker(job, offer.pipe)
    width, height = image_input.size(job, taker, (native.width, native.height), offer.multiple)
    return dataclasses.replace(job, width=width, height=height)


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
