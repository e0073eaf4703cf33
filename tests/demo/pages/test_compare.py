"""Dense attention and methods on the page: what is shown, what is said, what is refused, and what Stop leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attnswap.demo.cost.pace import Pace
from attnswap.demo.server.limits import Limits
from attnswap.demo.server.shelf import Shelf
from attnswap.demo.server.visitors import Visitor, Visitors
from attnswap.demo.server.worker import Worker
from attnswap.demo.site import Site
from attnswap.pipelines import save
from attnswap.pipelines.errors import JobFailed
from attnswap.pipelines.session import Result, Session
from attnswap.pipelines.task import Task

gr = pytest.importorskip("gradio")
from attnswap.demo.cost.estimate import prepare  # noqa: E402
from attnswap.demo.pages import compare as compare_page  # noqa: E402
from attnswap.demo.pages.compare import ComparePage  # noqa: E402

LIMITS = Limits(max_steps=20)
FAST = {"prompt": "a fox", "width": 72, "height": 72, "steps": 2, "method": "hidiffusion"}
OTHER = {"second_method": "hidiffusion", "second_hidiffusion_t1": "0.9"}
OTHERS_NAME = "hidiffusion t1=0.9"


class Visit:
    """Somebody who looks at the page; `said` is what its status said."""

    def __init__(self, page: ComparePage, request: Any) -> None:
        self.page, self.site, self.request = page, page.site, request
        self.said: list[str] = []

    def values(self, **given: Any) -> list[Any]:
        usual = {name: component.value for name, component in zip(self.page.names, self.page.inputs, strict=True)}
        assert given.keys() <= usual.keys()
        return list({**usual, **given}.values())

    def compare(self, **given: Any) -> Iterator[tuple[Any, ...]]:
        for outputs in self.page.compare(self.request, *self.values(**given)):
            assert len(outputs) == len(self.page.outputs)
            self.said.append(getattr(outputs[0], "value", outputs[0]))
            yield outputs

    def compared(self, **given: Any) -> dict[str, Any]:
        """The last outputs by their ids."""
        *_, last = self.compare(**given)
        return self.by_id(last)

    def by_id(self, outputs: tuple[Any, ...]) -> dict[str, Any]:
        return {component.elem_id: value for component, value in zip(self.page.outputs, outputs, strict=True)}

    @property
    def visitor(self) -> Visitor:
        return self.site.visitors.of(self.request)

    @property
    def files(self) -> Path:
        assert self.visitor.comparison is not None
        return self.visitor.comparison[1]

    def refused(self, **given: Any) -> str:
        """What is said, before anything has run."""
        with pytest.raises(gr.Error) as raised:
            self.compared(**given)
        assert not any("%" in text for text in self.said)
        return raised.value.message


@pytest.fixture(scope="module")
def page(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComparePage]:
    """One for all visitors, as it takes a while to build."""
    folder, worker = tmp_path_factory.mktemp("site"), Worker()
    with gr.Blocks():
        page = ComparePage(Site(shelf, worker, Visitors(folder, worker), LIMITS, Pace(), folder))
        page.wire()
    yield page
    worker.close()


@pytest.fixture
def visit(page: ComparePage, request: pytest.FixtureRequest, request_of: Any) -> Visit:
    return Visit(page, request_of(request.node.name))


@pytest.fixture
def new_here(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> Visit:
    """Somebody on a machine of which nobody knows yet how fast it is."""
    site = dataclasses.replace(visit.site, pace=Pace())
    for each in (visit, visit.page, visit.page.form):
        monkeypatch.setattr(each, "site", site)
    return visit


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`failing(t1=0.9)`: every run of hidiffusion with these settings does; without any, those of dense attention."""
    make = Session.make

    def install(**settings: Any) -> None:
        def made(self: Session, tasks: list[Task], **more: Any) -> tuple[Result, ...]:
            given = tasks[0].job.methods.get("hidiffusion", {}).items()
            if settings.items() <= given if settings else not given:
                raise JobFailed("out of memory at 72x72, see /somewhere/private/log.txt")
            return make(self, tasks, **more)

        monkeypatch.setattr(Session, "make", made)

    return install


def sides(slider: Any) -> tuple[str, str]:
    left, right = (Path(image["path"]).name for image in slider.value)
    return left, right


class TestPictures:
    def test_are_side_by_side_with_all_figures(self, visit: Visit) -> None:
        shown = visit.compared(**FAST, second_method="linfusion")
        assert sides(shown["compare-slider"]) == ("1-a-fox-seed-0-dense.png", "1-a-fox-seed-0-hidiffusion.png")
        assert shown["compare-caption"].startswith("Left: dense attention. Right: hidiffusion.")
        assert not shown["compare-clip"].visible
        assert [each["name"] for each in shown["compare-json"]["variants"]] == ["dense", "hidiffusion", "linfusion"]
        assert not shown["compare-json"]["interrupted"]
        assert shown["compare-result"].visible
        table = shown["compare-table"].value
        assert table["headers"] == ["", "dense", "hidiffusion", "linfusion"]
        assert [row[0] for row in table["data"]] == ["time", "speed-up", "peak memory", "density", "PSNR", "SSIM"]
        assert "after a warm-up of 2 steps each" in shown["compare-remarks"]

        assert [name for name, _ in shown["compare-opposite"].choices] == ["hidiffusion", "linfusion"]
        slider, caption, _ = visit.page.opposite(visit.request, "linfusion")
        assert sides(slider) == ("1-a-fox-seed-0-dense.png", "1-a-fox-seed-0-linfusion.png")
        assert slider.slider_position == 50
        assert [visit.page.whole(each).slider_position for _, each in visit.page.compared.whole.choices] == [50, 100, 0]
        assert "Right: linfusion" in caption

        assert Path(shown["compare-download"]).read_text().count("data:image/png") == 3
        assert save.read_record(visit.files / "1-a-fox-seed-0-dense.png")["prompt"] == "a fox"
        assert Path(shown["compare-sheet"]).name == "sheet.png"

        runs = [text.partition(": ")[2].partition(":")[0] for text in visit.said if " of 3: " in text]
        assert list(dict.fromkeys(runs)) == ["dense, 1 of 3", "hidiffusion, 2 of 3", "linfusion, 3 of 3"]
        assert any("warm-up of linfusion" in text for text in visit.said)
        shares = [int(text.partition(" %")[0]) for text in visit.said if " %" in text[:5]]
        assert shares == sorted(shares)

    def test_of_a_comparison_before_are_gone_and_the_model_is_still_there(self, visit: Visit) -> None:
        visit.compared(**FAST)
        before, offer = visit.files, visit.site.shelf.offer("emoji-sd")
        session = visit.site.shelf.session(offer)
        visit.compared(**FAST)
        assert not before.exists()
        assert len(list(visit.visitor.folder.glob("comparison-*"))) == 1
        assert visit.site.shelf.session(offer) is session


def test_clips_are_stitched_and_compared_by_their_middle_frames(visit: Visit) -> None:
    pytest.importorskip("av")
    size = {"frames": 5, "width": 64, "height": 64, "steps": 2}
    shown = visit.compared(
        prompt="a fox moving left", model="emoji-video", method="adaspa", adaspa_min_tokens="0", **size
    )
    assert Path(shown["compare-clip"].value["path"]).name == "stitched.mp4"
    names = [f"1-a-fox-moving-left-seed-0-{variant}-middle.png" for variant in ("dense", "adaspa-min-tokens-0")]
    assert list(sides(shown["compare-slider"])) == names
    assert "middle frame" in shown["compare-caption"]
    assert not shown["compare-opposite"].visible
    assert not list(visit.site.folder.rglob("frame-*.png"))


class TestFailures:
    def test_of_a_method_are_in_its_place_and_the_others_go_on(
        self, visit: Visit, failing: Callable[..., None]
    ) -> None:
        failing(t1=0.9)
        shown = visit.compared(**FAST, **OTHER)
        assert f"{OTHERS_NAME} failed: out of memory at 72x72, see log.txt" in shown["compare-problems"].value
        rows = {row[0]: row[1:] for row in shown["compare-table"].value["data"]}
        assert rows["time"][2] == "failed"
        assert rows["time"][1].endswith(" s")
        assert sides(shown["compare-slider"])[1].endswith("hidiffusion.png")
        assert OTHERS_NAME not in visit.said[-1]
        slider, caption, _ = visit.page.opposite(visit.request, OTHERS_NAME)
        assert caption == f"The picture of dense attention alone: there is none of {OTHERS_NAME}."
        assert len(set(sides(slider))) == 1

    def test_of_dense_attention_leave_the_method(self, visit: Visit, failing: Callable[..., None]) -> None:
        failing()
        shown = visit.compared(**FAST)
        assert "Dense attention failed: out of memory" in shown["compare-problems"].value
        assert visit.said[-1].startswith("hidiffusion took ")
        assert "alone: there is none of dense attention" in shown["compare-caption"]


class TestStop:
    def test_in_the_second_run_keeps_the_first(self, visit: Visit) -> None:
        events = visit.compare(**FAST | {"steps": 20})
        assert any("hidiffusion, 2 of 2: step" in visit.said[-1] for _ in events)
        shown = visit.by_id(visit.page.rest(visit.request, visit.said[-1]))
        assert "Stopped" in shown["compare-problems"].value
        assert "hidiffusion was not run to its end" in shown["compare-problems"].value
        assert shown["compare-json"]["interrupted"]
        assert set(sides(shown["compare-slider"])) == {"1-a-fox-seed-0-dense.png"}
        assert shown["compare-download"]
        *_, last = events  # clients without a page see the same
        assert visit.by_id(last)["compare-json"] == shown["compare-json"]

    def test_that_has_missed_the_end_shows_all_of_it(self, visit: Visit) -> None:
        made = visit.compared(**FAST)
        late = visit.by_id(visit.page.rest(visit.request, "96 %: hidiffusion, 2 of 2: step 2 of 2, decoding"))
        assert late["compare-json"] == made["compare-json"]
        assert not late["compare-json"]["interrupted"]
        assert set(sides(late["compare-slider"])) == set(sides(made["compare-slider"]))

    def test_on_another_page_shows_what_was_finished_there(self, visit: Visit) -> None:
        events = visit.compare(**FAST | {"steps": 20})
        assert any("hidiffusion, 2 of 2: step" in visit.said[-1] for _ in events)
        said = visit.site.worker.stop(visit.visitor.name)
        shown = visit.by_id(visit.page.leave(visit.request, visit.said[-1], said))
        assert shown["compare-status"].value.startswith("Stopped after step")
        assert shown["compare-json"]["interrupted"]
        list(events)

    def test_on_another_page_changes_nothing_where_nothing_ran(self, visit: Visit) -> None:
        visit.compared(**FAST)
        left = visit.page.leave(visit.request, visit.said[-1], "Stopped after step 2 of 12.")
        assert all(each == gr.skip() for each in left)

    def test_in_a_warm_up_leaves_nothing(self, visit: Visit) -> None:
        events = visit.compare(**FAST)
        assert any("warm-up of dense" in visit.said[-1] for _ in events)
        said = visit.page.rest(visit.request, visit.said[-1])[0]
        assert said == "Stopped before the first step."
        list(events)
        assert "Nothing was finished" in visit.said[-1]
        assert visit.visitor.comparison is None
        assert list(visit.visitor.folder.iterdir()) == []

    def test_by_closing_the_page_ends_it_and_another_can_be_made(self, visit: Visit) -> None:
        events = visit.compare(**FAST)
        assert any("1 of 2: step" in visit.said[-1] for _ in events)
        events.close()
        assert not visit.site.worker.busy(visit.visitor.name)
        assert not visit.compared(**FAST)["compare-json"]["interrupted"]

    def test_after_the_end_leaves_what_is_said_of_it(self, visit: Visit) -> None:
        visit.compared(**FAST)
        assert visit.page.rest(visit.request, visit.said[-1])[0] == visit.said[-1]

    def test_of_nothing_says_so(self, visit: Visit) -> None:
        said, *others = visit.page.rest(visit.request, "")
        assert said == "Nothing of yours is running."
        assert all(other == gr.skip() for other in others)


class TestRefused:
    def test_is_the_same_twice(self, visit: Visit) -> None:
        said = visit.refused(**FAST, second_method="hidiffusion")
        assert said.startswith("hidiffusion is there twice: ")

    def test_is_what_does_not_apply(self, visit: Visit) -> None:
        assert "'adaspa' is not offered" in visit.refused(**FAST | {"method": "adaspa"})

    def test_is_dense_attention_against_itself(self, visit: Visit) -> None:
        assert "'dense' is not offered" in visit.refused(**FAST | {"method": "dense"})

    def test_is_what_the_model_cannot_do_before_it_is_loaded(
        self, visit: Visit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Shelf, "session", lambda *_: pytest.fail("the model is loaded"))
        assert "width 65 is not a multiple of 8" in visit.refused(**FAST | {"width": 65})

    def test_is_what_is_beyond_the_limits(self, visit: Visit) -> None:
        assert "steps 21 is more than this server allows" in visit.refused(**FAST | {"steps": 21})


class TestForms:
    def test_offer_methods_alone_and_no_second_one_at_first(self, visit: Visit) -> None:
        first, second = ([value for _, value in form.choice.choices] for form in (visit.page.first, visit.page.second))
        assert "dense" not in (*first, *second)
        assert second[0] == visit.page.second.choice.value == "none"

    def test_begin_with_what_the_models_preset_is_made_for(self, visit: Visit) -> None:
        first = [visit.page.first.choices(visit.site.shelf.offer(model))[0] for model in ("emoji-sd", "emoji-flux")]
        assert first == ["hidiffusion", "clear"]

    def test_begin_at_a_size_at_which_methods_have_something_to_do(self, visit: Visit) -> None:
        assert (visit.page.form.controls["width"].value, visit.page.form.size.value) == (128, "128x128")

    @pytest.mark.parametrize(("second", "said"), [("none", "two runs"), (None, "two runs"), ("auto", "three runs")])
    def test_tell_how_many_runs_there_will_be(self, second: str | None, said: str) -> None:
        assert said in compare_page.runs(second)

    def test_tell_how_long_all_runs_take_once_that_is_known(self, new_here: Visit) -> None:
        small: dict[str, Any] = {"width": 128, "height": 128, "steps": 2, "method": "hidiffusion"}
        visit = new_here
        assert visit.page.price(visit.request, *visit.values(**small)) == compare_page.runs("none")
        offer = visit.site.shelf.offer("emoji-sd")
        for _ in visit.site.worker.run("a", lambda live: prepare(visit.site, offer, live)):
            pass
        assert "for all runs" in visit.page.price(visit.request, *visit.values(**small))

    def test_tell_how_long_all_runs_take_once_they_were_made(self, new_here: Visit) -> None:
        visit = new_here
        assert visit.page.price(visit.request, *visit.values(**FAST)) == compare_page.runs("none")
        visit.compared(**FAST)
        assert "for all runs" in visit.page.price(visit.request, *visit.values(**FAST))

    def test_tell_nothing_of_what_cannot_be_compared(self, visit: Visit) -> None:
        assert visit.page.price(visit.request, *visit.values(width=65)) == compare_page.runs("none")

    def test_follow_the_model(self, visit: Visit) -> None:
        values = [component.value for component in (*visit.page.first.inputs, *visit.page.second.inputs)]
        updates = visit.page.for_model("emoji-video", None, None, *values)
        assert updates[0]["value"] == "adaspa"
        assert "hidiffusion" not in dict(updates[0]["choices"]).values()
        assert "hidiffusion" in updates[-1]["value"]  # is said not to be for this model

    def test_keep_what_is_chosen_while_the_size_changes(self, visit: Visit) -> None:
        updates = visit.page.for_size("emoji-sd", 256, 256)
        assert len(updates) == len([*visit.page.first.inputs, *visit.page.second.inputs])
        assert not any("value" in update for update in updates)
