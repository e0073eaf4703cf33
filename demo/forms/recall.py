"""What a picture remembers, put back into the controls with which the same is made again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...accel.errors import UnsupportedModel
from ...pipelines import provenance, settings, task
from ...pipelines.errors import BadInput
from ...pipelines.job import from_record
from ...pipelines.names import SHOWN
from ...pipelines.printable import printable

if TYPE_CHECKING:
    from ...pipelines.task import Task
    from ..server.shelf import Offer
    from .job_form import JobForm

# Numbers beyond are not exact in a browser.
EXACT = 2**53
# Fields of a job that stay empty where they were, unless what fills them has changed since.
OPEN = ("width", "height", "steps", "guidance", "true_cfg", "frames", "fps", "window", "overlap", "strength")
# Those without a control: what is said where this server does otherwise.
OTHERS = {
    "variant": "the weights' variant was {then}, here it is {now}",
    "dtype": "it was made in {then}, here in {now}",
    "scheduler": "it was made with the scheduler {then}, here with {now}",
    "strengths": "the stages of the route changed the picture by {then}, here by {now}",
    "max_sequence_length": "the prompt had {then} tokens, here {now}",
    "vae_tiling": "decoding in tiles was {then}, here {now}",
    "low_memory": "the way of low memory was {then}, here {now}",
    "compile": "compilation was {then}, here {now}",
}


def restored(form: JobForm, record: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """What `JobForm.restored` returns.

    Raises:
        BadInput: the record does not say how it was made.
    """
    fields = from_record(record)
    offer = form.site.shelf.of_record(fields["model"])
    remarks = []
    if offer is None or offer not in form.offers:
        remarks.append(
            f"it was made with {_shown(fields['model'])}, which is not offered here: {form.first.label} is set"
        )
        offer = form.first
    asked = fields["asked"] or {**dict.fromkeys(OPEN), "methods": {name: {} for name in fields["methods"]}}
    planned = _planned(form, offer, fields, asked)
    values = {name: fields[name] for name in ("prompt", "negative", "route", "seed")}
    values.update({name: _open(name, fields, asked, planned) for name in OPEN})
    remarks += _remarks(fields, record, planned)
    methods, said = _methods(fields, asked, planned)
    remarks += said
    if values["route"] not in offer.routes:
        remarks.append(f"the route {_shown(values['route'])} is not offered for {offer.label}")
        values["route"] = offer.routes[0]
    updates = form.for_model(offer, values)
    if form.method is not None:
        size = fields["width"], fields["height"]
        for update, value in zip(
            form.method.for_offer(offer, *size), form.method.restored(methods, offer), strict=True
        ):
            updates.append({**update, **value})
        remarks += form.method.lost(methods, offer)
    return updates, remarks


def _planned(form: JobForm, offer: Offer, fields: dict[str, Any], asked: dict[str, Any]) -> Task | None:
    """What pressing the button would make of what was asked for; None where that cannot be told without the picture."""
    names = ("prompt", "negative", "route", "seed")
    given = {name: fields[name] for name in names} | {name: asked.get(name) for name in OPEN if name != "strength"}
    given["fps"] = fields["fps"] if asked.get("fps") is not None else None
    # Planning reads the files that settings name, and a record may name any.
    methods = form.method.readable(asked["methods"], offer) if form.method is not None else {}
    job = form.site.shelf.job(offer, **given, methods=methods)
    try:
        return task.plan(job, offer.model, offer.pipe, offer.preset, form.site.shelf.device)
    except (BadInput, UnsupportedModel):
        return None


def _open(name: str, fields: dict[str, Any], asked: dict[str, Any], planned: Task | None) -> Any:
    """Of a field: None where it was left open and would be filled as it was, else what it was."""
    known = planned is not None and (fields["image"] is None or name not in ("width", "height", "strength"))
    if asked.get(name) is None and known and getattr(planned.job, name) == fields[name]:  # type: ignore[union-attr]
        return None
    return fields[name]


def _methods(
    fields: dict[str, Any], asked: dict[str, Any], planned: Task | None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The methods as asked for, with what presets and defaults would set otherwise now; what is to be said of them."""
    then, methods = fields["methods"], asked["methods"]
    if settings.AUTO in methods:
        now = planned.job.methods if planned else {}
        chose = f"{settings.AUTO} chose {_named(then)} then"
        return methods, [] if set(now) == set(then) else [f"{chose}, here {_named(now)}"]
    found = {name: dict(values) for name, values in methods.items()}
    for name, values in found.items():
        recorded = then.get(name, {})
        now = planned.job.methods.get(name, {}) if planned else {}
        values.update({key: recorded[key] for key in recorded if key != "method" and now.get(key) != recorded[key]})
    return found, []


def _remarks(fields: dict[str, Any], record: dict[str, Any], planned: Task | None) -> list[str]:
    found = []
    if fields["seed"] >= EXACT:
        found.append(f"the seed {fields['seed']} is larger than a browser can hold exactly")
    if fields["image"] is not None:
        found.append("it began with a picture, which the file does not hold: choose it again")
    if loras := ", ".join(f"LoRA {_shown(str(lora))}" for lora in fields["loras"]):
        found.append(f"it was made with {loras}, which no control here loads")
    if fields["batch"] is not None:
        found.append(
            f"it was made in one call with {len(fields['batch'].of) - 1} others, and may be rounded otherwise alone"
        )
    if planned is not None:
        for name, text in OTHERS.items():
            then, now = fields[name], getattr(planned.job, name)
            if then != now:
                found.append(text.format(then=_said(then), now=_said(now)))
        prints = record.get("fingerprints")
        if isinstance(prints, dict):  # without the picture, of which all is said
            record = {**record, "fingerprints": {**prints, "image": None}}
        found += provenance.differences(record, planned.record)
    return found


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(f"{part:g}" for part in value)
    return "the model's own" if value is None else _shown(str(value))


def _named(methods: dict[str, Any]) -> str:
    return " + ".join(map(_shown, methods)) or "none"


def _shown(text: str) -> str:
    return printable(text, SHOWN)
