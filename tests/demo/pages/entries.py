"""What a visitor has made, by the models that come with attnswap."""

from __future__ import annotations

import dataclasses
from typing import Any

from attnswap.demo.server.shelf import Shelf
from attnswap.demo.server.visitors import Entry, Visitor
from attnswap.pipelines.job import Job

FOX = "a fox on a blue background"
MOVING = "a fox moving left on a green background"


def make(shelf: Shelf, visitor: Visitor, model: str = "emoji-sd", **fields: Any) -> Entry:
    """Made as by a page, and kept."""
    offer = shelf.offer(model)
    fields = {"prompt": MOVING if offer.clips else FOX, "steps": 2, **fields}
    return make_job(shelf, visitor, shelf.job(offer, **fields))


def make_job(shelf: Shelf, visitor: Visitor, job: Job) -> Entry:
    offer = shelf.offer(job.model)
    session = shelf.session(offer)
    job = dataclasses.replace(job, output=visitor.new_file(".mp4" if offer.clips else ".png", job))
    [result] = session.make([session.plan(job)])
    return visitor.keep(result)


def value(update: Any) -> Any:
    """What a handler gives a component: the value itself, of an update, or of a component."""
    if isinstance(update, dict) and update.get("__type__") == "update":
        return update.get("value")
    return getattr(update, "value", update)
