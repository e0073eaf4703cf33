"""One job at a time, stopped within a step, and nothing of it left in the model."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from attnswap.accel.errors import UnsupportedModel, WeightsError
from attnswap.demo.server import log
from attnswap.demo.server import worker as module
from attnswap.demo.server.live import Live
from attnswap.demo.server.shelf import Offer, Shelf
from attnswap.demo.server.worker import Event, Failed, Finished, Progress, Stopped, Worker
from attnswap.demo.site import Site
from attnswap.pipelines.errors import BadInput, JobFailed
from attnswap.pipelines.job import Job
from attnswap.pipelines.routes import Stage
from attnswap.pipelines.session import Result, Session

STAGE = Stage(1, 1, 64, 64, 100)
PATIENCE = 10.0


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def steps(live: Live, seconds: float = 0.01) -> str:
    """A run of many short steps."""
    live.expect([STAGE])
    live.begin(STAGE)
    for step in range(1, STAGE.steps + 1):
        time.sleep(seconds)
        live.reach(STAGE, step)
    return "done"


def last(events: Iterable[Event]) -> Event:
    return list(events)[-1]


def in_thread(worker: Worker, visitor: str, work: Callable[[Live], Any]) -> tuple[threading.Thread, list[Event]]:
    """The events of a run that has begun."""
    events: list[Event] = []
    thread = threading.Thread(target=lambda: events.extend(worker.run(visitor, work)))
    thread.start()
    return thread, events


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_events_come_as_the_work_goes_and_its_value_last(worker: Worker) -> None:
    def work(live: Live) -> int:
        live.say("loading")
        return 7

    assert list(worker.run("a", work)) == [Progress(0.0, "loading"), Finished(7)]


def test_two_jobs_never_run_at_once(worker: Worker) -> None:
    running, most = 0, 0

    def work(live: Live) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.02)
        running -= 1

    threads = [in_thread(worker, f"visitor {number}", work)[0] for number in range(8)]
    for thread in threads:
        thread.join()
    assert most == 1


def test_stop_ends_the_run_within_a_step_and_says_how_far_it_came(worker: Worker) -> None:
    thread, events = in_thread(worker, "a", steps)
    until(lambda: worker.busy("a"))
    time.sleep(0.1)
    said = worker.stop("a")
    assert said.startswith("Stopped after step ")
    assert said.endswith(" of 100.")
    assert not worker.busy("a")
    thread.join()
    assert events[-1] == Stopped(said)


def test_only_the_first_who_asks_to_stop_a_long_step_waits_for_its_end(worker: Worker) -> None:
    begun, release = threading.Event(), threading.Event()

    def work(live: Live) -> None:
        live.expect([STAGE])
        live.begin(STAGE)
        begun.set()
        release.wait(PATIENCE)
        live.reach(STAGE, 1)

    thread, _ = in_thread(worker, "a", work)
    assert begun.wait(PATIENCE)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(worker.stop, "a") for _ in range(4)]
        until(lambda: sum(each.done() for each in asked) == 3)
        assert {each.result() for each in asked if each.done()} == {"It is being stopped already."}
        release.set()
        assert "Stopped after step 1 of 100." in {each.result() for each in asked}
    thread.join()
    assert worker.stop("a") == "Nothing of yours is running."


def test_a_run_that_fails_as_it_is_stopped_says_why(worker: Worker) -> None:
    begun = threading.Event()

    def work(live: Live) -> None:
        begun.set()
        until(live._stopped)
        raise JobFailed("out of memory while decoding")

    thread, events = in_thread(worker, "a", work)
    assert begun.wait(PATIENCE)
    said = worker.stop("a")
    thread.join()
    assert isinstance(events[-1], Failed)
    assert said == "Not made: out of memory while decoding"


def test_stop_is_for_what_is_ones_own(worker: Worker) -> None:
    thread, events = in_thread(worker, "a", lambda live: steps(live, 0.002))
    until(lambda: worker.busy("a"))
    assert worker.stop("b") == "Nothing of yours is running."
    thread.join()
    assert events[-1] == Finished("done")


def test_a_job_that_waits_for_another_can_be_stopped(worker: Worker) -> None:
    release = threading.Event()
    first, _ = in_thread(worker, "a", lambda live: release.wait(PATIENCE))
    until(lambda: worker.busy("a"))
    second, events = in_thread(worker, "b", steps)
    until(lambda: worker.busy("b"))
    assert worker.stop("b") == "Stopped before the first step."
    second.join()
    assert events[-1] == Stopped("Stopped before the first step.")
    assert worker.busy("a")
    release.set()
    first.join()


def test_closing_the_generator_stops_the_work_and_waits_for_its_end(worker: Worker) -> None:
    ended = threading.Event()

    def work(live: Live) -> None:
        try:
            steps(live)
        finally:
            ended.set()

    events = worker.run("a", work)
    next(events)
    events.close()
    assert ended.is_set()
    assert not worker.busy("a")


def test_closing_it_in_an_event_loop_holds_nobody_up(worker: Worker) -> None:
    def work(live: Live) -> None:
        live.say("a long step")
        time.sleep(1)
        live.say("never said")

    async def close() -> float:
        events = worker.run("a", work)
        next(events)
        start = time.monotonic()
        events.close()
        return time.monotonic() - start

    assert asyncio.run(close()) < 0.5
    assert last(worker.run("b", lambda live: "after it")) == Finished("after it")


class TestAPageThatIsGone:
    """Gradio closes its generator in the event loop; so does a locked phone."""

    @staticmethod
    def leave(worker: Worker, visitor: str, work: Callable[[Live], Any]) -> None:
        """Once the work has said something."""

        async def close() -> None:
            events = worker.run(visitor, work)
            next(events)
            events.close()

        asyncio.run(close())

    def test_does_not_lose_what_is_running(self, worker: Worker) -> None:
        done: list[str] = []
        self.leave(worker, "a", lambda live: done.append(steps(live)))
        assert last(worker.run("b", lambda live: "waited for it")) == Finished("waited for it")
        assert done == ["done"]

    def test_gives_the_device_up_after_a_while_if_others_wait(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "LINGER", 0.0)
        done: list[str] = []
        self.leave(worker, "a", lambda live: done.append(steps(live)))
        assert last(worker.run("b", lambda live: "")) == Finished("")
        assert done == []

    def test_keeps_it_if_nobody_does(self, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "LINGER", 0.0)
        done: list[str] = []
        self.leave(worker, "a", lambda live: done.append(steps(live)))
        until(lambda: not worker.busy("a"))
        assert done == ["done"]

    def test_can_be_stopped_still(self, worker: Worker) -> None:
        self.leave(worker, "a", steps)
        assert worker.stop("a").startswith("Stopped")

    def test_drops_what_waits_for_its_turn(self, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "BEAT", 0.01)
        release, done = threading.Event(), list[int]()
        first, _ = in_thread(worker, "a", lambda live: release.wait(PATIENCE))
        until(lambda: worker.busy("a"))
        self.leave(worker, "b", lambda live: done.append(1))
        until(lambda: not worker.busy("b"))
        release.set()
        first.join()
        assert done == []


class TestInTheBackground:
    """What nobody has asked for."""

    def test_nothing_begins_while_a_job_runs(self, worker: Worker) -> None:
        release = threading.Event()
        thread, _ = in_thread(worker, "a", lambda live: release.wait(PATIENCE))
        until(lambda: worker.busy("a"))
        event = last(worker.run("b", lambda live: pytest.fail("it began"), background=True))
        release.set()
        thread.join()
        assert event == Stopped("Stopped before the first step.")

    def test_a_run_makes_way_for_a_job_within_a_step(self, worker: Worker) -> None:
        begun = threading.Event()

        def work(live: Live) -> None:
            begun.set()
            steps(live, 0.05)

        events: list[Event] = []
        thread = threading.Thread(target=lambda: events.extend(worker.run("a", work, background=True)))
        thread.start()
        assert begun.wait(PATIENCE)
        start = time.monotonic()
        assert last(worker.run("b", lambda live: "made")) == Finished("made")
        assert time.monotonic() - start < 2  # of the 5 s it would have taken
        thread.join()
        assert isinstance(events[-1], Stopped)

    def test_a_run_goes_to_its_end_where_nobody_comes(self, worker: Worker) -> None:
        assert last(worker.run("a", lambda live: steps(live, 0), background=True)) == Finished("done")

    def test_a_run_is_nothing_to_stop_nor_somebody_who_waits(self, worker: Worker) -> None:
        contended: list[bool] = []

        def work(live: Live) -> None:
            contended.append(worker.is_contended())
            steps(live)

        events = worker.run("a", work, background=True)
        next(events)
        assert worker.stop("a") == "Nothing of yours is running."
        events.close()
        assert contended in ([], [False])

    def test_it_is_known_whether_somebody_else_has_run_something(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        last(worker.run("a", lambda live: None, background=True))
        assert not worker.is_for_another("b")
        last(worker.run("a", lambda live: None))
        assert worker.is_for_another("b")
        assert not worker.is_for_another("a")
        monkeypatch.setattr(module, "RECENT", 0.0)
        assert not worker.is_for_another("b")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_log_that_nobody_reads_any_more_holds_nobody_up() -> None:
    def log(line: str) -> None:
        raise BrokenPipeError

    def work(live: Live) -> str:
        live.what = "emoji-sd"
        return "made"

    worker = Worker(log)
    for _ in range(2):
        events = worker.run("a", work)
        assert Finished("made") in list(itertools.islice(events, 3))
    assert not worker.busy("a")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_accelerator_that_fails_while_it_is_cleared_holds_nobody_up(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def work(live: Live) -> None:
        raise JobFailed("no")

    monkeypatch.setattr(module, "_let_go", broken)
    for _ in range(2):
        assert Failed("no") in list(itertools.islice(worker.run("a", work), 3))


class TestTheLog:
    def test_has_a_line_for_each_job_and_how_it_ended(self) -> None:
        lines: list[str] = []
        worker = Worker(lines.append)

        def work(live: Live) -> None:
            live.what = "emoji-sd, 64x64"

        def failing(live: Live) -> None:
            work(live)
            raise JobFailed("too large")

        for visitor, job in (("abcdefgh", work), ("local", failing)):
            last(worker.run(visitor, job))
        assert re.fullmatch(r"visitor abcd: emoji-sd, 64x64: \d+\.\d s", lines[0])
        assert re.fullmatch(r"visitor loca: emoji-sd, 64x64: \d+\.\d s, too large", lines[1])

    def test_has_none_for_what_the_pages_do_by_themselves(self) -> None:
        lines: list[str] = []
        last(Worker(lines.append).run("a", lambda live: live.say("timing two steps")))
        assert lines == []

    def test_describes_a_job_without_what_was_typed(self) -> None:
        job = Job("secret", width=96, height=64, frames=9, steps=3, methods={"adaspa": {}})
        assert log.described(job) == "emoji-sd, 96x64, 9 frames, 3 steps, adaspa"
        said = log.described(Job("secret", width=64, height=64, steps=3), ["dense", "clear"])
        assert said == "comparison of emoji-sd, 64x64, 3 steps, dense / clear"


def test_a_generator_that_waits_for_a_long_step_can_be_closed_meanwhile(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT", 0.05)
    release = threading.Event()

    def work(live: Live) -> None:
        live.say("a long step")
        release.wait(PATIENCE)

    events = worker.run("a", work)
    assert [next(events) for _ in range(3)] == [Progress(0.0, "a long step")] * 3
    release.set()
    events.close()


def test_a_stop_while_a_model_is_loading_ends_after_it(worker: Worker) -> None:
    loading, loaded, ran = threading.Event(), threading.Event(), threading.Event()

    def work(live: Live) -> None:
        live.say("loading")
        loading.set()
        time.sleep(0.2)
        loaded.set()
        live.expect([STAGE])
        live.begin(STAGE)
        ran.set()

    thread, events = in_thread(worker, "a", work)
    loading.wait(PATIENCE)
    assert worker.stop("a") == "Stopped before the first step."
    assert loaded.is_set()
    assert not ran.is_set()
    thread.join()
    assert events[-1] == Stopped("Stopped before the first step.")


@pytest.mark.parametrize("kind", [BadInput, JobFailed, UnsupportedModel, WeightsError])
def test_what_is_wrong_with_a_job_is_said_without_the_folders_of_the_server(
    worker: Worker, kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    def work(live: Live) -> None:
        raise kind("/srv/private/1-a-fox.png could not be written: disk full")

    assert last(worker.run("a", work)) == Failed("1-a-fox.png could not be written: disk full")
    assert capsys.readouterr().err == ""


def test_a_defect_is_a_line_for_the_visitor_and_a_traceback_for_the_operator(
    worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(live: Live) -> None:
        raise KeyError("/srv/private/secret")

    event = last(worker.run("a", work))
    assert event == Failed("Something broke on the server (KeyError), which is no fault of yours; its log says where.")
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "test_worker.py" in err


def test_too_little_memory_is_no_defect(worker: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    def work(live: Live) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert last(worker.run("a", work)) == Failed("out of memory. Try a smaller size or fewer frames.")
    assert capsys.readouterr().err == ""


def test_after_one_that_fails_the_next_job_runs(worker: Worker) -> None:
    def work(live: Live) -> None:
        raise JobFailed("no")

    assert last(worker.run("a", work)) == Failed("no")
    assert last(worker.run("a", lambda live: "yes")) == Finished("yes")


def test_a_worker_that_is_closed_ends_its_work_and_takes_no_more(worker: Worker) -> None:
    thread, events = in_thread(worker, "a", steps)
    until(lambda: worker.busy("a"))
    worker.close()
    thread.join()
    assert isinstance(events[-1], Stopped)
    assert isinstance(last(worker.run("a", steps)), Stopped)


def made(site: Site, offer: Offer, job: Job, *, stop_after: int | None = None, frame: int | None = None) -> Event:
    """The last event of a job, which the visitor stops after a step or a frame."""
    seen = 0

    class Stopper:
        """Asks for the end where a visitor would have by chance."""

        def __init__(self, live: Live) -> None:
            self.live = live

        def begin(self, stage: Stage) -> None:
            self.live.begin(stage)

        def reach(self, stage: Stage, step: int) -> None:
            if step == stop_after:
                self.ask()
            self.live.reach(stage, step)

        def frame_done(self, total: int) -> None:
            nonlocal seen
            seen += 1
            if seen == frame:
                self.ask()
            self.live.frame_done(total)

        def close(self) -> None:
            self.live.close()

        def ask(self) -> None:
            threading.Thread(target=site.worker.stop, args=("a",)).start()
            until(self.live._stopped)

    def work(live: Live) -> Result:
        session = site.shelf.session(offer)
        task = session.plan(job)
        live.expect(task.stages)
        [result] = session.make([task], watch=Stopper(live), say=live.say)
        return result

    return last(site.worker.run("a", work))


def pixels(path: Path) -> bytes:
    return path.read_bytes()


@pytest.mark.parametrize(
    ("model", "method", "fields", "stops"),
    [
        ("emoji-sd", "hidiffusion", {"width": 128, "height": 128, "steps": 3}, [{"stop_after": 2}]),
        ("emoji-video", "adaspa", {"steps": 3, "frames": 9}, [{"stop_after": 2}, {"frame": 2}]),
    ],
)
def test_after_a_stop_a_run_gives_the_same_bits_as_in_a_fresh_session(
    site: Site, tmp_path: Path, model: str, method: str, fields: dict[str, Any], stops: list[dict[str, int]]
) -> None:
    offer = site.shelf.offer(model)
    kind = ".mp4" if offer.clips else ".png"
    job = site.shelf.job(offer, prompt="a fox", methods={method: {}}, output=tmp_path / f"stopped{kind}", **fields)
    for stop in stops:
        assert isinstance(made(site, offer, job, **stop), Stopped)
        assert list(tmp_path.glob("**/*stopped*")) == []
    after = dataclasses.replace(job, output=tmp_path / f"after{kind}")
    assert isinstance(made(site, offer, after), Finished)
    fresh = dataclasses.replace(job, output=tmp_path / f"fresh{kind}")
    with Session(fresh, model=offer.model) as session:
        session.make([session.plan(fresh)])
    assert (tmp_path / f"after{kind}").read_bytes() == (tmp_path / f"fresh{kind}").read_bytes()


def test_a_stopped_run_leaves_no_hooks_on_the_model(site: Site, tmp_path: Path, shelf: Shelf) -> None:
    """The methods themselves stay in place for the next run, as after one that was not stopped."""
    offer = shelf.offer("emoji-sd")
    job = shelf.job(offer, prompt="a fox", output=tmp_path / "fox.png", steps=2)
    assert isinstance(made(site, offer, job), Finished)
    before = hooks(shelf.session(offer).pipe)
    assert isinstance(made(site, offer, job, stop_after=1), Stopped)
    assert hooks(shelf.session(offer).pipe) == before
    assert "step" not in vars(shelf.session(offer).pipe.scheduler)


def hooks(pipe: Any) -> dict[str, int]:
    return {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in pipe.unet.named_modules()
    }
