"""What the Inside page shows of runs of the bundled models."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from attnswap.accel import report_pictures
from attnswap.accel.report import Report
from attnswap.demo.pages import inside_text
from attnswap.demo.pages.inside import InsidePage, tab_of
from attnswap.demo.server.shelf import Shelf
from attnswap.demo.server.visitors import Visitor
from attnswap.demo.site import Site

from .entries import make

RUNS: dict[str, dict[str, Any]] = {
    "dense": {},
    "windows": {"width": 128, "height": 128, "steps": 4, "methods": {"hidiffusion": {"t1": 0.5}}},
    "native": {"methods": {"hidiffusion": {}}},
    "ladder": {"width": 128, "height": 128, "route": "ladder", "methods": {"hidiffusion": {}, "linfusion": {}}},
    "clip": {"model": "emoji-video", "steps": 4, "methods": {"adaspa": {}}},
    "auto": {"model": "emoji-video", "methods": {"auto": {}}},
}
ME = SimpleNamespace(session_hash="me")


@pytest.fixture(scope="module")
def visitor(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Visitor:
    """Who has made all of `RUNS`."""
    visitor = Visitor("me", tmp_path_factory.mktemp("visitor"))
    for fields in RUNS.values():
        make(shelf, visitor, **fields)
    return visitor


@pytest.fixture
def page(site: Site, visitor: Visitor) -> InsidePage:
    with gr.Blocks(analytics_enabled=False):
        page = InsidePage(site)
    site.visitors.of(ME).entries[:] = visitor.entries
    return page


def seen(page: InsidePage, run: str) -> dict[str, Any]:
    """What the page shows of one of `RUNS`, by the name of the component."""
    shown = page.look(ME, 1 + list(RUNS).index(run))
    names = {id(part): name for name, part in vars(page).items() if isinstance(part, gr.blocks.Block)}
    return {names[id(part)]: update for part, update in zip([*page.shown, page.entry], shown, strict=True)}


def is_shown(update: Any) -> bool:
    return bool(update["visible"])


class TestSummary:
    def test_says_what_ran_how_much_was_computed_and_by_what(self, page: InsidePage) -> None:
        said = seen(page, "windows")["summary"]
        assert said.startswith("**Done in")
        for part in (
            "hidiffusion",
            "Model: emoji-sd.**",
            "128×128, 4 steps, seed 0",
            "5 of 32 attention layers",
            "25 %",
            "Density 0.25",
            "eager",
        ):
            assert part in said, part
        assert "1 is dense attention; less is less work" in said

    def test_tells_of_searches_and_recall(self, page: InsidePage) -> None:
        said = seen(page, "clip")["summary"]
        assert "24 times a layer searched" in said
        assert "Recall, the share of the attention in the kept blocks" in said

    def test_says_why_a_method_rested(self, page: InsidePage) -> None:
        assert "rested and nothing was accelerated, because the size is about" in seen(page, "native")["summary"]

    def test_says_what_linear_attention_counts(self, page: InsidePage) -> None:
        assert "Linear attention forms no pairs" in seen(page, "ladder")["summary"]

    def test_of_dense_attention_says_what_to_try(self, page: InsidePage) -> None:
        said = seen(page, "dense")["summary"]
        assert "Nothing was accelerated" in said
        assert "method hidiffusion or linfusion, and larger: hidiffusion acts on pictures above 64×64 only" in said

    def test_of_dense_attention_that_auto_chose_says_why(self, page: InsidePage, visitor: Visitor) -> None:
        [why] = visitor.entries[5].result.record["remarks"]
        said = seen(page, "auto")["summary"].replace("\\", "")
        assert said.count("auto chose dense attention") == 1
        assert why.removeprefix("auto: ") in said

    def test_shows_fallbacks_with_their_reason_and_without_markup(self, page: InsidePage, site: Site) -> None:
        entry = site.visitors.of(ME).entries[1]
        [denoiser] = entry.result.report.denoisers  # type: ignore[union-attr]
        noted = Report(({**denoiser, "notes": [{"text": "mid_block ran dense: no <b>windows</b>", "count": 1}]},))
        result = dataclasses.replace(entry.result, report=noted, notices=("offloading was left out.",))
        said = inside_text.summary(result, None)
        assert "- Mid\\_block ran dense: no \\<b\\>windows\\</b\\>." in said
        assert "- Offloading was left out." in said


class TestPictures:
    def test_a_method_with_heads_has_density_and_recall_of_each(self, page: InsidePage, visitor: Visitor) -> None:
        picture = seen(page, "clip")["picture"]
        report = visitor.entries[4].result.report
        assert report is not None
        assert is_shown(picture)
        assert np.array_equal(np.asarray(picture["value"]), np.asarray(report_pictures.draw(report, beside=False)))

    @pytest.mark.parametrize("run", ["windows", "native", "ladder"])
    def test_other_methods_have_the_density_of_each_layer(self, page: InsidePage, run: str) -> None:
        assert is_shown(seen(page, run)["picture"])

    def test_where_nothing_was_searched_the_page_says_so(self, page: InsidePage, visitor: Visitor, site: Site) -> None:
        entry = visitor.entries[4]
        [denoiser] = entry.result.report.denoisers  # type: ignore[union-attr]
        layers = [{**layer, "branches": []} if "branches" in layer else layer for layer in denoiser["layers"]]
        unsearched = dataclasses.replace(entry.result, report=Report(({**denoiser, "layers": layers},)))
        site.visitors.of(ME).entries[:] = [dataclasses.replace(entry, result=unsearched)]
        said, picture, *_ = page.look(ME)
        assert "There is no density and no recall to draw: nothing was searched." in said
        assert not is_shown(picture)

    def test_dense_attention_has_none(self, page: InsidePage) -> None:
        found = seen(page, "dense")
        assert not any(is_shown(found[part]) for part in ("picture", "phases_group", "mask_group", "layers"))


class TestPhases:
    def test_a_sentence_says_up_to_which_step(self, page: InsidePage) -> None:
        found = seen(page, "windows")
        assert not found["phases_said"].startswith("- "), "a list of one"
        assert "up to step 2 of 4 the deep blocks" in found["phases_said"]
        assert "in windows in all 4 steps" in found["phases_said"]
        assert is_shown(found["phases_group"])
        assert is_shown(found["phases"])

    def test_a_run_at_rest_has_the_reason_and_no_picture(self, page: InsidePage) -> None:
        found = seen(page, "native")
        assert "HiDiffusion rested, because the size is about" in found["phases_said"]
        assert is_shown(found["phases_group"])
        assert not is_shown(found["phases"])

    def test_the_stages_of_a_route_are_told_apart(self, page: InsidePage) -> None:
        first, second = seen(page, "ladder")["phases_said"].splitlines()
        assert first.startswith("- ")
        assert "Run 1 of 2, latent 16x16: HiDiffusion rested" in first
        assert "Run 2 of 2, latent 32x32" in second
        assert "No layer attended in windows" in second, "they gave way to linear attention"

    def test_other_methods_have_none(self, page: InsidePage) -> None:
        assert not is_shown(seen(page, "clip")["phases_group"])


class TestMask:
    def test_is_that_of_the_report_with_its_share(self, page: InsidePage, visitor: Visitor) -> None:
        report = visitor.entries[4].result.report
        assert report is not None
        picture, said = page.draw_mask(ME, 5, 2, 1, "1")
        mask = np.asarray(report.mask_image(2, 1, branch=1))
        assert np.array_equal(np.asarray(picture)[44 : 44 + mask.shape[0], 40 : 40 + mask.shape[1], 0], mask)
        light = (mask[1:-1, 1:-1] > 200).mean()
        assert f"{100 * light:.0f} % of them" in said
        assert "**Dark** ones are left out" in said

    def test_offers_what_there_is(self, page: InsidePage) -> None:
        found = seen(page, "clip")
        assert [number for _, number in found["layer"]["choices"]] == list(range(6))
        assert [number for _, number in found["head"]["choices"]] == [0, 1, 2]
        assert found["part"]["choices"] == ["0", "1"]
        assert is_shown(found["mask_group"])

    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            ((5, 9), "no mask of layer '9': there is 0 to 5"),
            ((5, "../etc"), "no mask of layer"),
            ((5, 0, 3), "no mask of that head and branch: layer 0 has heads 0 to 2 in branch 0 and 1"),
            ((5, 0, 0, "2"), "no mask of that head and branch"),
            ((2,), "entry 2 has no block masks. No method has searched for any."),
            ((1,), "entry 1 has no block masks. No method has searched for any."),
            ((77,), "no entry '77' of yours: there is 1 to 6"),
            (([],), "no entry"),
            ((5, []), "no mask of layer"),
        ],
    )
    def test_what_there_is_not_is_said(self, page: InsidePage, asked: tuple[Any, ...], said: str) -> None:
        with pytest.raises(gr.Error) as caught:
            page.draw_mask(ME, *asked)
        assert said in caught.value.message

    def test_of_an_older_entry_is_said_not_to_be_kept(self, page: InsidePage, site: Site) -> None:
        gone = "Block masks are kept of the latest results only."
        assert gone not in seen(page, "clip")["summary"]
        entry = site.visitors.of(ME).entries[4]
        report = entry.result.report
        assert report is not None
        [details] = report.details
        assert details is not None
        bare = dataclasses.replace(report, details=(dataclasses.replace(details, masks={}),))
        older = dataclasses.replace(entry, result=dataclasses.replace(entry.result, report=bare))
        site.visitors.of(ME).entries[4] = older
        found = seen(page, "clip")
        assert gone in found["summary"]
        assert not is_shown(found["mask_group"])
        with pytest.raises(gr.Error) as caught:
            page.draw_mask(ME, 5)
        assert caught.value.message == f"entry 5 has no block masks. {gone}"


class TestLayers:
    def test_those_that_ran_dense_come_first_with_the_reason(self, page: InsidePage, visitor: Visitor) -> None:
        assert is_shown(seen(page, "windows")["layers"])
        rows = inside_text.table(visitor.entries[1].result.report)  # type: ignore[arg-type]
        assert [row[2] for row in rows] == ["dense"] * 27 + ["accelerated"] * 5
        assert rows[0] == [
            *("1", "down_blocks.0.attentions.0.transformer_blocks.0.attn2"),
            *("dense", "–", "–", "–", "attention to the prompt or the like, not within the picture"),
        ]
        assert rows[-1][3:] == ["4 accelerated", "0.25", "eager", "self-attention in 2x2 windows"]

    def test_one_that_rested_is_dense_and_says_so(self, visitor: Visitor) -> None:
        rows = inside_text.table(visitor.entries[2].result.report)  # type: ignore[arg-type]
        assert {row[2] for row in rows} == {"dense"}
        assert rows[0][3:] == ["2 dense", "1.00", "–", "self-attention in 2x2 windows, which rested; native size"]

    def test_are_numbered_as_in_the_picture(self, visitor: Visitor) -> None:
        report = visitor.entries[4].result.report
        assert report is not None
        numbered = {row[0]: row[1] for row in inside_text.table(report) if row[0] != "–"}
        assert numbered == {str(each.number): each.name for each in report_pictures.masks(report)}


class TestEntries:
    def test_are_listed_the_newest_first_and_the_newest_is_shown(self, page: InsidePage) -> None:
        *_, listed = page.look(ME)
        assert [number for _, number in listed["choices"]] == [6, 5, 4, 3, 2, 1]
        assert listed["value"] == 6

    def test_of_another_visitor_are_not_shown(self, page: InsidePage) -> None:
        said, *_, listed = page.look(SimpleNamespace(session_hash="other"), 1)
        assert "Nothing here yet" in said
        assert listed["choices"] == []

    def test_what_is_shown_stays_until_there_is_something_new(self, page: InsidePage, site: Site) -> None:
        _, newest, *_ = page.refresh(ME, None, 0)
        assert newest == 6
        assert all(update == gr.skip() for update in page.refresh(ME, 2, newest))
        gone = site.visitors.of(ME).entries
        del gone[1]
        listed, *_ = page.refresh(ME, 2, newest)
        assert listed["value"] == 6


def test_the_tab_of_a_component_is_found_through_what_it_is_in() -> None:
    with gr.Blocks(analytics_enabled=False), gr.Tabs(), gr.Tab("one") as tab, gr.Row():
        inside = gr.Markdown()
    outside = gr.Markdown(render=False)
    assert tab_of(inside) is tab
    assert tab_of(outside) is None
