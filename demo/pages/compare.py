"""The page on which dense attention and one or two methods make the same picture or clip."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import gradio as gr

from ...pipelines import settings
from ...pipelines.compare import metrics
from ...pipelines.compare.run import compare
from ...pipelines.compare.variants import DENSE, Variant
from ...pipelines.errors import BadInput
from .. import endpoint
from ..cost.estimate import of_comparison
from ..forms import method_form, reading, sizes
from ..forms.job_form import PRICING, JobForm
from ..forms.method_form import MethodForm
from ..server import log
from ..server.live import without_folders
from ..server.worker import NOTHING, Failed, Finished, Progress, Stopped
from . import sides, words
from .compared import WELCOME, Compared
from .make import NOT_TAKEN, SHOW, TAKEN_OUT, WAITING, is_running, tell_of_stopping

if TYPE_CHECKING:
    from ...pipelines.compare.figures import Comparison
    from ...pipelines.job import Job
    from ...pipelines.routes import Stage
    from ...pipelines.session import Result
    from ..server.live import Live
    from ..server.shelf import Offer
    from ..server.visitors import Visitor
    from ..site import Site

SECOND = "second_"
NOTHING_DONE = "Nothing was finished, so there is nothing to compare."
BEGIN = f"""() => {{
  {SHOW}
  return "{WAITING}";
}}"""


class Opponent(MethodForm):
    """A choice of method without dense attention, which is always compared."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        for method in method_form.names_in(self.choice.value):
            if method in self._groups:
                self._groups[method].visible = True

    def choices(self, offer: Offer) -> tuple[str, ...]:
        found = [one for one in super().choices(offer) if one not in (method_form.DENSE, settings.AUTO)]
        # First what the model's preset is made for, as the first one is chosen.
        found.sort(key=lambda one: one not in (method_form.NONE, *offer.preset.methods))
        return (*found, settings.AUTO)


class Runs:
    """Tells of all runs of a comparison as one (`pipelines.compare.studio.Watcher`)."""

    def __init__(self, live: Live, runs: int, stages: Sequence[Stage]) -> None:
        self._live, self._runs, self._stages = live, runs, stages
        self._begun = False
        self.begin, self.reach, self.frame_done, self.close = live.begin, live.reach, live.frame_done, live.close
        self.say = live.say

    def next_run(self, name: str) -> None:
        if not self._begun:
            # Not before: until then, `say` is what stops a warm-up.
            self._live.expect(self._stages, runs=self._runs)
            self._begun = True
        self._live.next_run(name)


class ComparePage:
    """To be built inside `gr.Blocks`.

    Attributes:
        form: what is asked for, but for the methods.
        first, second: the methods.
        inputs, names, outputs: of the endpoint /compare.
        stop, status: the button, and where its effect is told.
        made: the event that Stop cancels.
    """

    kind = "compare"

    def __init__(self, site: Site) -> None:
        self.site = site
        with gr.Row(elem_classes="page"):
            with gr.Column(min_width=320):
                self.form = JobForm(site, clips=None, elem="compare", method=False, larger=True)
                with self.form.place:
                    self.first = Opponent(site, self.form.first, elem="compare")
                    self.second = Opponent(site, self.form.first, prefix=SECOND, optional=True, elem="compare-second")
                self.second.why_not.visible = False  # the same as of the first
                with self.form.actions:
                    self.runs = gr.Markdown(runs(self.second.choice.value), elem_id="compare-runs")
                    with gr.Row(elem_classes="buttons"):
                        self.go = gr.Button("Compare", variant="primary", min_width=120, elem_id="compare-go")
                        self.stop = gr.Button("Stop", min_width=120, elem_id="compare-stop")
            with gr.Column(min_width=320, elem_classes="result"):
                self.compared = Compared(self.kind)
        self.status, self.outputs = self.compared.status, self.compared.outputs
        self.inputs = [*self.form.inputs, *self.first.inputs, *self.second.inputs]
        self.names = [*self.form.names, *self.first.names, *self.second.names]

    def wire(self) -> None:
        """Its events, but for Stop, which is one for all pages."""
        self.form.wire()
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "undocumented"}
        sized = [self.form.controls[name] for name in ("model", "width", "height")]
        methods = [*self.first.inputs, *self.second.inputs]
        raw: dict[str, Any] = {**quick, "preprocess": False}
        model, *sides_of_it = sized
        updated = [*methods, self.first.why_not]
        model.change(self.for_model, [*sized, *methods], updated, **raw, api_name="compare_methods")  # type: ignore[attr-defined]
        resized = [side.change for side in sides_of_it]  # type: ignore[attr-defined]
        gr.on(resized, self.for_size, sized, methods, **raw, api_name="compare_methods_sized")
        texts = [self.form.controls["prompt"], self.form.controls["negative"]]
        gr.on(
            [control.change for control in self.inputs if control not in texts],  # type: ignore[attr-defined]
            endpoint.named(self.price, self.names),
            self.inputs,
            self.runs,
            **PRICING,
            trigger_mode="always_last",
            api_name="compare_runs",
            api_visibility="undocumented",
        )
        begin = [self.go.click, self.form.controls["prompt"].submit]  # type: ignore[attr-defined]
        gr.on(begin, None, None, [self.status], js=BEGIN, api_visibility="private")
        made = gr.on(
            begin,
            endpoint.named(self.compare, self.names),
            self.inputs,
            self.outputs,
            preprocess=False,
            api_name="compare",
            api_description="Dense attention and one or two methods on the same prompt and seed: what came of it in "
            "words, all figures, two pictures, the clips side by side.",
            concurrency_id=endpoint.DEVICE,
            concurrency_limit=1,
            show_progress_on=[self.status],
            trigger_mode="once",
        )
        # As soon as it is as high as what it has.
        shown = f"() => {{ setTimeout(() => {{ {SHOW} }}, 500); }}"
        made.success(None, None, None, js=shown, api_visibility="private")
        made.failure(None, self.status, self.status, js=NOT_TAKEN, api_visibility="private")
        self.price_after(made, "price_compare")
        tell_of_stopping(self.stop, self.status, self.kind)
        self.made = made
        right, whole = self.compared.opposite, self.compared.whole
        pair = [self.compared.slider, self.compared.caption, whole]
        right.input(self.opposite, right, pair, **quick, api_name="compare_opposite")
        whole.input(self.whole, whole, self.compared.slider, **quick, api_name="compare_whole")

    def price_after(self, event: Any, name: str) -> None:
        """As that of the form, and of all runs."""
        self.form.price_after(event, name)
        event.success(
            endpoint.named(self.price, self.names),
            self.inputs,
            self.runs,
            **PRICING,
            api_name=f"{name}_runs",
            api_visibility="undocumented",
        )

    def for_model(self, model: Any, width: Any, height: Any, *methods: Any) -> list[dict[str, Any]]:
        """Updates of both methods for a model and size, and of what is said of those that it cannot have."""
        offer, count = self.form.offer(model), len(self.first.inputs)
        size = sizes.given(width, height)
        return [
            *self.first.for_offer(offer, *size, methods[:count]),
            *self.second.for_offer(offer, *size, methods[count:]),
            gr.update(value=method_form.refused(offer)),
        ]

    def for_size(self, model: Any, width: Any, height: Any) -> list[dict[str, Any]]:
        """Updates of both methods for another size; what is chosen, maybe just now, is not touched."""
        offer, size = self.form.offer(model), sizes.given(width, height)
        return [*self.first.for_size(offer, *size), *self.second.for_size(offer, *size)]

    def compare(self, request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """How far it is, then what came of it."""
        visitor = self.site.visitors.of(request)
        try:
            offer, job, variants = self._asked(values, visitor)
            self.form.possible(offer, job)
        except endpoint.SAID as error:
            yield from self._failed(without_folders(str(error)))
            return
        visitor.comparison = None
        yield self.compared.say(f"0 %: {words.preparing(offer)}", begins=True)
        with closing(
            self.site.worker.run(visitor.name, lambda live: self._work(live, visitor, offer, job, variants))
        ) as events:
            for event in events:
                match event:
                    case Progress():
                        yield self.compared.say(f"{100 * event.share:.0f} %: {event.text}")
                    case Finished((found, folder, stopped)):
                        yield self.compared.show(found, folder, stopped)
                    case Stopped(message):
                        yield self.compared.say(f"{message} {NOTHING_DONE}")
                    case Failed(message):
                        yield from self._failed(message)

    def rest(self, request: gr.Request, status: str) -> tuple[Any, ...]:
        """Ends what the visitor has running; of a comparison, shows what was finished, be it all of it.

        Args:
            status: that was shown.
        """
        visitor = self.site.visitors.of(request)
        said = reading.in_words(self.site.worker.stop(visitor.name))
        if status == WAITING:
            said = TAKEN_OUT
        elif is_running(status) and visitor.comparison is not None:
            # That may have been done before it could be stopped; either way its page no longer hears of its end.
            return self.compared.show(*visitor.comparison, said)
        elif said == NOTHING and status not in ("", WELCOME) and not is_running(status):
            said = status
        return (said, *[gr.skip() for _ in self.outputs[1:]])

    def leave(self, request: gr.Request, status: str, said: str) -> tuple[Any, ...]:
        """Shows what was finished of a comparison that was stopped on another page.

        Args:
            status: that was shown here.
            said: there, of what was stopped.
        """
        visitor = self.site.visitors.of(request)
        if is_running(status) and visitor.comparison is not None:
            return self.compared.show(*visitor.comparison, said)
        return tuple(gr.skip() for _ in self.outputs)

    def opposite(self, request: gr.Request, name: str) -> tuple[Any, Any, Any]:
        """Another method on the right."""
        visitor = self.site.visitors.of(request)
        if visitor.comparison is None:
            return gr.skip(), gr.skip(), gr.skip()
        return *sides.pictures(*visitor.comparison, name), sides.BOTH

    def whole(self, shown: str) -> Any:
        """One side alone, or both."""
        return gr.ImageSlider(slider_position=sides.POSITIONS.get(shown, sides.POSITIONS[sides.BOTH]))

    def price(self, request: gr.Request, *values: Any) -> str:
        """How long all runs take together, where that is known, or how many there are."""
        known = ""
        with suppress(*endpoint.SAID):  # the estimate of one run says what is wrong
            offer, job, variants = self._asked(values, self.site.visitors.of(request))
            known = of_comparison(self.site, offer, job, [variant.methods for variant in variants])
        return known or runs(values[self.names.index(f"{SECOND}method")])

    def _asked(self, values: Sequence[Any], visitor: Visitor) -> tuple[Offer, Job, list[Variant]]:
        """
        Raises:
            BadInput: it cannot be compared so.
        """
        of_form, of_first = len(self.form.inputs), len(self.first.inputs)
        offer, job = self.form.job(values[:of_form], visitor)
        given = values[of_form : of_form + of_first], values[of_form + of_first :]
        chosen = [form.methods(own, offer) for form, own in zip((self.first, self.second), given, strict=True)]
        variants = [Variant(name_of(methods), methods) for methods in chosen if methods is not None]
        if len(variants) == 2 and variants[0].methods == variants[1].methods:
            raise BadInput(f"{variants[0].name} is there twice: choose another second method, other settings, or none.")
        return offer, job, variants

    def _work(
        self, live: Live, visitor: Visitor, offer: Offer, job: Job, variants: Sequence[Variant]
    ) -> tuple[Comparison, Path, str]:
        """What came of it, its folder, and how far it came, for one that was stopped."""
        live.say(words.preparing(offer))
        session = self.site.shelf.session(offer)
        planned = session.plan(job).job
        self.site.limits.check(planned)
        live.what = log.described(planned, [DENSE.name, *(variant.name for variant in variants)])
        folder = visitor.new_folder()

        def made(result: Result) -> None:
            self.site.pace.learn(session.plan(result.job), live, result.seconds)
            visitor.keep_compared(result)

        with TemporaryDirectory(dir=self.site.folder) as work:
            found = compare(
                job,
                variants,
                prompts=(job.prompt,),
                seeds=(job.seed,),
                folder=folder,
                say=lambda defect: print(defect, file=sys.stderr),
                session=session,
                watch=lambda runs, stages: Runs(live, runs, stages),
                work=Path(work),
                made=made,
            )
            if found.frames:
                for outcome in found.outcomes.values():
                    if outcome.file:
                        frames = Path(work) / Path(outcome.file).stem
                        metrics.middle_frame(frames).save(sides.middle(folder / outcome.file))
        visitor.comparison = found, folder
        return found, folder, live.message

    def _failed(self, message: str) -> Iterator[tuple[Any, ...]]:
        message = reading.in_words(message)
        yield self.compared.say(f"Not compared: {message}")
        raise endpoint.message(message)


def runs(second: str | None) -> str:
    """What the estimate is of, and how often something like it is done."""
    number = "three" if second and second != method_form.NONE else "two"
    return f"That is for dense attention alone. There will be {number} runs, each with its warm-up."


def name_of(methods: dict[str, dict[str, Any]]) -> str:
    """As `attnswap compare` calls it: "adaspa sparsity=0.8"."""
    given = [f"{name}={settings.shown(value)}" for values in methods.values() for name, value in values.items()]
    return " ".join(["+".join(methods), *given])
