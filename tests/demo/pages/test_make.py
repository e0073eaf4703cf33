"""The handlers of the pages that make pictures and clips, called as Gradio calls them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from attnswap.demo.pages import make as make_page
from attnswap.demo.pages.make import MakePage
from attnswap.demo.site import Site
from attnswap.pipelines import preview, save
from attnswap.pipelines.preview import Preview
from PIL import Image


class Asking:
    """A visitor, and a page with what is on it."""

    def __init__(self, site: Site, clips: bool, request: Any) -> None:
        with gr.Blocks(analytics_enabled=False):
            self.page = MakePage(site, clips)
        self.site, self.request = site, request

    def values(self, **given: Any) -> list[Any]:
        form = self.page.form
        at_first = {name: shown.value for name, shown in zip(form.names, form.inputs, strict=True)}
        return list({**at_first, "prompt": "a fox", "steps": 3, **given}.values())

    def make(self, **given: Any) -> Iterator[tuple[Any, ...]]:
        return self.page.make(self.request, *self.values(**given))

    @property
    def files(self) -> list[str]:
        return sorted(file.name for file in self.site.visitors.of(self.request).folder.rglob("*"))


@pytest.fixture
def asking(site: Site, request_of: Any) -> Asking:
    return Asking(site, False, request_of("a"))


def status(event: tuple[Any, ...]) -> str:
    said: str = event[1] if isinstance(event[1], str) else event[1].value
    return said


class TestAPicture:
    def test_comes_after_previews_with_its_record_in_it(self, asking: Asking) -> None:
        *on_the_way, (file, said, details) = asking.make(seed=4)
        assert save.read_record(Path(file))["seed"] == details["seed"] == 4
        assert said.startswith("Done in ")
        shown = list(filter(None, (event[1].props.get("preview") for event in on_the_way)))
        assert len(shown) == 3  # one for each step
        kind, _, data = shown[-1].partition(",")
        assert kind == "data:image/webp;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size[0] >= 32

    def test_says_why_there_were_no_previews(self, asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Preview, "picture", lambda *_: None)
        monkeypatch.setattr(preview, "_unknown", lambda pipe: "its autoencoder is not known")
        *_, (_, _, details) = asking.make()
        assert "no preview on the way: its autoencoder is not known" in details["notices"]

    def test_tells_how_far_it_is_in_percent_that_only_grow(self, asking: Asking) -> None:
        *on_the_way, _ = asking.make()
        shares = [int(status(event).partition(" %: ")[0]) for event in on_the_way]
        assert shares == sorted(shares)
        assert 0 < max(shares) <= 100
        assert any("step 2 of 3" in status(event) for event in on_the_way)

    def test_is_in_the_history_of_its_visitor_alone(self, asking: Asking, request_of: Any) -> None:
        list(asking.make())
        assert [entry.number for entry in asking.site.visitors.of(asking.request).entries] == [1]
        assert asking.site.visitors.of(request_of("b")).entries == []

    def test_teaches_how_long_such_a_one_takes(self, asking: Asking) -> None:
        list(asking.make())
        assert "like the last such run" in asking.page.form.price(asking.request, *asking.values())

    def test_is_explained_and_can_be_taken_away(self, asking: Asking) -> None:
        *_, (file, _, details) = asking.make(method="linfusion")
        said, button = asking.page.explain(asking.request, details)
        assert "linfusion replaced 16 of 32 attention layers" in said
        assert button["value"] == file
        assert button["interactive"]


def test_a_clip_is_made_on_its_own_page(site: Site, request_of: Any) -> None:
    asking = Asking(site, True, request_of("a"))
    *_, (file, said, details) = asking.make(prompt="a fox moving left", steps=1)
    assert save.read_record(Path(file))["frames"] == details["frames"] == 17
    assert "17 frames" in said


class TestWhatCannotBeDone:
    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"prompt": " "}, "Prompt"),
            ({"steps": 1000}, "steps 1000 is more than this server allows: at most 20"),
            ({"width": 65}, "65"),
            ({"model": "/etc"}, "/etc"),
        ],
        ids=["no prompt", "beyond a limit", "seen by the pipeline", "no such model"],
    )
    def test_is_said_on_the_page_and_as_a_message(self, asking: Asking, given: dict[str, Any], said: str) -> None:
        run, seen = asking.make(**given), []
        with pytest.raises(gr.Error, match=said) as caught:
            seen.extend(status(event) for event in run)
        assert seen[-1] == f"Not made: {caught.value.message}"
        assert 5 <= caught.value.duration <= 15  # goes by itself; the status stays
        assert asking.files == []

    def test_is_known_before_the_model_is_loaded(self, asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(type(asking.site.shelf), "session", lambda *_: pytest.fail("the model is loaded"))
        with pytest.raises(gr.Error, match="width 65 is not a multiple of 8"):
            list(asking.make(width=65))

    def test_leaves_nothing_behind_where_it_shows_late(self, asking: Asking) -> None:
        with pytest.raises(gr.Error, match="not-a-number"):
            list(asking.make(guidance=1e38))
        assert asking.files == []
        *_, (file, _, _) = asking.make(steps=1)
        assert Path(file).exists()

    def test_of_a_route_leaves_no_stages(self, asking: Asking) -> None:
        run = asking.make(width=128, height=128, route="ladder")
        for event in run:
            if "stage 2 of 2" in status(event):
                break
        run.close()
        assert asking.files == []


class TestStop:
    def test_ends_the_run_after_a_step_and_leaves_nothing(self, asking: Asking) -> None:
        run = asking.make(steps=20, width=192, height=192)
        while "step 1 of 20" not in status(next(run)):
            pass
        said = asking.site.worker.stop("a")
        *_, (picture, last, details) = run
        assert (picture, last, details) == (None, said, None)
        assert said.startswith("Stopped after step ")
        assert asking.files == []

    def test_lets_the_next_one_begin_at_once(self, asking: Asking) -> None:
        run = asking.make(steps=20, width=192, height=192)
        next(run)
        run.close()  # as Gradio does where an event is cancelled
        assert not asking.site.worker.busy("a")
        *_, (_, said, _) = asking.make(steps=1)
        assert said.startswith("Done in ")

    def test_takes_a_job_out_of_the_queue(self, asking: Asking) -> None:
        idle = asking.site.worker.stop("a")
        assert asking.page.stopped(idle, make_page.WAITING) == "Stopped: it was taken out of the queue."
        assert asking.page.stopped(idle, "") == idle == "Nothing of yours is running."

    def test_just_after_the_end_leaves_what_is_said_of_it(self, asking: Asking) -> None:
        assert asking.page.stopped(asking.site.worker.stop("a"), "Done in 1 s.") == "Done in 1 s."

    def test_that_has_missed_the_end_says_where_the_picture_is(self, asking: Asking) -> None:
        list(asking.make(steps=1))
        said = asking.page.stopped(asking.site.worker.stop("a"), "92 %: step 12 of 12, decoding")
        assert said == "It had ended before it could be stopped. What it made, if anything, is in History."

    def test_of_a_run_that_fails_says_why_in_the_words_of_the_page(self, asking: Asking) -> None:
        said = asking.page.stopped("Not made: out of memory. Try --width 64.", "50 %: step 6 of 12")
        assert said == "Not made: out of memory. Try “Width” 64."

    def test_leaves_nothing_to_explain(self, asking: Asking) -> None:
        said, button = asking.page.explain(asking.request, None)
        assert said == ""
        assert not button["interactive"]

    def test_of_an_entry_of_somebody_else_explains_nothing(self, asking: Asking, request_of: Any) -> None:
        *_, (_, _, details) = asking.make(steps=1)
        assert asking.page.explain(request_of("b"), details)[0] == ""
