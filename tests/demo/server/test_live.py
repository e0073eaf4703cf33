"""What people see of a run: where it is, how long it takes, what it looks like."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attnswap.demo.server import live
from attnswap.demo.server.live import Live, Progress, Stop
from attnswap.pipelines.routes import Stage
from PIL import Image

STAGE = Stage(1, 1, 64, 64, 4)
LADDER = (Stage(1, 2, 64, 64, 4), Stage(2, 2, 128, 128, 2, strength=0.5))


class Clock:
    """Seconds as the test has it."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(live, "time", clock)
    return clock


class Seen(Live):
    """Keeps what it tells."""

    def __init__(self, stopped: bool = False) -> None:
        self.told: list[Progress] = []
        self.asked = stopped
        super().__init__(self.told.append, lambda: self.asked)

    @property
    def last(self) -> Progress:
        return self.told[-1]


def run(seen: Live, clock: Clock, stage: Stage, *seconds: float) -> None:
    """The first steps of a stage, each of so many seconds."""
    seen.begin(stage)
    for step, taken in enumerate(seconds, 1):
        clock.now += taken
        seen.reach(stage, step)


def test_a_step_is_told_with_what_is_left_by_the_pace_so_far(clock: Clock) -> None:
    seen = Seen()
    seen.expect([STAGE])
    run(seen, clock, STAGE, 2.0, 2.0)
    # Two steps, and decoding as one more.
    assert seen.last == Progress(2 / 5, "step 2 of 4, about 6 s left")


def test_a_slow_first_step_does_not_count_once_there_are_others(clock: Clock) -> None:
    seen = Seen()
    seen.expect([STAGE])
    run(seen, clock, STAGE, 50.0)
    assert seen.last.text == "step 1 of 4, about 3 min left"
    clock.now += 2
    seen.reach(STAGE, 2)
    assert seen.last.text == "step 2 of 4, about 6 s left"


def test_steps_of_a_larger_stage_count_by_their_pixels(clock: Clock) -> None:
    seen = Seen()
    seen.expect(LADDER)
    run(seen, clock, LADDER[0], 1.0, 1.0, 1.0, 1.0)
    assert seen.last.share == pytest.approx(4 / (4 + 2 * 4 + 4))
    assert seen.last.text == "stage 1 of 2 (64x64), step 4 of 4, about 12 s left"
    run(seen, clock, LADDER[1], 4.0)
    assert seen.last.share == pytest.approx(8 / 16)
    assert seen.last.text == "stage 2 of 2 (128x128), step 1 of 2, about 8 s left"


def test_the_steps_of_all_runs_count_and_the_run_is_named(clock: Clock) -> None:
    seen = Seen()
    seen.expect([STAGE], runs=2)
    seen.next_run("dense")
    assert seen.last == Progress(0.0, "dense, 1 of 2: preparing")
    run(seen, clock, STAGE, 1.0, 1.0, 1.0, 1.0)
    assert seen.last == Progress(4 / 10, "dense, 1 of 2: step 4 of 4, decoding")
    seen.next_run("hidiffusion")
    assert seen.last.share == 5 / 10
    run(seen, clock, STAGE, 1.0)
    assert seen.last == Progress(6 / 10, "hidiffusion, 2 of 2: step 1 of 4, about 4 s left")


def test_a_second_call_for_a_step_or_one_after_decoding_is_no_step(clock: Clock) -> None:
    seen = Seen()
    seen.expect([STAGE])
    run(seen, clock, STAGE, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert [(step, seconds) for _, step, seconds in seen.steps] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_frames_are_counted_while_they_are_decoded(clock: Clock) -> None:
    seen = Seen()
    seen.expect([STAGE])
    run(seen, clock, STAGE, 1.0, 1.0, 1.0, 1.0)
    for _ in range(9):
        clock.now += 1
        seen.frame_done(17)
    assert seen.last.text == "frame 9 of 17"
    assert seen.message == "Stopped after frame 9 of 17."


def preview_of(clock: Clock, seconds: float = 0.0, why_not: str | None = None) -> Any:
    def picture(latents: torch.Tensor, stage: Stage) -> Image.Image:
        clock.now += seconds
        return Image.new("RGB", (8, 8), (int(latents.sum()), 0, 0))

    return SimpleNamespace(why_not=why_not, picture=picture)


def test_every_preview_is_shown_however_fast_the_steps_are(clock: Clock) -> None:
    seen = Seen()
    seen.expect([STAGE], preview=preview_of(clock))
    seen.begin(STAGE)
    for step in range(1, 5):
        clock.now += 0.001
        seen.reach(STAGE, step)
        seen.look(STAGE, torch.tensor(float(step)))
    previews = [told.preview.getpixel((0, 0)) for told in seen.told if told.preview is not None]
    assert previews == [(1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0)]


def test_numbers_alone_are_told_ten_times_a_second_at_most(clock: Clock) -> None:
    stage = Stage(1, 1, 64, 64, 1000)
    seen = Seen()
    seen.expect([stage])
    run(seen, clock, stage, *[0.001] * 1000)
    assert 8 <= len(seen.told) <= 12


def test_the_time_of_previews_is_not_that_of_steps(clock: Clock) -> None:
    seen = Seen()
    seen.expect([STAGE], preview=preview_of(clock, seconds=5.0))
    seen.begin(STAGE)
    for step in (1, 2):
        clock.now += 1
        seen.reach(STAGE, step)
        seen.look(STAGE, torch.zeros(()))
    assert [seconds for *_, seconds in seen.steps] == [1.0, 2.0]
    # Whoever waits, waits for them, too.
    assert "about 18 s left" in seen.last.text


def test_what_cannot_be_previewed_is_not_looked_at(clock: Clock) -> None:
    seen = Seen()
    seen.expect([STAGE], preview=preview_of(clock, why_not="an autoencoder of another kind"))
    seen.begin(STAGE)
    seen.look(STAGE, torch.zeros(()))
    assert all(told.preview is None for told in seen.told)


@pytest.mark.parametrize(
    "act",
    [
        lambda seen: seen.begin(STAGE),
        lambda seen: seen.reach(STAGE, 1),
        lambda seen: seen.frame_done(17),
        lambda seen: seen.next_run("dense"),
    ],
)
def test_a_run_that_is_to_stop_does_so_at_once(act: Any) -> None:
    seen = Seen(stopped=True)
    seen.expect([STAGE])
    with pytest.raises(Stop):
        act(seen)


def test_before_a_run_saying_something_stops_and_in_it_does_not() -> None:
    """A notice comes up where a pipeline is being put together, which must come to its end."""
    seen = Seen(stopped=True)
    with pytest.raises(Stop):
        seen.say("loading emoji-sd")
    seen.expect([STAGE])
    seen.say("low memory: decoding in tiles.")
    assert seen.last.text == "low memory: decoding in tiles."


def test_stop_is_no_failure_that_anybody_would_record() -> None:
    assert issubclass(Stop, KeyboardInterrupt)
    assert not issubclass(Stop, Exception)


def test_it_is_told_how_far_a_stopped_run_came(clock: Clock) -> None:
    seen = Seen()
    assert seen.message == "Stopped before the first step."
    seen.expect([STAGE])
    run(seen, clock, STAGE, 1.0, 1.0, 1.0)
    assert seen.message == "Stopped after step 3 of 4."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/tmp/demo-1/a/1-a-fox.png could not be written: disk full", "1-a-fox.png could not be written: disk full"),
        ("2 of 3 stages are kept in /tmp/x/.fox.png.stages; the", "2 of 3 stages are kept in .fox.png.stages; the"),
        ("no model '~/models/foo'.", "no model 'foo'."),
        ("Huage001/CLEAR, 64x64 and/or 24000/1001", "Huage001/CLEAR, 64x64 and/or 24000/1001"),
        ("see https://huggingface.co/a/b", "see https://huggingface.co/a/b"),
    ],
)
def test_of_files_only_the_name_is_said(text: str, said: str) -> None:
    assert live.without_folders(text) == said


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (3.4, "3 s"), (89, "89 s"), (125, "2 min"), (3 * 3600, "3.0 h")]
)
def test_seconds_are_said_as_one_would(seconds: float, text: str) -> None:
    assert live.duration(seconds) == text
