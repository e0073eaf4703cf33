"""What the controls of a job say, whatever a client sends."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import pytest
from attnswap.demo.forms.job_form import JobForm
from attnswap.demo.server.visitors import Visitor
from attnswap.demo.site import Site
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.job import Job

from .given import REQUEST, form_of, planned, values_of


def asked(form: JobForm, visitor: Visitor, **given: Any) -> Job:
    return form.job(values_of(form, **given), visitor)[1]


def refused(form: JobForm, visitor: Visitor, **given: Any) -> str:
    with pytest.raises(BadInput) as refusal:
        asked(form, visitor, **given)
    assert "\n" not in str(refusal.value)
    assert "--" not in str(refusal.value)
    return str(refusal.value)


def test_what_a_page_begins_with_is_the_models_own(form: JobForm, visitor: Visitor, site: Site) -> None:
    job = asked(form, visitor)
    assert job == Job("a fox on a blue background")
    assert planned(site, form.first, job).job.width == 64


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
        ({"fps": True}, "Frames per second: expected text, got yes or no."),
        ({"fps": math.inf}, "Frames per second: expected a number, got inf."),
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


# Limits below what the model's preset has.


@pytest.fixture
def limited(site: Site) -> JobForm:
    lower = dataclasses.replace(site.limits, max_size=61, max_steps=5, max_frames=15)
    return form_of(dataclasses.replace(site, limits=lower), clips=None)


def test_what_is_left_empty_is_within_the_limits(limited: JobForm, visitor: Visitor) -> None:
    job = asked(limited, visitor)
    assert (job.width, job.height, job.steps) == (56, 56, 5)
    clip = asked(limited, visitor, model="emoji-video")
    assert (clip.width, clip.height, clip.frames, clip.window) == (56, 56, 15, None)
    assert asked(limited, visitor, model="emoji-video", route="windows").window == 15


def test_a_picture_to_begin_with_keeps_its_shape_there(limited: JobForm, visitor: Visitor, upload: str) -> None:
    job = asked(limited, visitor, image=upload)
    assert (job.width, job.height) == (56, 24)


def test_what_is_given_beyond_the_limits_is_refused(limited: JobForm, visitor: Visitor) -> None:
    assert "width 64 is more than this server allows" in refused(limited, visitor, width=64)
