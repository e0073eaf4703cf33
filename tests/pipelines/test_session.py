"""One model in memory, many jobs: the same pictures as one by one, in one call where they can share it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attnswap.accel.errors import AttnswapWarning
from attnswap.accel.swap import installed_in
from attnswap.pipelines import run, save
from attnswap.pipelines.errors import BadInput, JobFailed, NotWritten
from attnswap.pipelines.generate import generate
from attnswap.pipelines.job import Job, again
from attnswap.pipelines.routes import Stage
from attnswap.pipelines.session import Session
from attnswap.pipelines.task import Task, batch_key
from PIL import Image

PROMPTS = ("a fox", "two owls on a red background", "a banana")


@pytest.fixture
def job(tiny_sd: Path) -> Job:
    return Job(prompt="a fox", model=str(tiny_sd), steps=2)


@pytest.fixture
def session(job: Job) -> Iterator[Session]:
    with Session(job) as session:
        yield session


def planned(session: Session, job: Job, folder: Path, **changes: Any) -> list[Task]:
    """A task for each of the prompts, each with a seed of its own."""
    return [
        session.plan(dataclasses.replace(job, prompt=prompt, seed=seed, output=folder / f"{seed}.png", **changes))
        for seed, prompt in enumerate(PROMPTS)
    ]


def pixels(image: Image.Image | None) -> np.ndarray:
    return np.asarray(image).astype(int)


class TestOneCallForSeveral:
    def test_makes_the_pictures_that_each_makes_alone(self, session: Session, job: Job, tmp_path: Path) -> None:
        tasks = planned(session, job, tmp_path, negative="blue")
        together = session.make(tasks)
        for task, result in zip(tasks, together, strict=True):
            [alone] = session.make([task])
            assert np.abs(pixels(alone.image) - pixels(result.image)).max() <= 2

    def test_is_one_call(self, session: Session, job: Job, tmp_path: Path) -> None:
        calls: list[int] = []
        session.pipe.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
        session.make(planned(session, job, tmp_path))
        assert calls == [6, 6]  # guidance doubles the batch

    def test_is_remembered_so_that_each_picture_can_be_made_again_to_the_bit(
        self, session: Session, job: Job, tmp_path: Path
    ) -> None:
        session.make(planned(session, job, tmp_path))
        before = save.read_record(tmp_path / "1.png")
        assert before["batch"]["index"] == 1
        assert [each["prompt"] for each in before["batch"]["of"]] == list(PROMPTS)
        made = generate(Job(**again(before, {}), output=tmp_path / "again.png"))
        with Image.open(tmp_path / "1.png") as first:
            assert np.array_equal(pixels(first), pixels(made.image))
        assert save.read_record(tmp_path / "again.png") == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png", "again.png"]

    def test_is_forgotten_where_something_else_is_asked_for(self, session: Session, job: Job, tmp_path: Path) -> None:
        session.make(planned(session, job, tmp_path))
        assert again(save.read_record(tmp_path / "1.png"), {"seed": 7})["batch"] is None

    @pytest.mark.parametrize(
        "change",
        [{"width": 32}, {"steps": 3}, {"guidance": 2.0}, {"negative": "blue"}, {"methods": {"hidiffusion": {}}}],
    )
    def test_is_not_for_jobs_that_differ_in_more_than_their_words_and_seed(
        self, session: Session, job: Job, change: dict[str, Any]
    ) -> None:
        one, other = (session.plan(dataclasses.replace(job, **changes)) for changes in ({}, change))
        assert batch_key(one) != batch_key(other)
        assert batch_key(one) == batch_key(session.plan(dataclasses.replace(job, prompt="b", seed=3)))

    def test_is_not_for_routes_with_stages(self, session: Session, job: Job) -> None:
        large = dataclasses.replace(job, width=128, height=128, route="ladder")
        assert batch_key(session.plan(large)) is None


class TestMethods:
    def test_stay_in_place_between_jobs_that_want_them(self, session: Session, job: Job, tmp_path: Path) -> None:
        wanted = {"methods": {"hidiffusion": {}}, "width": 128, "height": 128}
        first, second, third = planned(session, job, tmp_path, **wanted)
        reports = [session.make([first])[0].report]
        installed = installed_in(session.pipe.unet)
        reports += [session.make([task])[0].report for task in (second, third)]
        assert installed is not None
        assert installed_in(session.pipe.unet) is installed
        assert [report.denoisers[0]["calls"] for report in reports if report] == [2, 2, 2]

    def test_what_is_noted_when_they_are_put_in_place_is_in_the_report_of_every_job(self, tmp_path: Path) -> None:
        job = Job(prompt="a fox", model="emoji-flux", steps=1, methods={"clear": {"radius": 4}})
        with Session(job) as session, pytest.warns(AttnswapWarning, match="trained for radius 3"):
            results = [session.make([task])[0] for task in planned(session, job, tmp_path)[:2]]
        for result in results:
            assert result.report is not None
            assert any("trained for radius 3" in note for note in result.report.summary()["notes"])

    def test_are_out_for_a_job_without(self, session: Session, job: Job, tmp_path: Path) -> None:
        dense = planned(session, job, tmp_path, width=128, height=128)[0]
        before = pixels(session.make([dense])[0].image)
        session.make(planned(session, job, tmp_path, methods={"hidiffusion": {}}, width=128, height=128)[:1])
        [after] = session.make([dense])
        assert after.report is None
        assert np.array_equal(before, pixels(after.image))

    def test_are_out_at_the_end(self, job: Job, tmp_path: Path) -> None:
        with Session(job) as session:
            session.make(planned(session, job, tmp_path, methods={"hidiffusion": {}})[:1])
            unet = session.pipe.unet
        assert installed_in(unet) is None


class TestChosenByAuto:
    def test_is_recorded_as_what_was_chosen_and_why(self, session: Session, job: Job, tmp_path: Path) -> None:
        task = planned(session, job, tmp_path, methods={"auto": {}}, width=128, height=128)[0]
        assert list(task.job.methods) == ["hidiffusion"]
        [result] = session.make([task])
        record = save.read_record(tmp_path / "0.png")
        assert record["methods"].keys() == {"hidiffusion"}
        assert record["asked"]["methods"] == {"auto": {}}
        [why] = record["remarks"]
        assert why in str(result.report)

    def test_may_be_dense_which_is_said(self, session: Session, job: Job, tmp_path: Path) -> None:
        task = planned(session, job, tmp_path, methods={"auto": {}})[0]
        assert task.configs == ()
        [result] = session.make([task])
        assert result.report is None
        assert any("auto: dense" in notice for notice in result.notices)


class TestAfterAFailure:
    def test_the_next_job_runs_as_if_nothing_had_been(self, session: Session, job: Job, tmp_path: Path) -> None:
        task = planned(session, job, tmp_path, methods={"hidiffusion": {}}, width=128, height=128)[0]
        expected = pixels(session.make([task])[0].image)

        class Broken(run.Progress):
            def reach(self, stage: Any, step: int) -> None:
                if step == 1:
                    raise torch.OutOfMemoryError("CUDA out of memory")

        with pytest.raises(JobFailed, match="out of memory at 128x128 on cpu after 1 steps"):
            session.make([task], watch=Broken(task.stages, shown=False))
        assert np.array_equal(expected, pixels(session.make([task])[0].image))

    def test_a_full_disk_leaves_no_file(
        self, session: Session, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_space(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Image.Image, "save", no_space)
        with pytest.raises(NotWritten, match=r"0\.png could not be written: No space left on device"):
            session.make(planned(session, job, tmp_path)[:1])
        assert list(tmp_path.iterdir()) == []


def test_what_a_job_is_refused_for_comes_before_weights_are_moved(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnswap.pipelines.session.place", lambda *_: pytest.fail("weights were moved"))
    with Session(job) as session, pytest.raises(BadInput, match="width 60 is not a multiple of 8"):
        session.plan(dataclasses.replace(job, width=60, output=tmp_path / "a.png"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux only")
def test_the_peak_memory_is_that_of_each_job() -> None:
    device = torch.device("cpu")
    held = torch.ones(2**28, dtype=torch.uint8)
    high = run.peak_bytes(device)
    del held
    assert run.reset_peak(device)
    low = run.peak_bytes(device)
    assert high is not None
    assert low is not None
    assert low < high - 2**27


class TestLookingOn:
    def test_shows_the_latents_of_every_step(self, session: Session, job: Job, tmp_path: Path) -> None:
        seen: list[tuple[int, ...]] = []
        [task] = planned(session, job, tmp_path)[:1]
        session.make([task], look=lambda stage, latents: seen.append(tuple(latents.shape)))
        assert seen == [(1, 4, 8, 8)] * 2

    def test_is_not_timed(self, session: Session, job: Job, tmp_path: Path) -> None:
        [task] = planned(session, job, tmp_path)[:1]
        session.make([task])
        [result] = session.make([task], look=lambda stage, latents: time.sleep(1.0))
        assert result.seconds < 1.0

    def test_may_end_the_run(self, session: Session, job: Job, tmp_path: Path) -> None:
        def enough(stage: Stage, latents: torch.Tensor) -> None:
            raise KeyboardInterrupt

        [task] = planned(session, job, tmp_path)[:1]
        with pytest.raises(KeyboardInterrupt):
            session.make([task], look=enough)
        assert not list(tmp_path.iterdir())
