"""The page as a whole: what it consists of, and what it is to Gradio."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from attnswap.demo import app, endpoint
from attnswap.demo.forms.job_form import PRICING
from attnswap.demo.site import Site
from gradio.utils import get_type_hints

PREPARING = {"prepare": "prepared_image", "prepare_video": "prepared_video", "prepare_compare": "prepared_compare"}
STOPS = pytest.mark.parametrize("button", ["image-stop", "video-stop", "compare-stop"])


@pytest.fixture
def config(site: Site) -> dict[str, Any]:
    return app.build(site).get_config_file()


def events(config: dict[str, Any], visibility: str) -> dict[str, dict[str, Any]]:
    return {event["api_name"]: event for event in config["dependencies"] if event["api_visibility"] == visibility}


def test_has_a_tab_for_each_page(config: dict[str, Any]) -> None:
    tabs = [part["props"] for part in config["components"] if part["type"] == "tabitem"]
    assert [tab["label"] for tab in tabs] == ["Image", "Video", "Compare", "Inside", "History"]
    assert [tab["elem_id"] for tab in tabs] == [f"tab-{tab['id']}" for tab in tabs]


def test_has_every_id_once(config: dict[str, Any]) -> None:
    ids = [part["props"].get("elem_id") for part in config["components"]]
    named = [name for name in ids if name]
    assert len(named) == len(set(named))


@pytest.mark.parametrize(
    "name", ["image", "video", "compare", "stop", "estimate_image", "restore", "history", "inside"]
)
def test_names_an_endpoint_for_programs(config: dict[str, Any], name: str) -> None:
    assert name in events(config, "public")


def test_gives_every_event_that_asks_the_server_a_name_of_its_own(config: dict[str, Any]) -> None:
    names = [event["api_name"] for event in config["dependencies"] if event["api_visibility"] != "private"]
    assert len(names) == len(set(names))
    assert not [name for name in names if re.search(r"_\d+$|lambda|named|call", name)]


def test_tells_every_handler_that_asks_for_it_who_the_visitor_is(site: Site) -> None:
    """Gradio leaves it out, without a word, where it cannot resolve an annotation."""
    asking = [
        fn.fn for fn in app.build(site).fns.values() if fn.fn and "request" in inspect.signature(fn.fn).parameters
    ]
    assert len(asking) > 10
    assert [each.__qualname__ for each in asking if get_type_hints(each).get("request") is not gr.Request] == []


def test_takes_the_device_for_one_event_at_a_time(site: Site) -> None:
    found = {fn.api_name: fn for fn in app.build(site).fns.values() if fn.concurrency_id == endpoint.DEVICE}
    assert {"image", "video", "compare"} == set(found)
    assert {fn.concurrency_limit for fn in found.values()} == {1}


def test_lets_no_job_wait_behind_the_timing_of_a_model(site: Site) -> None:
    found = [fn for fn in app.build(site).fns.values() if fn.api_name in PREPARING]
    assert {(fn.concurrency_id, fn.concurrency_limit, fn.trigger_mode) for fn in found} == {
        (app.PREPARING, 1, "always_last")
    }


@STOPS
def test_stop_cancels_everything_that_takes_the_device_and_waits_for_nothing(
    config: dict[str, Any], button: str
) -> None:
    [number] = [part["id"] for part in config["components"] if part["props"].get("elem_id") == button]
    of_button = [event for event in config["dependencies"] if (number, "click") in map(tuple, event["targets"])]
    names = {event["id"]: event["api_name"] for event in config["dependencies"]}
    assert {names[each] for event in of_button for each in event["cancels"]} == {"image", "video", "compare"}
    assert not any(event["queue"] for event in of_button)


@STOPS
def test_stop_is_told_on_every_page_where_something_was_running(config: dict[str, Any], button: str) -> None:
    ids = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
    after = {event["id"] for event in config["dependencies"] if button in [ids.get(n) for n, _ in event["targets"]]}
    told: list[set[str]] = []
    while after:
        following = [event for event in config["dependencies"] if event["trigger_after"] in after]
        after = {event["id"] for event in following}
        told += [{ids[number] for number in event["outputs"]} for event in following]
    assert told[-1] == {"image-status", "video-status", "compare-status"}


def test_no_estimate_is_made_past_the_limit_of_how_many_at_once(site: Site) -> None:
    of_price = re.compile("estimate_|price_|prepared_|compare_runs")
    found = [fn for fn in app.build(site).fns.values() if of_price.match(str(fn.api_name))]
    assert {"estimate_image", "price_video", "prepared_compare_runs"} <= {fn.api_name for fn in found}
    assert all(fn.queue and fn.concurrency_id == PRICING["concurrency_id"] for fn in found)
    assert {fn.concurrency_limit for fn in found} == {1}


def test_the_look_needs_nothing_from_the_network() -> None:
    theme = app.LOOK["theme"]
    assert not theme._get_computed_value("font").count("http")
    assert not [url for url in theme._stylesheets if url]
    [css] = app.LOOK["css_paths"]
    assert not re.search(r"url\(|@import", Path(css).read_text())


def test_the_styles_bring_no_colours_of_their_own() -> None:
    [css] = app.LOOK["css_paths"]
    assert not re.search(r"#[0-9a-f]{3,8}\b(?=[^{}]*;)|rgba?\(|hsla?\(", Path(css).read_text())


def test_sends_gradio_nothing_about_its_visitors(site: Site) -> None:
    blocks = app.build(site)
    assert isinstance(blocks, gr.Blocks)
    assert not blocks.analytics_enabled


def test_keeps_copies_of_files_for_as_long_as_a_page_may_show_them(site: Site) -> None:
    assert app.build(site).delete_cache == (600, 24 * 3600)


def test_what_is_said_of_a_model_that_fails_stays_where_the_estimate_is(config: dict[str, Any]) -> None:
    by_name = {event["api_name"]: event for event in config["dependencies"]}
    for name, after in PREPARING.items():
        assert by_name[after]["trigger_after"] == by_name[name]["id"]
        assert by_name[after]["trigger_only_on_success"]
