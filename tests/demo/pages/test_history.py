"""Thumbnails of what a visitor has made, and the way back to its settings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from attnswap.demo.forms.job_form import JobForm
from attnswap.demo.pages import history as history_page
from attnswap.demo.pages.history import HistoryPage
from attnswap.demo.server.shelf import Shelf
from attnswap.demo.server.visitors import Visitor
from attnswap.demo.site import Site

from .entries import FOX, make, value

ME = SimpleNamespace(session_hash="me")


@pytest.fixture(scope="module")
def visitor(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Visitor:
    """Who has made a picture and a clip."""
    visitor = Visitor("me", tmp_path_factory.mktemp("visitor"))
    make(shelf, visitor, seed=7, width=128, height=128, methods={"hidiffusion": {"t1": 0.25}})
    make(shelf, visitor, "emoji-video", steps=1, frames=9)
    return visitor


@pytest.fixture
def page(site: Site, visitor: Visitor, monkeypatch: pytest.MonkeyPatch) -> HistoryPage:
    with gr.Blocks(analytics_enabled=False), gr.Tabs() as tabs:
        with gr.Tab("Image", id="image"):
            image = JobForm(site, clips=False, elem="image")
        with gr.Tab("Video", id="video"):
            video = JobForm(site, clips=True, elem="video")
        with gr.Tab("History", id="history"):
            page = HistoryPage(site)
        page.wire(image, video, tabs)
    site.visitors.of(ME).entries[:] = visitor.entries
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(visitor.folder))
    return page


@pytest.fixture
def toasts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is said above the page, with its kind."""
    said: list[tuple[str, str]] = []
    for kind in ("Info", "Warning"):
        monkeypatch.setattr(gr, kind, lambda text, duration, kind=kind: said.append((kind, text)))
    return said


def filled(page: HistoryPage, updates: list[Any]) -> dict[str, Any]:
    """What the two forms are updated with, by "image prompt" and so on; without what stays."""
    names = [f"{kind} {name}" for kind, form in zip(("image", "video"), page.forms, strict=True) for name in form.names]
    given = zip(names, updates[3:-1], strict=True)
    return {name: value(update) for name, update in given if update != gr.skip()}


class TestThumbnails:
    def test_are_those_of_the_visitor_the_newest_first(self, page: HistoryPage, visitor: Visitor) -> None:
        gallery, hint, numbers = page.entries(ME)
        assert [thumbnail for thumbnail, _ in gallery["value"]] == [str(e.thumbnail) for e in visitor.entries[::-1]]
        assert gallery["visible"]
        assert numbers == [2, 1]
        assert "Click one to have its settings back on the Image or Video page." in hint

    def test_are_captioned_with_method_size_and_seconds(self, visitor: Visitor) -> None:
        picture, clip = (history_page.caption(entry) for entry in visitor.entries)
        seconds = f"{visitor.entries[0].result.seconds:.2f} s"
        assert picture == f"1: hidiffusion, 128×128, {seconds}: {FOX}"
        assert clip.startswith("2: dense, 96×96, 9 frames, ")

    def test_are_sent_again_only_when_there_is_another(self, page: HistoryPage) -> None:
        assert page.entries(ME, [2, 1]) == [gr.skip()] * 3
        assert page.entries(ME, [1])[2] == [2, 1]

    def test_of_nobody_else(self, page: HistoryPage) -> None:
        gallery, hint, numbers = page.entries(SimpleNamespace(session_hash="other"))
        assert (gallery["value"], gallery["visible"], numbers) == ([], False, [])
        assert hint == history_page.NOTHING
        assert "Image, Video and Compare" in hint


class TestAClick:
    def test_is_on_the_number_that_was_shown(self, page: HistoryPage) -> None:
        number, gallery = page.pick(ME, [9, 4, 2], SimpleNamespace(index=1))
        assert number == 4
        assert gallery["selected_index"] is None, "it can be clicked again"

    def test_restores_a_picture_into_the_image_form_and_shows_it(
        self, page: HistoryPage, visitor: Visitor, toasts: list[tuple[str, str]]
    ) -> None:
        record, said, tabs, *rest = page.restore_entry(ME, 1)
        assert record == visitor.entries[0].result.record
        assert tabs["selected"] == "image"
        assert said == "All settings of number 1 are on the Image page."
        assert toasts == [("Info", said)]
        found = filled(page, [record, said, tabs, *rest])
        assert not any(name.startswith("video") for name in found)
        assert (found["image prompt"], found["image seed"], found["image steps"]) == (FOX, 7, 2)
        assert (found["image method"], found["image hidiffusion_t1"]) == ("hidiffusion", "0.25")
        assert (found["image width"], found["image height"]) == (128, 128)

    def test_restores_a_clip_into_the_video_form(self, page: HistoryPage, toasts: list[tuple[str, str]]) -> None:
        outputs = page.restore_entry(ME, 2)
        assert outputs[2]["selected"] == "video"
        found = filled(page, outputs)
        assert not any(name.startswith("image") for name in found)
        assert (found["video frames"], found["video method"], found["video model"]) == (9, "dense", "emoji-video")

    @pytest.mark.parametrize("number", [3, None, -1])
    def test_on_what_is_not_there_any_more_is_said(self, page: HistoryPage, number: Any) -> None:
        with pytest.raises(gr.Error, match="no entry"):
            page.restore_entry(ME, number)

    def test_of_another_visitor_restores_nothing(self, page: HistoryPage) -> None:
        with pytest.raises(gr.Error, match="no entry 1 of yours"):
            page.restore_entry(SimpleNamespace(session_hash="other"), 1)


class TestAFile:
    def test_restores_what_it_remembers_settings_first(
        self, page: HistoryPage, visitor: Visitor, toasts: list[tuple[str, str]]
    ) -> None:
        file = visitor.entries[1].file
        [outputs] = page.restore(ME, str(file))
        assert outputs[0]["frames"] == 9
        assert outputs[2]["selected"] == "video"
        assert outputs[-1] is None, "there is room for the next"
        assert toasts == [("Info", f"All settings of {file.name} are on the Video page.")]

    def test_that_does_not_come_back_whole_warns(
        self, page: HistoryPage, visitor: Visitor, monkeypatch: pytest.MonkeyPatch, toasts: list[tuple[str, str]]
    ) -> None:
        record = {**visitor.entries[0].result.record, "model": "somebody/else"}
        monkeypatch.setattr("attnswap.demo.server.uploads.made_here", lambda path: record)
        [[_, said, *_]] = page.restore(ME, "else.png")
        [(kind, text)] = toasts
        assert (kind, text) == ("Warning", said.replace("\n\n- ", "<br>").replace("\n- ", "<br>"))
        assert "not offered here" in said

    def test_of_another_program_is_refused_in_a_line(self, page: HistoryPage, visitor: Visitor, tmp_path: Path) -> None:
        shown: list[Any] = []
        with pytest.raises(gr.Error) as caught:
            shown.extend(page.restore(ME, str(visitor.entries[0].thumbnail)))
        assert caught.value.message.startswith("Nothing to restore: ")
        [(record, said, *forms, file)] = shown
        assert (record, file) == (None, None), "there is room for the next"
        assert said.startswith("Nothing to restore: ")
        assert all(update == gr.skip() for update in forms)
        assert not caught.value.print_exception

    def test_that_is_none_is_refused(self, page: HistoryPage) -> None:
        with pytest.raises(gr.Error, match="no file"):
            next(page.restore(ME, None))
