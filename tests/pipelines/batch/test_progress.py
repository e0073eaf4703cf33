"""How far a batch is, and how long it will take, whatever sizes its rows have and whoever makes them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from attnswap.pipelines.batch import progress as module
from attnswap.pipelines.batch.progress import Progress, Stopped
from attnswap.pipelines.routes import Stage


@dataclass
class Clock:
    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def row(id: str, work: int = 1, stages: int = 1, steps: int = 4) -> Any:
    every = tuple(Stage(number, stages, 8, 8, steps, None) for number in range(1, stages + 1))
    return SimpleNamespace(id=id, work=work, task=SimpleNamespace(stages=every))


class Watched:
    def __init__(self, rows: list[Any]) -> None:
        self.said: list[str] = []
        self.asked_to_stop = False
        self.progress = Progress(rows, bars=False, print_line=self.said.append, stop=lambda: self.asked_to_stop)

    def make(self, group: list[Any], clock: Clock, seconds: float) -> None:
        self.progress.begin_group(group)
        clock.now += seconds
        self.progress.end_group(group)
        for each in group:
            self.progress.row_done(each, seconds / len(group))


def test_time_left_goes_by_the_work_of_what_is_left(clock: Clock) -> None:
    rows = [row("a", 1), row("b", 4), row("c", 5)]
    watched = Watched(rows)
    watched.make(rows[:1], clock, 10)
    watched.make(rows[1:2], clock, 40)
    watched.make(rows[2:], clock, 50)
    assert watched.said == ["[1/3] a: 10.0 s, about 90 s left".replace("90 s", "2 min"),
                            "[2/3] b: 40.0 s, about 50 s left", "[3/3] c: 50.0 s"]  # fmt: skip


def test_time_spent_on_what_failed_counts_and_its_work_is_no_longer_left(clock: Clock) -> None:
    rows = [row("a"), row("b"), row("c"), row("d")]
    watched = Watched(rows)
    watched.make(rows[:1], clock, 10)
    watched.progress.begin_group(rows[1:2])
    clock.now += 2
    watched.progress.end_group(())
    watched.progress.row_failed(rows[1], "surprise")
    assert watched.said[1] == "[2/4] b failed: surprise, about 24 s left"


def test_a_group_that_failed_together_is_counted_once(clock: Clock) -> None:
    rows = [row("a"), row("b")]
    watched = Watched(rows)
    watched.progress.begin_group(rows)
    clock.now += 3
    watched.progress.end_group(())
    watched.make(rows[:1], clock, 5)
    watched.make(rows[1:], clock, 5)
    assert watched.said == ["[1/2] a: 5.0 s, about 8 s left", "[2/2] b: 5.0 s"]


def test_what_others_make_makes_the_rest_come_sooner(clock: Clock) -> None:
    rows = [row(name) for name in "abcdef"]
    watched = Watched(rows)
    watched.progress.drop(rows[1:2])
    watched.make(rows[:1], clock, 10)
    assert watched.said == ["[1/5] a: 10.0 s, about 20 s left"]


def test_stages_and_repeated_calls_of_a_step_add_up(clock: Clock) -> None:
    two = row("a", stages=2)
    watched = Watched([two])
    watched.progress.begin_group([two])
    seen = []
    for stage in two.task.stages:
        watched.progress.begin(stage)
        for step in (1, 1, 2, 3, 4, 5, 6):  # of second order
            watched.progress.reach(stage, step)
            seen.append(watched.progress._part)
    assert seen == [step / 8 for step in (1, 1, 2, 3, 4, 4, 4, 5, 5, 6, 7, 8, 8, 8)]


def test_asks_for_the_end_at_each_step_and_frame(clock: Clock) -> None:
    one = row("a")
    watched = Watched([one])
    watched.progress.begin_group([one])
    watched.progress.reach(one.task.stages[0], 1)
    watched.asked_to_stop = True
    with pytest.raises(Stopped):
        watched.progress.reach(one.task.stages[0], 2)
    with pytest.raises(Stopped):
        watched.progress.frame_done(3)
    with pytest.raises(Stopped):
        watched.progress.begin_group([one])


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (89, "89 s"), (600, "10 min"), (7140, "119 min"), (7260, "2 h 1 min")]
)
def test_durations(seconds: float, said: str) -> None:
    assert module._duration(seconds) == said
