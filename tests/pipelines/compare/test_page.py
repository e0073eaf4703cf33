"""The page opens from a disk without network, whatever a prompt has in it, and holds every figure."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from attnswap.pipelines.compare import page
from attnswap.pipelines.compare.figures import Comparison, Outcome

from .cases import comparison, noise

EVIL = "</h2></script><script>alert(1)</script>\"'><img src=x onerror=alert(1)> $title ${x} & 狐 <!--"


class Page(HTMLParser):
    """Elements with their attributes, and the text of each kind."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("img", "input", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def render(found: Comparison, folder: Path) -> Page:
    for outcome in found.outcomes.values():
        if outcome.file and outcome.file.endswith(".png"):
            noise(found.size, sum(map(ord, outcome.file))).save(folder / outcome.file)
        elif outcome.file:
            (folder / outcome.file).write_bytes(outcome.file.encode())
    return Page(page.render(found, folder))


def test_is_well_formed(tmp_path: Path) -> None:
    found = render(comparison(("a fox", "an owl"), ("adaspa", "clear")), tmp_path)
    assert found.open == []


class TestSelfContained:
    def test_holds_the_files_themselves_each_once(self, tmp_path: Path) -> None:
        data = comparison(("a fox", "an owl"), ("adaspa", "clear"))
        found = render(data, tmp_path)
        held = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in found.all("img")]
        assert held == [(tmp_path / outcome.file).read_bytes() for outcome in data.outcomes.values() if outcome.file]

    def test_asks_nobody_for_anything(self, tmp_path: Path) -> None:
        found = render(comparison(("a fox",), ("adaspa",), frames=5, fps="24000/1001"), tmp_path)
        sources = [
            attributes[name] for _, attributes in found.elements for name in ("src", "srcset") if name in attributes
        ]
        assert sources
        assert all(source.startswith("data:") for source in sources)
        assert not found.all("link")
        assert not found.all("iframe")
        assert "url(" not in found.text["style"]
        assert "@import" not in found.text["style"]
        assert not re.search(r"https?:|fetch|XMLHttpRequest|import\(", found.text["script"])
        (policy,) = [meta for meta in found.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
        assert policy["content"].startswith("default-src 'none'")
        assert "http" not in policy["content"]

    def test_too_much_is_named_instead_and_that_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(page, "MOST_EMBEDDED", 3000)
        data = comparison()
        data.outcomes[1, "adaspa"] = Outcome(file="1 #é%.png", seconds=1.0)
        found = render(data, tmp_path)
        assert all((tmp_path / unquote(image["src"])).is_file() for image in found.all("img"))
        assert "keep the folder together" in found.text["p"]
        assert not set("#é ") & set(found.all("img")[1]["src"])

    def test_what_is_embedded_is_not_said_to_be_elsewhere(self, tmp_path: Path) -> None:
        assert "keep the folder together" not in render(comparison(), tmp_path).text["p"]


class TestUntrusted:
    def test_a_prompt_is_text_and_nothing_else(self, tmp_path: Path) -> None:
        plain = render(comparison(("a fox",)), tmp_path)
        found = render(
            comparison(
                (EVIL,), about={"model": EVIL, "x": EVIL}, command=EVIL, notes=[EVIL], record={"versions": {EVIL: EVIL}}
            ),
            tmp_path,
        )
        assert EVIL in found.text["h2"]
        assert EVIL in found.text["h1"]
        assert EVIL in found.text["pre"]
        assert len(found.all("script")) == 1
        assert len(found.all("img")) == len(plain.all("img"))
        assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)

    def test_so_are_names_errors_and_notes(self, tmp_path: Path) -> None:
        data = comparison(("a fox", "an owl"), (EVIL, "clear"))
        data.outcomes[1, "clear"] = Outcome(error=EVIL)
        data.outcomes[2, "clear"] = Outcome(file="x.png", seconds=1.0, notes=(EVIL,))
        found = render(data, tmp_path)
        assert found.text["td"].count(EVIL) == 2  # in the summary and in its own row
        assert EVIL in found.text["p"]
        assert EVIL in found.text["option"]
        assert len(found.all("script")) == 1
        assert {image["alt"] for image in found.all("img")} == {"dense", EVIL, "clear"}


class TestSlider:
    def test_is_between_dense_attention_and_the_first_variant(self, tmp_path: Path) -> None:
        found = render(comparison(names=("adaspa", "clear")), tmp_path)
        assert [(image["alt"], image["data-side"]) for image in found.all("img")] == [
            ("dense", "left"), ("adaspa", "right"), ("clear", ""),
        ]  # fmt: skip
        assert [option["value"] for option in found.all("option") if "selected" in option] == ["0", "1"]

    def test_has_a_name_for_those_who_do_not_see_it(self, tmp_path: Path) -> None:
        found = render(comparison(frames=5, fps="8"), tmp_path)
        assert [slider["aria-label"] for slider in found.all("input")] == [
            "Where the left picture ends, prompt 1", "Frame",
        ]  # fmt: skip

    def test_leaves_out_what_failed(self, tmp_path: Path) -> None:
        data = comparison(names=("adaspa", "clear"))
        data.outcomes[1, "dense"] = Outcome(error="out of memory")
        found = render(data, tmp_path)
        assert [(image["alt"], image["data-side"]) for image in found.all("img")] == [
            ("adaspa", "left"), ("clear", "right"),
        ]  # fmt: skip

    def test_of_one_picture_shows_it_whole(self, tmp_path: Path) -> None:
        data = comparison()
        data.outcomes[1, "adaspa"] = Outcome(error="out of memory")
        assert [image["data-side"] for image in render(data, tmp_path).all("img")] == ["both"]

    def test_of_none_is_not_there(self, tmp_path: Path) -> None:
        data = comparison()
        data.outcomes.clear()
        found = render(data, tmp_path)
        assert not found.all("input")

    def test_shows_clips_as_videos_with_their_rate(self, tmp_path: Path) -> None:
        found = render(comparison(frames=5, fps="24000/1001"), tmp_path)
        assert [video["src"][:15] for video in found.all("video")] == ["data:video/mp4;"] * 2
        (player,) = [div for div in found.all("div") if div.get("class") == "player"]
        assert float(player["data-fps"]) == pytest.approx(23.976, abs=1e-3)
        assert player["data-frames"] == "5"


def test_the_table_has_the_figures_of_all_and_of_each(tmp_path: Path) -> None:
    found = render(comparison(("a fox", "an owl")), tmp_path)
    assert len(found.all("table")) == 3
    assert found.text["td"].count("30.0 dB") == 3
    assert found.text["td"].count("2.00x") == 3
    assert len(render(comparison(), tmp_path).all("table")) == 1
