"""The controls of a job, and how they follow from one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import gradio as gr
import pytest
from attnswap.demo.cost.pace import Pace
from attnswap.demo.endpoint import named
from attnswap.demo.forms.job_form import JobForm
from attnswap.demo.server.worker import Finished
from attnswap.demo.site import Site
from attnswap.pipelines.errors import BadInput, JobFailed

from .given import REQUEST, form_of, updated, values_of


def test_every_control_has_a_label_and_an_id(form: JobForm, clip_form: JobForm) -> None:
    for each in (form, clip_form):
        for control in each.inputs:
            assert control.label  # type: ignore[attr-defined]
            assert control.elem_id.startswith("image-")  # type: ignore[union-attr]
        assert len(set(each.names)) == len(each.names) == len(each.inputs)


def test_each_form_has_the_controls_of_what_it_makes(form: JobForm, clip_form: JobForm, site: Site) -> None:
    of_clips = {"frames", "fps", "window", "overlap"}
    assert not of_clips & set(form.names)
    assert of_clips <= set(clip_form.names)
    assert [offer.label for offer in form.offers] == ["emoji-sd", "emoji-flux"]
    assert [offer.label for offer in clip_form.offers] == ["emoji-video"]
    both = form_of(site, clips=None, method=False)
    assert of_clips <= set(both.names)
    assert both.method is None
    assert "method" not in both.names
    assert len(both.offers) == 3


# Another model, another size.


def test_another_model_has_its_own_defaults(form: JobForm) -> None:
    values = values_of(form, model="emoji-flux", steps=3, width=256, seed=7, negative="x")
    shown = updated(form, form._for_model(*values))
    assert shown["prompt"]["value"] == "a fox on a blue background"
    assert shown["steps"]["value"] == shown["width"]["value"] == ""
    assert (shown["width"]["placeholder"], shown["guidance"]["placeholder"]) == ("default: 128", "default: 1")
    assert shown["seed"]["value"] == 7
    assert [route for _, route in shown["route"]["choices"]] == ["direct", "ladder"]
    assert shown["method"]["value"] == "dense"


def test_a_prompt_of_ones_own_stays_and_an_example_makes_way(site: Site) -> None:
    form = form_of(site, clips=None)
    for prompt, then in (
        ("my own fox", "my own fox"),
        ("an owl on an orange background", "a fox moving left on a green background"),
        ("", "a fox moving left on a green background"),
    ):
        values = values_of(form, model="emoji-video", prompt=prompt)
        assert updated(form, form._for_model(*values))["prompt"]["value"] == then


def test_the_sizes_are_up_to_eight_times_the_native_one_and_within_the_limits(site: Site) -> None:
    form = form_of(dataclasses.replace(site, limits=dataclasses.replace(site.limits, max_size=4096)))
    assert [text for text, _ in form.size.choices] == [
        "native 64×64",
        "2× 128×128",
        "3× 192×192",
        "4× 256×256",
        "6× 384×384",
        "8× 512×512",
        "other width and height",
    ]
    assert not form._left_out.visible
    limited = form_of(site)
    assert [text for text, _ in limited.size.choices][-2:] == ["4× 256×256", "other width and height"]
    assert limited._left_out.value == "This server allows at most 256 pixels a side."
    assert limited._left_out.visible


def test_a_size_sets_width_and_height_and_these_show_which_it_is(form: JobForm) -> None:
    assert form._set_size("128x128") == [128, 128]
    assert form._set_size("native") == ["", ""]
    assert all("value" not in each for each in form._set_size("own"))
    for size, shown in (((128, 128), "128x128"), ((64, 64), "native"), (("", ""), "native"), ((128, 64), "own")):
        assert form._for_size("emoji-sd", *size)[0]["value"] == shown


def test_without_methods_a_size_is_one_update_and_not_a_list(site: Site) -> None:
    form = form_of(site, clips=None, method=False)
    assert form._for_size("emoji-sd", 128, 128)["value"] == "128x128"


@pytest.mark.parametrize(
    ("model", "largest", "size"),
    [
        ("emoji-sd", 256, (128, 128)),
        ("emoji-flux", 256, (256, 256)),
        ("emoji-flux", 255, ("", "")),
        ("emoji-video", 256, ("", "")),
    ],
)
def test_a_form_can_begin_above_the_native_size_where_that_is_quick(
    site: Site, model: str, largest: int, size: tuple[Any, Any]
) -> None:
    limited = dataclasses.replace(site, limits=dataclasses.replace(site.limits, max_size=largest))
    form = form_of(limited, clips=None, method=False, larger=True)
    shown = updated(form, form._for_model(*values_of(form, model=model)))
    assert (shown["width"]["value"], shown["height"]["value"]) == size


def test_a_list_that_is_left_without_a_choice_changes_nothing(form: JobForm) -> None:
    values = values_of(form, steps=3)
    values[form.names.index("model")] = None  # as the page sends it then
    updates = form._for_model(*values)
    assert all(update == gr.skip() for update in updates)


def test_windows_have_controls_where_the_route_goes_by_them(clip_form: JobForm) -> None:
    assert [update["visible"] for update in clip_form._for_route("windows")] == [True, True]
    assert [update["visible"] for update in clip_form._for_route("direct")] == [False, False]


def test_what_a_model_cannot_do_is_known_without_its_weights(form: JobForm, site: Site) -> None:
    offer = site.shelf.offer("emoji-sd")
    form.possible(offer, site.shelf.job(offer, prompt="a fox", width=64))
    with pytest.raises(BadInput, match="width 65 is not a multiple of 8"):
        form.possible(offer, site.shelf.job(offer, prompt="a fox", width=65))


# The estimate.


def test_the_estimate_is_of_what_is_chosen(form: JobForm) -> None:
    assert "1,024 tokens" in form.price(REQUEST, *values_of(form, width=128, height=128))


def test_what_is_wrong_is_said_in_place_of_the_estimate_in_the_words_of_the_page(form: JobForm) -> None:
    assert form.price(REQUEST, *values_of(form, prompt="")) == "Prompt: say what to show."
    said = form.price(REQUEST, *values_of(form, route="ladder"))
    assert said.startswith("“Route” ladder: 64x64 is not above the native size")
    said = form.price(REQUEST, *values_of(form, model="emoji-flux", negative="a dog"))
    assert said.startswith("“Negative prompt”: in a FluxPipeline of this kind it counts with “Guidance” above 1")


class TestPreparing:
    @pytest.fixture
    def unknown(self, site: Site) -> JobForm:
        """On a machine of which nobody knows yet how fast it is."""
        return form_of(dataclasses.replace(site, pace=Pace()))

    def test_has_a_time_in_the_estimate_before_anything_was_made(self, unknown: JobForm, site: Site) -> None:
        values, before = values_of(unknown), sorted(site.folder.rglob("*.png"))
        assert "About" not in unknown.price(REQUEST, *values)
        assert "About" in next(unknown.prepare(REQUEST, *values))
        assert sorted(site.folder.rglob("*.png")) == before

    def test_says_what_is_wrong_in_place_of_the_estimate(self, form: JobForm) -> None:
        assert "more than this server allows" in next(form.prepare(REQUEST, *values_of(form, steps=1000)))

    def test_of_a_model_that_is_not_offered_says_so(self, form: JobForm) -> None:
        assert "not offered" in next(form.prepare(REQUEST, *values_of(form, model="/etc")))

    def test_of_a_model_that_fails_says_so(self, form: JobForm, monkeypatch: pytest.MonkeyPatch) -> None:
        def failing(*_: Any) -> None:
            raise JobFailed("there is no room for it")

        monkeypatch.setattr("attnswap.demo.cost.estimate.prepare", failing)
        said = form.prepare(REQUEST, *values_of(form))
        assert next(said) == "there is no room for it"
        with pytest.raises(gr.Error, match="there is no room for it"):
            next(said)

    def test_leaves_the_model_of_somebody_else_in_memory(self, unknown: JobForm, site: Site) -> None:
        offer = site.shelf.offer("emoji-sd")
        [*_, last] = site.worker.run("somebody else", lambda live: site.shelf.session(offer))
        list(unknown.prepare(REQUEST, *values_of(unknown, model="emoji-flux")))
        assert isinstance(last, Finished)
        assert site.shelf.session(offer) is last.value


# Through Gradio.


@pytest.fixture
def client(site: Site) -> Iterator[Any]:
    from gradio_client import Client

    with gr.Blocks(analytics_enabled=False) as blocks:
        form = JobForm(site, clips=None, elem="all")
        form.wire()

        def echo(request: gr.Request, *values: Any) -> dict[str, Any]:
            return dict(zip(form.names, values, strict=True))

        button, shown = gr.Button(), gr.JSON()
        button.click(named(echo, form.names), form.inputs, shown, preprocess=False, api_name="echo")
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, show_error=True, ssr_mode=False)
    try:
        yield Client(url, verbose=False), form
    finally:
        blocks.close()


def test_all_controls_arrive_by_their_names(client: tuple[Any, JobForm]) -> None:
    gradio, form = client
    api = gradio.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert [parameter["parameter_name"] for parameter in api["/echo"]["parameters"]] == form.names
    given = {"model": "emoji-flux", "method": "clear", "clear_radius": "5", "steps": 3, "image": None}
    got = gradio.predict("a cat", api_name="/echo", **given)
    assert {name: got[name] for name in ("prompt", *given)} == {"prompt": "a cat", **given}
    assert (got["width"], got["fps"], got["seed"]) == ("", "", 0)
    assert "1,040 tokens" in gradio.predict(
        "a cat", width=256, height=256, image=None, model="emoji-flux", api_name="/estimate_all"
    )
