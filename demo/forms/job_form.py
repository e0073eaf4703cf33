"""What is to be made: the controls of a job, in one column, and how they follow from one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component
from gradio.context import Context

from ...pipelines import task
from ...pipelines.errors import BadInput
from ...pipelines.routes.plan import DESCRIBED
from ..cost import estimate
from ..endpoint import SAID, message, named
from ..server.worker import Failed
from . import asked, reading, recall, sizes, takes
from .method_form import MethodForm, refused
from .reading import label

if TYPE_CHECKING:
    from ...pipelines.job import Job
    from ..server.live import Live
    from ..server.shelf import Offer
    from ..server.visitors import Visitor
    from ..site import Site

#: A number that is not given. Gradio shows None as 0.
EMPTY = ""
#: Of events that make estimates, which wait for one another, and for nothing else.
PRICING: dict[str, Any] = {
    "preprocess": False,
    "show_progress": "hidden",
    "concurrency_id": "estimates",
    "concurrency_limit": 1,
}
NEW_SEED = "() => Math.floor(Math.random() * 2 ** 32)"

# Gradio tells of a dropdown that is left as of one in which something was chosen: then there is no model.
BEFORE = """(model) => {{ document.getElementById("{elem}-model").dataset.before = model; return []; }}"""
CHOSEN = """(...values) => {{
  const shown = document.getElementById("{elem}-model").dataset, model = values[{place}];
  if (shown.before === model) values[{place}] = null;
  shown.before = model;
  return values;
}}"""


class JobForm:
    """The controls of one picture or clip, in one column; what is left empty is as the model's preset has it.

    To be built inside `gr.Blocks`. Events that take `inputs` are to be made with `preprocess=False`: Gradio would
    refuse a choice that only another model has, and everything is checked here.

    Args:
        clips: whether of models that make clips; None for all.
        elem: prefix of the elements' ids, and of the names of its events.
        method: whether to ask for one.
        larger: whether to begin above the native size, where methods have something to do, if this is quick.

    Attributes:
        inputs: The controls.
        names: Of these at endpoints.
        estimate: What it would cost, as it is chosen now.
        method: The controls of the method.
        place: Where a page puts the controls of methods that are not asked for here.
        actions: For buttons: stays in sight, with the estimate.
    """

    def __init__(self, site: Site, *, clips: bool | None, elem: str, method: bool = True, larger: bool = False) -> None:
        self.site, self._elem, self._larger = site, elem, larger
        self._largest = site.limits.max_size
        self.offers = tuple(offer for offer in site.shelf.offers if clips is None or offer.clips == clips)
        self._clips, self._pictures = clips is not False, clips is not True
        self.first = first = self.offers[0]
        self.controls: dict[str, Component] = {}
        props = self.props(first)
        self._prompt(props)
        self._add(gr.Dropdown, "model", props)
        with gr.Column(min_width=0) as self.place:
            self.method = MethodForm(site, first, elem=elem) if method else None
        self._size(props)
        with gr.Row(visible=first.clips) as self._of_clips:
            if self._clips:
                self._add(gr.Number, "frames", props, min_width=120)
                self._add(gr.Textbox, "fps", props, min_width=120)
        with gr.Row():
            self._add(gr.Number, "steps", props, min_width=100)
            self._add(gr.Number, "guidance", props, min_width=100)
            self._add(gr.Number, "true_cfg", props, min_width=100)
            self._new_seed = gr.Button("New seed", size="sm", elem_id=f"{elem}-seed-new", render=False)
            self._add(gr.Number, "seed", props, min_width=160, buttons=[self._new_seed])
        self._route(props)
        self._picture(props)
        with gr.Column(elem_classes="actions", min_width=0) as self.actions:
            self.estimate = gr.Markdown(elem_id=f"{elem}-estimate")
        of_method = self.method
        self.inputs: list[Component] = [*self.controls.values(), *(of_method.inputs if of_method else ())]
        self.names: list[str] = [*self.controls, *(of_method.names if of_method else ())]

    # The controls.

    def _add(self, kind: type[Component], name: str, props: dict[str, dict[str, Any]], **more: Any) -> None:
        self.controls[name] = kind(
            label=label(name),
            elem_id=f"{self._elem}-{name.replace('_', '-')}",
            interactive=True,
            **more,
            **props.get(name, {}),
        )

    def _prompt(self, props: dict[str, dict[str, Any]]) -> None:
        self._add(gr.Textbox, "prompt", props, lines=1, max_lines=6)
        self.examples = gr.Dataset(
            components=[self.controls["prompt"]],
            show_label=False,
            samples=[[text] for text in takes.examples(self.first)],
            visible=bool(takes.examples(self.first)),
            elem_id=f"{self._elem}-examples",
        )
        self._add(gr.Textbox, "negative", props, lines=1, max_lines=4)

    def _size(self, props: dict[str, dict[str, Any]]) -> None:
        with gr.Row():
            self.size = gr.Dropdown(
                label="Size",
                elem_id=f"{self._elem}-size",
                filterable=False,
                interactive=True,
                min_width=240,
                scale=2,
                **sizes.choice(self.first, self._largest, *self._begin(self.first)),
            )
            self._add(gr.Number, "width", props, min_width=100)
            self._add(gr.Number, "height", props, min_width=100)
        self._left_out = gr.Markdown(**sizes.left_out(self.first, self._largest), elem_classes="remark")

    def _route(self, props: dict[str, dict[str, Any]]) -> None:
        goals = [*(["larger pictures"] if self._pictures else []), *(["longer clips"] if self._clips else [])]
        title, visible = f"Route to {' and '.join(goals)}", len(self.first.routes) > 1
        self._routes = gr.Accordion(title, open=False, visible=visible, elem_id=f"{self._elem}-routes")
        with self._routes:
            self._add(gr.Dropdown, "route", props, filterable=False)
            if self._clips:
                with gr.Row():
                    self._add(gr.Number, "window", props, min_width=120)
                    self._add(gr.Number, "overlap", props, min_width=120)

    def _picture(self, props: dict[str, dict[str, Any]]) -> None:
        self._accordion = gr.Accordion(**self._accordion_props(self.first), elem_id=f"{self._elem}-picture")
        with self._accordion:
            sources = ["upload", "clipboard"]
            self._add(
                gr.Image, "image", props, type="filepath", image_mode=None, sources=sources, height=220, buttons=[]
            )
            if self._pictures:
                self._add(gr.Number, "strength", props, step=0.05)

    def _begin(self, offer: Offer) -> tuple[int | None, int | None]:
        """Width and height that are given at first; None for the native ones."""
        return sizes.above(offer, self._largest) if self._larger else (None, None)

    def props(self, offer: Offer) -> dict[str, dict[str, Any]]:
        """Control → what it is like with a model, all values as its preset has them."""
        native, (width, height) = offer.native, self._begin(offer)
        lowered = asked.lowered(offer, self.site.limits)

        def usual(value: Any, name: str = "") -> dict[str, Any]:
            if name in lowered:
                return {"value": EMPTY, "placeholder": f"at most {lowered[name]} here"}
            return {"value": EMPTY, "placeholder": "" if value is None else f"default: {value}"}

        return {
            "prompt": {"value": next(iter(takes.examples(offer)), ""), "placeholder": "what to show"},
            "negative": {"value": "", "placeholder": "what not to show", "visible": offer.takes_negative},
            "model": {"choices": [each.label for each in self.offers], "value": offer.label, "filterable": False},
            "width": {**usual(native.width, "width"), **({"value": width} if width else {})},
            "height": {**usual(native.height, "height"), **({"value": height} if height else {})},
            "steps": usual(native.steps, "steps"),
            "guidance": usual(native.guidance and f"{native.guidance:g}"),
            "true_cfg": {**usual(None), "visible": takes.has_true_cfg(offer)},
            "seed": {"value": 0},
            "frames": {**usual(native.frames, "frames"), "visible": offer.clips},
            "fps": {**usual(native.fps), "visible": offer.clips},
            "route": {
                "choices": [(f"{route}: {DESCRIBED[route]}", route) for route in offer.routes],
                "value": offer.routes[0],
            },
            "window": {**usual(native.frames, "frames"), "info": "Frames at a time.", "visible": False},
            "overlap": {
                "value": EMPTY,
                "placeholder": "default: half",
                "info": "Frames that two windows share.",
                "visible": False,
            },
            "image": {"value": None, "visible": offer.takes_picture},
            "strength": {
                "value": EMPTY,
                "placeholder": "default",
                "info": "How much of it may change, above 0 to 1.",
                "visible": takes.takes_strength(offer),
            },
        }

    def _accordion_props(self, offer: Offer) -> dict[str, Any]:
        title = "Begin with a picture" + (": this model needs one" if offer.needs_picture else "")
        return {"label": title, "open": offer.needs_picture, "visible": offer.takes_picture}

    # What they say.

    def job(self, values: Sequence[Any], visitor: Visitor) -> tuple[Offer, Job]:
        """The job that the values of `inputs` ask for, without an output; nothing is opened but an upload.

        Raises:
            BadInput: a value that is none, is not offered, or is beyond the limits; with the control's label.
        """
        return asked.job(self, values, visitor)

    def possible(self, offer: Offer, job: Job) -> None:
        """Whether the model can do it, without its weights.

        Raises:
            BadInput, UnsupportedModel: it cannot, or gets beyond the limits where it fills in what was left empty.
        """
        planned = task.plan(job, offer.model, offer.pipe, offer.preset, self.site.shelf.device)
        self.site.limits.check(planned.job)

    def restored(self, record: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
        """Updates of `inputs` with which the same is made again, and what of the record they cannot say.

        Raises:
            BadInput: the record does not say how it was made.
        """
        return recall.restored(self, record)

    # Events.

    def wire(self) -> None:
        """The events of the form itself."""
        of = self.controls
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "undocumented"}
        raw: dict[str, Any] = {**quick, "preprocess": False}
        elem = self._elem
        self.examples.click(lambda chosen: chosen[0], self.examples, of["prompt"], **quick, api_name=f"{elem}_example")
        self._new_seed.click(None, None, of["seed"], js=NEW_SEED, show_progress="hidden")
        # By its user alone: a record that is put back brings its own values.
        of["model"].focus(None, of["model"], None, js=BEFORE.format(elem=elem), api_visibility="private")  # type: ignore[attr-defined]
        chosen = CHOSEN.format(elem=elem, place=list(of).index("model"))
        of["model"].input(self._for_model, self.inputs, self.inputs, js=chosen, **raw, api_name=f"{elem}_model")  # type: ignore[attr-defined]
        around = [self.examples, self._of_clips, self._left_out, self._routes, self._accordion]
        around += [self.method.why_not] if self.method else []
        of["model"].change(self._around, of["model"], around, **raw, api_name=f"{elem}_around")  # type: ignore[attr-defined]
        self.size.input(self._set_size, self.size, [of["width"], of["height"]], **raw, api_name=f"{elem}_size")
        sized = [of["model"], of["width"], of["height"]]
        usual = self.method.inputs if self.method else []
        changes = [control.change for control in sized]  # type: ignore[attr-defined]
        gr.on(changes, self._for_size, sized, [self.size, *usual], **raw, api_name=f"{elem}_sized")
        if self._clips:
            by_windows = [of["window"], of["overlap"]]
            of["route"].change(self._for_route, of["route"], by_windows, **raw, api_name=f"{elem}_route")  # type: ignore[attr-defined]
        self._wire_estimate()

    def _wire_estimate(self) -> None:
        texts = [self.controls["prompt"], self.controls["negative"]]
        others = [control for control in self.inputs if control not in texts]
        shared: dict[str, Any] = {
            "inputs": self.inputs,
            "outputs": self.estimate,
            **PRICING,
        }
        handler, page = named(self.price, self.names), Context.root_block
        assert page is not None  # this is called inside of it
        events = [control.change for control in others] + [text.blur for text in texts]  # type: ignore[attr-defined]
        gr.on(events, handler, **shared, trigger_mode="always_last", api_name=f"estimate_{self._elem}")
        page.load(handler, **shared, api_visibility="private")

    def for_model(self, offer: Offer, values: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Updates of the controls, but those of the method, for a model: all as its preset has it but `values`."""
        props = self.props(offer)
        for name, value in (values or {}).items():
            if name not in props or name not in self.controls:
                continue
            props[name]["value"] = EMPTY if value is None else str(value) if isinstance(value, Fraction) else value
        windows = props["route"]["value"] == "windows"
        for name in ("window", "overlap"):
            props[name]["visible"] = windows
        return [gr.update(**props[name]) for name in self.controls]

    def _for_model(self, *values: Any) -> list[dict[str, Any]]:
        given = dict(zip(self.controls, values, strict=False))
        if given["model"] is None:
            return [gr.skip() for _ in self.inputs]
        offer = self.offer(given["model"])
        kept = {"seed": given["seed"]}
        if given["prompt"] and given["prompt"] not in {text for each in self.offers for text in takes.examples(each)}:
            kept["prompt"] = given["prompt"]
        updates = self.for_model(offer, kept)
        if self.method is not None:
            updates += self.method.for_offer(offer, values=values[len(self.controls) :])
        return updates

    def _around(self, model: Any) -> list[dict[str, Any]]:
        offer = self.offer(model)
        shown = takes.examples(offer)
        updates = [
            gr.update(samples=[[text] for text in shown], visible=bool(shown)),
            gr.update(visible=offer.clips),
            gr.update(**sizes.left_out(offer, self._largest)),
            gr.update(visible=len(offer.routes) > 1),
            gr.update(**self._accordion_props(offer)),
        ]
        return [*updates, gr.update(value=refused(offer))] if self.method else updates

    def _set_size(self, chosen: Any) -> list[Any]:
        if chosen == sizes.NATIVE:
            return [EMPTY, EMPTY]
        width, by, height = str(chosen).partition("x")
        return [int(width), int(height)] if by and width.isdecimal() and height.isdecimal() else [gr.skip()] * 2

    def _for_size(self, model: Any, width: Any, height: Any) -> Any:
        """Updates of `size` and of the method's controls; where there are none, no list, which would be a value."""
        offer = self.offer(model)
        width, height = sizes.given(width, height)
        update = gr.update(**sizes.choice(offer, self._largest, width, height))
        return [update, *self.method.for_size(offer, width, height)] if self.method else update

    def _for_route(self, route: Any) -> list[dict[str, Any]]:
        return [gr.update(visible=route == "windows")] * 2

    def price(self, request: gr.Request, *values: Any) -> str:
        """Markdown: what it would cost, as it is chosen, or why it cannot be made."""
        try:
            offer, job = self.job(values, self.site.visitors.of(request))
            return estimate.estimate(self.site, offer, job).text
        except SAID as error:
            return reading.plain(reading.in_words(str(error)))

    def prepare(self, request: gr.Request, *values: Any) -> Iterator[str]:
        """Loads the model that is chosen and learns how fast it is, so that the price is known; says it."""
        visitor = self.site.visitors.of(request)
        try:
            offer = self.site.shelf.offer(values[self.names.index("model")])
        except BadInput:
            yield self.price(request, *values)
            return

        def work(live: Live) -> None:
            # Who has run something wants the like again; nobody's model is to go because of a page that is opened.
            if self.site.shelf.is_free_for(offer) or not self.site.worker.is_for_another(visitor.name):
                estimate.prepare(self.site, offer, live)

        with closing(self.site.worker.run(visitor.name, work, background=True)) as events:
            for event in events:
                if isinstance(event, Failed):
                    yield reading.plain(why := reading.in_words(event.message))
                    raise message(why)  # so that no estimate takes its place
        yield self.price(request, *values)

    def price_after(self, event: Any, name: str) -> None:
        """Has the estimate made again after an event that went well.

        Args:
            name: of the endpoint.
        """
        event.success(
            named(self.price, self.names),
            self.inputs,
            [self.estimate],
            **PRICING,
            api_name=name,
            api_visibility="undocumented",
        )

    def offer(self, model: Any) -> Offer:
        """The model that is chosen.

        Raises:
            gr.Error: there is none of that name.
        """
        try:
            return self.site.shelf.offer(model)
        except BadInput as error:
            raise message(str(error)) from error
