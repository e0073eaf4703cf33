"""Forms, and what a page sends of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gradio as gr
from attnswap.demo.forms.job_form import JobForm
from attnswap.demo.server.shelf import Offer
from attnswap.demo.site import Site
from attnswap.pipelines import task
from attnswap.pipelines.job import Job

REQUEST: Any = SimpleNamespace(session_hash="a")


def form_of(site: Site, clips: bool | None = False, **options: Any) -> JobForm:
    with gr.Blocks(analytics_enabled=False):
        return JobForm(site, clips=clips, elem="image", **options)


def values_of(form: JobForm, **given: Any) -> list[Any]:
    """As a page sends them that shows what the form begins with, but for those given."""
    assert set(given) <= set(form.names), set(given) - set(form.names)
    return [given.get(name, control.value) for name, control in zip(form.names, form.inputs, strict=True)]  # type: ignore[attr-defined]


def updated(form: JobForm, updates: list[Any]) -> dict[str, Any]:
    return dict(zip(form.names, updates, strict=True))


def planned(site: Site, offer: Offer, job: Job) -> task.Task:
    return task.plan(job, offer.model, offer.pipe, offer.preset, site.shelf.device)
