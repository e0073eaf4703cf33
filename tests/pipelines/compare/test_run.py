"""A comparison from prompts to files, with tiny random models: what is made, what may fail, what is left behind."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnswap.accel.errors import UnsupportedModel
from attnswap.pipelines import save, session
from attnswap.pipelines.compare import metrics, page, sheet, text
from attnswap.pipelines.compare.figures import Comparison
from attnswap.pipelines.compare.run import compare
from attnswap.pipelines.compare.variants import Variant, parse
from attnswap.pipelines.errors import BadInput, JobFailed
from attnswap.pipelines.generate import generate
from attnswap.pipelines.job import Job
from attnswap.pipelines.routes import Stage
from attnswap.pipelines.session import Result, Session
from attnswap.pipelines.task import Task
from PIL import Image

HIDIFFUSION = parse([(["hidiffusion"], [])])
Compare = Callable[..., Comparison]
Hook = Callable[[Job], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def run(tiny_sd: Path, folder: Path) -> Compare:
    """Two prompts, two steps, 128 px; `run(variants, prompts=…, steps=…)`."""

    def compared(variants: tuple[Variant, ...] = HIDIFFUSION, **more: Any) -> Comparison:
        given = {"prompts": ("a fox", "an owl"), "seeds": (0,), "folder": folder}
        own = {name: more.pop(name) for name in given if name in more}
        say = more.pop("say", lambda text: None)
        job = Job("", **{"model": str(tiny_sd), "steps": 2, "width": 128, "height": 128, **more})
        return compare(job, variants, **given | own, say=say)

    return compared


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> Callable[[Hook], list[Job]]:
    """Has a hook called before each run of the pipeline; returns the jobs that ran."""
    make, jobs = Session.make, []

    def install(hook: Hook = lambda job: None) -> list[Job]:
        def made(self: Session, tasks: list[Task], **more: Any) -> tuple[Result, ...]:
            jobs.append(tasks[0].job)
            hook(tasks[0].job)
            return make(self, tasks, **more)

        monkeypatch.setattr(Session, "make", made)
        return jobs

    return install


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


RESULTS = {"compare.json", "compare.html", "sheet.png"}


class TestPictures:
    def test_are_made_of_every_prompt_and_seed_by_every_variant(self, run: Compare, folder: Path) -> None:
        run(parse([(["hidiffusion"], []), (["hidiffusion"], ["t1=0.9"])]), seeds=(0, 7))
        assert names(folder) == RESULTS | {
            f"{number}-{prompt}-seed-{seed}-{variant}.png"
            for number, prompt, seed in ((1, "a-fox", 0), (2, "a-fox", 7), (3, "an-owl", 0), (4, "an-owl", 7))
            for variant in ("dense", "hidiffusion", "hidiffusion-t1-0.9")
        }

    def test_are_those_that_generate_makes(self, run: Compare, folder: Path, tmp_path: Path, tiny_sd: Path) -> None:
        run(prompts=("a fox",), seeds=(7,))
        for name, methods in (("dense", {}), ("hidiffusion", {"hidiffusion": {}})):
            job = Job(
                "a fox", tmp_path / "a.png", str(tiny_sd), methods=methods, steps=2, width=128, height=128, seed=7
            )
            expected = generate(job)
            path = folder / f"1-a-fox-seed-7-{name}.png"
            assert np.array_equal(np.asarray(Image.open(path)), np.asarray(expected.image))
            assert save.read_record(path)["methods"] == expected.record["methods"]

    def test_come_of_one_load_of_the_model(self, run: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
        loads = []
        load = session.load.load
        monkeypatch.setattr(session.load, "load", lambda *args, **more: loads.append(args) or load(*args, **more))
        run()
        assert len(loads) == 1

    def test_any_prompt_has_a_file(self, run: Compare, folder: Path) -> None:
        run(prompts=("../狐\n" + "x" * 10_000, "狐"), steps=1)
        assert {"2-seed-0-dense.png", "2-seed-0-hidiffusion.png"} < names(folder)
        assert len(names(folder)) == 7


class TestFigures:
    def test_are_of_the_files(self, run: Compare, folder: Path) -> None:
        found = run(prompts=("a fox",))
        dense, other = (found.outcome(found.shots[0], variant) for variant in found.variants)
        pictures = [np.asarray(metrics.read_picture(folder / outcome.file)) for outcome in (other, dense)]
        assert other.likeness == metrics.of_pictures(*pictures)
        assert dense.likeness is None
        assert other.density is not None
        assert 0 < other.density < 1
        assert min(dense.seconds, other.seconds) > 0

    def test_are_written_whole(self, run: Compare, folder: Path) -> None:
        found = run()
        document = json.loads((folder / "compare.json").read_text())
        assert document == json.loads(json.dumps(found.to_dict()))
        assert document["variants"][1]["settings"]["hidiffusion"]["windows"] == [2, 2]
        assert document["made_with"]["versions"]["torch"] == importlib.metadata.version("torch")
        assert (document["made_with"]["width"], document["made_with"]["steps"]) == (128, 2)


class TestMethods:
    def test_without_a_choice_are_all_that_apply_and_the_others_are_named(self, run: Compare) -> None:
        found = run((), prompts=("a fox",))
        assert [variant.name for variant in found.variants] == ["dense", "hidiffusion"]
        (said,) = found.notes
        assert "all that apply are compared" in said
        assert "adaspa does not work on it" in said
        assert "linfusion: " in said  # has no weights for it

    def test_of_which_one_cannot_be_had_leave_the_others(self, run: Compare) -> None:
        found = run(parse([(["linfusion"], []), (["hidiffusion"], [])]))
        failed, made = (found.summary(variant) for variant in found.variants[1:])
        assert (failed.made, failed.failed, made.made) == (0, 2, 2)
        assert "weights" in failed.error

    def test_chosen_by_auto_are_named_and_explained(self, run: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "attnswap.pipelines.auto_method.choose",
            lambda *_, **__: ({"hidiffusion": {"t1": 0.7}}, "256 tokens are many"),
        )
        found = run(parse([(["auto"], [])]), prompts=("a fox",))
        auto = found.variants[1]
        assert auto.name == "auto: hidiffusion"
        assert found.settings[auto.name]["hidiffusion"]["t1"] == 0.7
        assert "256 tokens are many." in found.notes_of(auto)

    def test_that_are_the_same_under_two_names_are_refused(self, run: Compare, folder: Path) -> None:
        by_default = parse([(["hidiffusion"], []), (["hidiffusion"], ["windows=2,2"])])
        with pytest.raises(BadInput, match="'hidiffusion' and 'hidiffusion windows=2,2' have the same settings"):
            run(by_default)
        assert not folder.exists()

    def test_that_auto_chose_may_be_among_the_others(self, run: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("attnswap.pipelines.auto_method.choose", lambda *_, **__: ({"hidiffusion": {}}, "so"))
        found = run(parse([(["hidiffusion"], []), (["auto"], [])]), prompts=("a fox",), steps=1)
        assert [variant.name for variant in found.variants] == ["dense", "hidiffusion", "auto: hidiffusion"]

    @pytest.mark.parametrize(
        ("choice", "error", "words"),
        [
            (["clear", "down_factor=3"], BadInput, "not a multiple of 12"),
            (["hidiffusion"], UnsupportedModel, "hidiffusion does not work"),
        ],
    )
    def test_of_which_none_can_be_had_are_refused_before_a_step(
        self,
        choice: list[str],
        error: type[Exception],
        words: str,
        run: Compare,
        folder: Path,
        tiny_flux: Path,
        before: Callable[..., list[Job]],
    ) -> None:
        jobs = before()
        with pytest.raises(error, match=words):
            run(parse([(choice[:1], choice[1:])]), model=str(tiny_flux), width=32, height=32)
        assert jobs == []
        assert not folder.exists()


def test_what_is_cut_off_a_prompt_is_said_once(run: Compare, capfd: pytest.CaptureFixture[str]) -> None:
    found = run(prompts=("a fox " * 100,), steps=1)
    said = text.report(found)
    assert said.count("truncated because CLIP") == 1
    assert max(map(len, found.notes)) <= 300
    assert "truncated" not in capfd.readouterr().err


class TestFailures:
    def fail_for(self, *methods: str, error: Exception) -> Hook:
        def hook(job: Job) -> None:
            if tuple(job.methods) == methods:
                raise error

        return hook

    def test_of_a_variant_are_recorded_and_the_rest_goes_on(
        self, run: Compare, before: Callable[..., list[Job]], folder: Path
    ) -> None:
        before(self.fail_for("hidiffusion", error=JobFailed("out of memory at 128x128")))
        found = run()
        assert found.summary(found.variants[0]).made == 2
        assert found.summary(found.variants[1]).error == "out of memory at 128x128"
        assert "out of memory at 128x128" in (folder / "compare.html").read_text()

    def test_of_dense_attention_leave_nothing_to_compare_with(
        self, run: Compare, before: Callable[..., list[Job]], folder: Path
    ) -> None:
        before(self.fail_for(error=JobFailed("out of memory at 128x128")))
        found = run()
        summary = found.summary(found.variants[1])
        assert (summary.made, summary.psnr, summary.speedup) == (2, None, None)
        assert names(folder) > RESULTS

    def test_that_are_defects_are_told_with_their_place(self, run: Compare, before: Callable[..., list[Job]]) -> None:
        before(self.fail_for("hidiffusion", error=ZeroDivisionError("a defect")))
        said: list[str] = []
        found = run(say=said.append)
        assert found.summary(found.variants[1]).error == "ZeroDivisionError: a defect"
        assert all("Traceback" in text for text in said)
        assert len(said) == 2

    def test_of_the_disk_at_the_end_are_one_line(self, run: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device", "compare.json")

        monkeypatch.setattr(save, "write_json", full)
        with pytest.raises(JobFailed, match=r"compare\.json could not be written: No space left on device"):
            run(prompts=("a fox",))


class TestInterrupt:
    def test_keeps_what_is_done(self, run: Compare, before: Callable[..., list[Job]], folder: Path) -> None:
        def hook(job: Job) -> None:
            if job.prompt == "an owl" and not job.methods:
                raise KeyboardInterrupt

        before(hook)
        found = run()
        assert found.interrupted
        assert len(found.outcomes) == 3
        assert names(folder) == RESULTS | {
            "1-a-fox-seed-0-dense.png", "1-a-fox-seed-0-hidiffusion.png",
            "2-an-owl-seed-0-hidiffusion.png",
        }  # fmt: skip
        assert json.loads((folder / "compare.json").read_text())["interrupted"]
        assert "not run" in (folder / "compare.html").read_text()

    def test_leaves_out_what_was_not_begun(self, run: Compare, before: Callable[..., list[Job]], folder: Path) -> None:
        def hook(job: Job) -> None:
            if job.prompt == "an owl":
                raise KeyboardInterrupt

        before(hook)
        found = run()
        assert [shot.prompt for shot in found.begun] == ["a fox"]
        assert "<h2>an owl" not in (folder / "compare.html").read_text()
        assert Image.open(folder / "sheet.png").height < 2 * sheet.Layout.of(found, 1).row_height

    def test_before_the_first_picture_leaves_nothing(
        self, run: Compare, before: Callable[..., list[Job]], folder: Path
    ) -> None:
        def hook(job: Job) -> None:
            raise KeyboardInterrupt

        before(hook)
        with pytest.raises(KeyboardInterrupt):
            run()
        assert not folder.exists()


class TestOrder:
    def test_variants_take_turns_each_first_at_some_time(self, run: Compare, before: Callable[..., list[Job]]) -> None:
        jobs = before()
        found = run()
        assert [(job.prompt, *job.methods) for job in jobs[2:]] == [
            ("a fox",), ("a fox", "hidiffusion"), ("an owl", "hidiffusion"), ("an owl",),
        ]  # fmt: skip
        assert all(found.outcome(shot, found.variants[1]).likeness for shot in found.shots)

    @pytest.mark.parametrize(
        ("more", "steps"), [({"steps": 3}, 2), ({"steps": 1}, 1), ({"steps": 9, "image": "a.png", "strength": 0.3}, 7)]
    )
    def test_all_variants_run_a_few_steps_before_any_counts(
        self, run: Compare, before: Callable[..., list[Job]], more: dict[str, Any], steps: int, tmp_path: Path
    ) -> None:
        if "image" in more:
            Image.new("RGB", (128, 128)).save(tmp_path / "a.png")
            more = more | {"image": tmp_path / "a.png"}
        jobs = before()
        found = run(prompts=("a fox",), **more)
        assert [(job.steps, *job.methods) for job in jobs] == [
            (steps,), (steps, "hidiffusion"), (more["steps"],), (more["steps"], "hidiffusion"),
        ]  # fmt: skip
        assert any(f"after a warm-up of {steps} step" in line for line in text.remarks(found))
        assert len(found.outcomes) == 2

    def test_a_compiled_model_changes_its_method_as_seldom_as_can_be_and_is_warmed_up(
        self, run: Compare, before: Callable[..., list[Job]], monkeypatch: pytest.MonkeyPatch, folder: Path
    ) -> None:
        monkeypatch.setattr(session.compilation, "check_compiler", lambda device: None)
        monkeypatch.setattr(session.compilation, "compile_denoisers", lambda pipe: "the U-Net")
        jobs = before()
        found = run(compile=True)
        assert [(job.prompt, *job.methods) for job in jobs] == [
            ("a fox",), ("a fox",), ("an owl",),
            ("a fox", "hidiffusion"), ("a fox", "hidiffusion"), ("an owl", "hidiffusion"),
        ]  # fmt: skip
        assert found.warm_up_steps == 2
        assert len(names(folder)) == 4 + len(RESULTS)


class TestFolder:
    def test_that_is_empty_is_used(self, run: Compare, folder: Path) -> None:
        folder.mkdir()
        run(prompts=("a fox",), steps=1)
        assert names(folder) > RESULTS

    def test_that_is_not_empty_is_refused(self, run: Compare, folder: Path) -> None:
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
        with pytest.raises(BadInput, match="is not empty"):
            run()
        assert names(folder) == {"mine.txt"}

    def test_that_is_a_file_or_has_no_parent_is_refused(self, run: Compare, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(BadInput, match="is a file"):
            run(folder=tmp_path / "file")
        with pytest.raises(BadInput, match="does not exist"):
            run(folder=tmp_path / "a" / "b")

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            ({"prompts": ("a fox", "a fox")}, "'a fox' is there 2 times"),
            ({"seeds": (1, 2, 1)}, "seed '1' is there 2 times"),
        ],
    )
    def test_nothing_is_made_twice(self, run: Compare, more: dict[str, Any], words: str) -> None:
        with pytest.raises(BadInput, match=words):
            run(**more)

    def test_what_a_route_keeps_is_not_left_behind(
        self, run: Compare, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        paint = session.Painter.paint

        def painted(self: Any, stage: Any, *more: Any) -> Any:
            if stage.number == 2:
                raise JobFailed("out of memory in stage 2")
            return paint(self, stage, *more)

        monkeypatch.setattr(session.Painter, "paint", painted)
        found = run(prompts=("a fox",), route="ladder")
        assert found.summary(found.variants[0]).error == "out of memory in stage 2"
        assert names(folder) == RESULTS


def test_a_model_that_no_method_applies_to_is_refused(
    run: Compare, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr("attnswap.pipelines.compare.run.methods", lambda: ("adaspa",))
    with pytest.raises(UnsupportedModel, match="no method applies"):
        run(())
    assert not folder.exists()


class TestClips:
    @pytest.fixture
    def found(self, run: Compare, tiny_wan: Path) -> Comparison:
        pytest.importorskip("av")
        adaspa = parse([(["adaspa"], ["sparsity=0.5", "min_tokens=0", "block=16,16", "search_steps=1"])])
        return run(adaspa, model=str(tiny_wan), width=32, height=32)

    def test_are_stitched_and_shown_by_their_middle_frames(self, found: Comparison, folder: Path) -> None:
        import av

        assert names(folder) > RESULTS
        assert len(names(folder)) == 4 + 1 + len(RESULTS)  # and no frames
        with av.open(str(folder / "stitched.mp4")) as container:
            assert sum(1 for _ in container.decode(video=0)) == 2 * 9
            assert container.streams.video[0].average_rate == 8
        assert Image.open(folder / "sheet.png").width == sheet.Layout.of(found, 2).width
        shown = (folder / "compare.html").read_text()
        assert shown.count("data:video/mp4") == 4
        assert "stitched.mp4" in shown

    def test_have_figures_of_lossless_frames(self, found: Comparison) -> None:
        likeness = found.outcome(found.shots[0], found.variants[1]).likeness
        assert likeness.worst_psnr <= likeness.psnr
        assert likeness.worst_ssim <= likeness.ssim

    @pytest.mark.filterwarnings("ignore:attnswap. attention over")
    def test_of_the_same_pixels_are_identical(self, run: Compare, tiny_wan: Path) -> None:
        pytest.importorskip("av")
        never = parse([(["adaspa"], ["min_tokens=100000"])])
        found = run(never, model=str(tiny_wan), width=32, height=32, prompts=("a fox",), steps=1)
        assert found.outcome(found.shots[0], found.variants[1]).likeness.identical

    @pytest.mark.filterwarnings("ignore:attnswap. attention over")
    def test_are_gifs_where_pyav_is_missing(
        self, run: Compare, tiny_wan: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
    ) -> None:
        monkeypatch.setattr(save, "has_av", lambda: False)
        never = parse([(["adaspa"], ["min_tokens=100000"])])
        run(never, model=str(tiny_wan), width=32, height=32, prompts=("a fox",), steps=1)
        assert {"stitched.gif", "1-a-fox-seed-0-dense.gif"} < names(folder)
        assert page.MIME[".gif"] in (folder / "compare.html").read_text()


class TestOwnSession:
    """A caller with a model in memory, who watches the runs."""

    class Watched:
        """Keeps what it is told, and ends the comparison at what it is to end at."""

        def __init__(self, end: str | None = None) -> None:
            self.told: list[str] = []
            self._end = end

        def say(self, text: str) -> None:
            self.told.append(text)
            if text == self._end:
                raise KeyboardInterrupt

        next_run = say

        def begin(self, stage: Stage) -> None:
            self.say(f"begin of {stage.steps}")

        def reach(self, stage: Stage, step: int) -> None:
            self.say(f"step {step}")

        def frame_done(self, total: int) -> None:
            self.say(f"a frame of {total}")

        def close(self) -> None:
            self.say("closed")

    @pytest.fixture
    def job(self, tiny_sd: Path) -> Job:
        return Job("a fox", model=str(tiny_sd), steps=3, width=128, height=128)

    @pytest.fixture
    def own(self, job: Job) -> Iterator[Session]:
        with Session(job) as session:
            yield session

    def compared(self, own: Session, job: Job, folder: Path, watched: Watched, **more: Any) -> Comparison:
        given: dict[str, Any] = {"prompts": ("a fox",), "seeds": (0,), "folder": folder, **more}
        return compare(job, HIDIFFUSION, session=own, watch=lambda runs, stages: watched, **given)

    def test_is_told_of_warm_ups_and_of_each_run(self, own: Session, job: Job, folder: Path) -> None:
        watched = self.Watched()
        self.compared(own, job, folder, watched)
        warm_ups = [f"warm-up of {name}, step {step} of 2" for name in ("dense", "hidiffusion") for step in range(3)]
        assert list(dict.fromkeys(watched.told[: watched.told.index("dense")])) == warm_ups
        runs = watched.told[watched.told.index("dense") :]
        one = ["begin of 3", "step 1", "step 2", "step 3"]
        assert list(dict.fromkeys(runs[: runs.index("hidiffusion")])) == ["dense", *one]
        assert "closed" not in watched.told

    def test_of_which_no_copy_can_be_kept_is_good_all_the_same(self, own: Session, job: Job, folder: Path) -> None:
        def full(result: Result) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))

        found = self.compared(own, job, folder, self.Watched(), made=full)
        for outcome in found.outcomes.values():
            assert outcome.error is None
            assert outcome.file
            assert "no copy of it was kept: No space left on device" in outcome.notes

    def test_gives_each_picture_as_it_is_made_with_its_whole_report(self, own: Session, job: Job, folder: Path) -> None:
        made: list[Result] = []
        found = self.compared(own, job, folder, self.Watched(), made=made.append)
        files = [outcome.file for outcome in found.outcomes.values()]
        assert [result.job.output and result.job.output.name for result in made] == files
        assert [list(result.job.methods) for result in made] == [[], ["hidiffusion"]]
        assert made[1].report
        assert made[1].report.to_dict()["denoisers"][0]["layers"]

    def test_stays_open_with_what_it_had_in_place(self, own: Session, job: Job, folder: Path, tmp_path: Path) -> None:
        fast = own.plan(dataclasses.replace(job, methods={"hidiffusion": {}}, output=tmp_path / "a.png"))
        [before] = own.make([fast])
        self.compared(own, job, folder, self.Watched())
        [after] = own.make([fast])
        assert after.report is not None
        assert after.report.density == before.report.density < 1
        assert np.array_equal(np.asarray(after.image), np.asarray(before.image))

    def test_puts_its_method_in_again_where_a_comparison_ended_at_once(
        self, own: Session, job: Job, folder: Path, tmp_path: Path
    ) -> None:
        fast = own.plan(dataclasses.replace(job, methods={"hidiffusion": {}}, output=tmp_path / "a.png"))
        [before] = own.make([fast])
        with pytest.raises(KeyboardInterrupt):
            self.compared(own, job, folder, self.Watched("warm-up of dense, step 0 of 2"))
        [after] = own.make([fast])
        assert after.report.density == before.report.density < 1

    def test_ends_it_in_a_warm_up(self, own: Session, job: Job, folder: Path) -> None:
        watched = self.Watched("warm-up of hidiffusion, step 1 of 2")
        with pytest.raises(KeyboardInterrupt):
            self.compared(own, job, folder, watched)
        assert watched.told[-1] == "warm-up of hidiffusion, step 1 of 2"
        assert not folder.exists()

    def test_ends_it_in_a_run_and_keeps_those_before(self, own: Session, job: Job, folder: Path) -> None:
        found = self.compared(own, job, folder, self.Watched("hidiffusion"))
        assert [name for _, name in found.outcomes] == ["dense"]
        assert names(folder) == RESULTS | {"1-a-fox-seed-0-dense.png"}

    def test_gets_the_frames_of_clips(self, tiny_wan: Path, folder: Path, tmp_path: Path) -> None:
        pytest.importorskip("av")
        job = Job("a fox", model=str(tiny_wan), steps=1, width=32, height=32)
        adaspa = parse([(["adaspa"], ["sparsity=0.5", "min_tokens=0", "block=16,16", "search_steps=1"])])
        (work := tmp_path / "work").mkdir()
        found = compare(job, adaspa, prompts=("a fox",), seeds=(0,), folder=folder, work=work)
        files = {Path(outcome.file).stem for outcome in found.outcomes.values()}
        assert names(work) == files
        assert all(len(list((work / stem).glob("frame-*.png"))) == found.frames for stem in files)
