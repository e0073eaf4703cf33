"""What the controls of a job say, whatever a client sends, and a record put back into them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from attnswap.demo.cost.pace import Pace
from attnswap.demo.endpoint import named
from attnswap.demo.forms.job_form import JobForm
from attnswap.demo.server.limits import Limits
from attnswap.demo.server.shelf import Offer, Shelf
from attnswap.demo.server.visitors import Visitor, Visitors
from attnswap.demo.server.worker import Worker
from attnswap.demo.site import Site
from attnswap.pipelines import task
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.job import Job
from PIL import Image

REQUEST: Any = SimpleNamespace(session_hash="a")


def form_of(site: Site, clips: bool | None = False, **options: Any) -> JobForm:
    with gr.Blocks(analytics_enabled=False):
        return JobForm(site, clips=clips, elem="image", **options)


@pytest.fixture(scope="module")
def site(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Of all tests here, as building forms takes time and nothing of it changes."""
    folder, worker = tmp_path_factory.mktemp("site"), Worker()
    limits = Limits(max_size=256, max_frames=33, max_steps=20, max_prompt=200)
    yield Site(shelf, worker, Visitors(folder, worker), limits, Pace(), folder)
    worker.close()


@pytest.fixture(scope="module")
def form(site: Site) -> JobForm:
    return form_of(site)


@pytest.fixture(scope="module")
def clip_form(site: Site) -> JobForm:
    return form_of(site, clips=True)


@pytest.fixture
def visitor(site: Site) -> Visitor:
    return site.visitors.of(REQUEST)


@pytest.fixture
def upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A picture where Gradio keeps what is uploaded, twice as wide as high."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(exist_ok=True)
    path = tmp_path / "cache" / "beach.jpg"
    Image.new("RGB", (400, 200), "teal").save(path)
    return str(path)


def values_of(form: JobForm, **given: Any) -> list[Any]:
    """As a page sends them that shows what the form begins with, but for those given."""
    assert set(given) <= set(form.names), set(given) - set(form.names)
    return [given.get(name, control.value) for name, control in zip(form.names, form.inputs, strict=True)]  # type: ignore[attr-defined]


def asked(form: JobForm, visitor: Visitor, **given: Any) -> Job:
    return form.job(values_of(form, **given), visitor)[1]


def refused(form: JobForm, visitor: Visitor, **given: Any) -> str:
    with pytest.raises(BadInput) as refusal:
        asked(form, visitor, **given)
    assert "\n" not in str(refusal.value)
    assert "--" not in str(refusal.value)
    return str(refusal.value)


def updated(form: JobForm, updates: list[Any]) -> dict[str, Any]:
    return dict(zip(form.names, updates, strict=True))


def planned(site: Site, offer: Offer, job: Job) -> task.Task:
    return task.plan(job, offer.model, offer.pipe, offer.preset, site.shelf.device)


# What is asked for.


def test_what_a_page_begins_with_is_the_models_own(form: JobForm, visitor: Visitor, site: Site) -> None:
    job = asked(form, visitor)
    assert job == Job("a fox on a blue background")
    assert planned(site, form.first, job).job.width == 64


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


def test_what_is_given_is_asked_for(form: JobForm, visitor: Visitor) -> None:
    job = asked(
        form, visitor, prompt="a cat", negative="dogs", width=128, height=192.0, steps=5, guidance=3, seed=2**62 + 1,
        route="ladder", method="hidiffusion", hidiffusion_t1="0.5",
    )  # fmt: skip
    assert job == Job(
        "a cat", negative="dogs", width=128, height=192, steps=5, guidance=3.0, seed=2**62 + 1, route="ladder",
        methods={"hidiffusion": {"t1": 0.5}},
    )  # fmt: skip


def test_clips_have_frames_and_their_rate(clip_form: JobForm, visitor: Visitor) -> None:
    job = asked(clip_form, visitor, frames=33, fps="23.976", route="windows", window=17, overlap=8)
    assert (job.model, job.frames, job.fps) == ("emoji-video", 33, Fraction(24000, 1001))
    assert (job.route, job.window, job.overlap) == ("windows", 17, 8)
    assert asked(clip_form, visitor, fps=12).fps == 12


def test_a_client_may_choose_another_model_and_leave_the_rest(form: JobForm, visitor: Visitor, site: Site) -> None:
    offer, job = form.job(values_of(form, model="emoji-flux", method="clear"), visitor)
    assert offer.label == "emoji-flux"
    complete = planned(site, offer, job).job
    assert (complete.width, complete.guidance) == (128, 1.0)
    assert complete.methods["clear"]["radius"] == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": None}, "Prompt: say what to show."),
        ({"prompt": "   "}, "Prompt: say what to show."),
        ({"prompt": 5}, "Prompt: expected text, got a number."),
        ({"prompt": "\ud800"}, "prompt holds what is no text"),
        ({"prompt": "x" * 201}, "the prompt has 201 characters; this server allows 200 at most."),
        ({"negative": ["a"]}, "Negative prompt: expected text, got a list."),
        ({"model": "/etc"}, "Model: '/etc' is not offered. There are: emoji-flux, emoji-sd."),
        ({"model": "emoji-video"}, "Model: 'emoji-video' is not offered."),
        ({"model": {"a": 1}}, "Model: expected text, got an object."),
        ({"width": "wide"}, "Width: expected a whole number, got 'wide'."),
        ({"width": True}, "Width: expected a whole number, got yes or no."),
        ({"width": 64.5}, "Width: expected a whole number, got 64.5."),
        ({"width": math.nan}, "Width: expected a whole number, got nan."),
        ({"width": -math.inf}, "Width: expected a whole number, got -inf."),
        ({"width": 1e300}, "Width: the number is too large."),
        ({"width": 10**400}, "Width: the number is too large."),
        ({"width": 0}, "width 0 is out of range"),
        ({"height": 264}, "height 264 is more than this server allows: at most 256 px."),
        ({"steps": 21}, "steps 21 is more than this server allows: at most 20."),
        ({"steps": [2]}, "Steps: expected a whole number, got a list."),
        ({"guidance": -1}, "guidance -1.0 is out of range"),
        ({"guidance": "much"}, "Guidance: expected a number, got 'much'."),
        ({"guidance": math.nan}, "Guidance: expected a number, got nan."),
        ({"guidance": 10**400}, "Guidance: the number is too large."),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"seed": 2**63}, "Seed: the number is too large."),
        ({"route": "windows"}, "Route: 'windows' is not offered."),
        ({"strength": 0.5}, "Strength: there is no picture to change."),
        ({"image": 5}, "Picture: expected text, got a number."),
        ({"image": "/etc/passwd"}, "this file was not uploaded here."),
        ({"image": {"path": "/etc/passwd"}}, "this file was not uploaded here."),
        ({"method": "hidiffusion", "hidiffusion_t1": "5"}, "hidiffusion: t1 must be a fraction between 0 and 1"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line_that_names_the_control(
    form: JobForm, visitor: Visitor, given: dict[str, Any], said: str
) -> None:
    assert refused(form, visitor, **given).startswith(said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"frames": 34}, "frames 34 is more than this server allows: at most 33."),
        ({"frames": 2.5}, "Frames: expected a whole number, got 2.5."),
        ({"fps": "fast"}, "fps 'fast' is no number"),
        ({"fps": True}, "Frames a second: expected text, got yes or no."),
        ({"fps": math.inf}, "Frames a second: expected a number, got inf."),
        ({"route": "ladder"}, "Route: 'ladder' is not offered."),
    ],
)
def test_a_wrong_value_of_a_clip_is_refused(
    clip_form: JobForm, visitor: Visitor, given: dict[str, Any], said: str
) -> None:
    assert refused(clip_form, visitor, **given).startswith(said)


def test_a_picture_has_no_frames(site: Site, visitor: Visitor) -> None:
    form = form_of(site, clips=None)
    assert refused(form, visitor, frames=5) == "Frames: emoji-sd makes pictures, not clips."
    assert refused(form, visitor, model="emoji-video", image={"path": "x"}) == "Picture: emoji-video begins with none."


# A picture to begin with.


def test_a_picture_is_taken_over_into_the_visitors_folder(form: JobForm, visitor: Visitor, upload: str) -> None:
    for given in (upload, {"path": upload, "orig_name": "beach.jpg"}):
        job = asked(form, visitor, image=given, strength=0.5)
        assert job.image is not None
        assert job.image.parent == visitor.folder
        assert job.strength == 0.5


def test_without_a_size_its_shape_is_kept_at_the_models_own_number_of_pixels(
    form: JobForm, visitor: Visitor, upload: str
) -> None:
    job = asked(form, visitor, image=upload)
    assert (job.width, job.height) == (88, 40)
    assert asked(form, visitor, image=upload, width=128).height is None  # it follows


def test_a_route_does_not_begin_with_a_picture(form: JobForm, visitor: Visitor, upload: str) -> None:
    said = form.price(REQUEST, *values_of(form, image=upload, route="ladder", width=128, height=128))
    assert said == "“Picture”: “Route” ladder begins with noise; leave one of them out."


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
        "own width and height",
    ]
    assert not form._left_out.visible
    limited = form_of(site)
    assert [text for text, _ in limited.size.choices][-2:] == ["4× 256×256", "own width and height"]
    assert limited._left_out.value == "Larger ones are beyond this server's 256 pixels a side."
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


# A record put back.


def back(form: JobForm, record: dict[str, Any]) -> tuple[list[Any], list[str]]:
    """The values that a page then shows, and the remarks."""
    updates, remarks = form.restored(record)
    return [update["value"] for update in updates], remarks


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"prompt": "a cat", "negative": "dogs", "seed": 5, "steps": 3, "guidance": 4.5},
        {"width": 128, "height": 192, "method": "hidiffusion", "hidiffusion_t1": "0.5", "hidiffusion_raunet": "no"},
        {"width": 128, "height": 128, "route": "ladder"},
        {"model": "emoji-flux", "method": "clear", "clear_weights": "none", "clear_radius": "5.0"},
        {"width": 256, "height": 256, "method": "auto"},
        {"method": "hidiffusion+linfusion", "width": 128},
    ],
)
def test_a_record_restores_what_was_asked_for(
    form: JobForm, visitor: Visitor, site: Site, given: dict[str, Any]
) -> None:
    values = values_of(form, **given)
    offer, job = form.job(values, visitor)
    record = planned(site, offer, job).record
    restored, remarks = back(form, record)
    assert remarks == []
    assert dict(zip(form.names, restored, strict=True)) == dict(zip(form.names, values, strict=True))
    again, same = form.job(restored, visitor)
    assert planned(site, again, same).record == record


def test_a_clip_is_restored(clip_form: JobForm, visitor: Visitor, site: Site) -> None:
    values = values_of(clip_form, frames=33, fps="24000/1001", route="windows", overlap=4, method="adaspa")
    offer, job = clip_form.job(values, visitor)
    restored, remarks = back(clip_form, planned(site, offer, job).record)
    assert remarks == []
    assert restored == values
    shown = updated(clip_form, clip_form.restored(planned(site, offer, job).record)[0])
    assert shown["window"]["visible"]


def test_pressing_the_button_again_makes_the_same_picture(form: JobForm, visitor: Visitor, site: Site) -> None:
    values = values_of(form, prompt="an owl", seed=3, steps=2, width=128, height=128, method="hidiffusion")
    offer, job = form.job(values, visitor)
    session = site.shelf.session(offer)
    pictures = []
    for number in range(2):
        output = visitor.folder / f"{number}.png"
        [result] = session.make([session.plan(dataclasses.replace(job, output=output))])
        pictures.append(Image.open(output).tobytes())
        restored, remarks = back(form, result.record)
        assert remarks == []
        offer, job = form.job(restored, visitor)
    assert pictures[0] == pictures[1]


def test_what_a_preset_has_filled_in_otherwise_since_is_given(form: JobForm, visitor: Visitor, site: Site) -> None:
    offer, job = form.job(values_of(form, method="hidiffusion"), visitor)
    record = planned(site, offer, job).record
    record["guidance"], record["steps"] = 3.5, 9
    record["methods"]["hidiffusion"]["t1"] = 0.25
    restored, _ = back(form, record)
    got = dict(zip(form.names, restored, strict=True))
    assert (got["guidance"], got["steps"], got["width"], got["hidiffusion_t1"]) == (3.5, 9, "", "0.25")
    assert got["hidiffusion_t2"] == ""


def test_a_record_of_an_earlier_version_gives_all_it_says(form: JobForm, visitor: Visitor, site: Site) -> None:
    offer, job = form.job(values_of(form, width=128, height=128, method="hidiffusion", hidiffusion_t1="0.5"), visitor)
    record = planned(site, offer, job).record
    del record["asked"]
    restored, remarks = back(form, record)
    assert remarks == []
    _, same = form.job(restored, visitor)
    assert planned(site, offer, same).job == dataclasses.replace(planned(site, offer, job).job, asked=same.to_record())


def test_what_the_form_has_no_control_for_is_said(form: JobForm, visitor: Visitor, site: Site) -> None:
    offer, job = form.job(values_of(form, width=128, height=128, route="ladder"), visitor)
    changed = dataclasses.replace(job, dtype="bfloat16", scheduler="DDIM", strengths=(0.3,), vae_tiling=True)
    record = planned(site, offer, changed).record
    record["loras"] = [{"id": "mine/lora", "scale": 1.0, "weight_name": None}]
    record["seed"] = 2**60
    record["image"] = None
    _, remarks = back(form, record)
    assert remarks[:2] == [
        "the seed 1152921504606846976 is larger than a browser can hold exactly",
        "it was made with LoRA mine/lora, which no control here loads",
    ]
    assert "it was made in bfloat16, here in float32" in remarks
    assert "it was made with the scheduler DDIMScheduler, here with the model's own" in remarks
    assert "the stages of the route changed the picture by 0.3, here by 0.1" in remarks
    assert "decoding in tiles was on, here off" in remarks


def test_the_picture_it_began_with_is_asked_for_and_never_opened(
    form: JobForm, visitor: Visitor, site: Site, upload: str
) -> None:
    offer, job = form.job(values_of(form, image=upload, strength=0.5), visitor)
    record = planned(site, offer, job).record
    record["image"] = record["asked"]["image"] = "/etc/passwd"
    restored, remarks = back(form, record)
    got = dict(zip(form.names, restored, strict=True))
    assert remarks == ["it began with a picture, which the file does not hold: choose it again"]
    assert (got["image"], got["strength"], got["width"], got["height"]) == (None, 0.5, 88, 40)
    _, same = form.job(values_of(form, **{**got, "image": upload}), visitor)
    assert planned(site, offer, same).job.strength == 0.5


def test_a_model_that_is_not_offered_is_said(form: JobForm, visitor: Visitor, site: Site) -> None:
    offer, job = form.job(values_of(form, method="linfusion", steps=3), visitor)
    record = planned(site, offer, job).record
    record["model"] = "/home/somebody/model"
    restored, remarks = back(form, record)
    got = dict(zip(form.names, restored, strict=True))
    assert remarks[0] == "it was made with /home/somebody/model, which is not offered here: emoji-sd is set"
    assert (got["model"], got["steps"], got["method"]) == ("emoji-sd", 3, "linfusion")


@pytest.mark.parametrize("record", [{}, {"prompt": 5}, {"asked": []}])
def test_what_is_no_record_is_refused(form: JobForm, record: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="does not say how the picture was made"):
        form.restored(record)


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
