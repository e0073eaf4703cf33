"""How long a job will take, told from what ran before it."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
from attnswap.demo.cost.counts import Counts
from attnswap.demo.cost.pace import RUNS, Pace, Prediction
from attnswap.demo.server.live import Live
from attnswap.demo.server.shelf import Offer, Shelf
from attnswap.pipelines import attention_cost, presets, settings
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.run import peak_bytes
from attnswap.pipelines.task import Task, plan


def task(shelf: Shelf, model: str = "emoji-sd", **fields: Any) -> Task:
    offer = shelf.offer(model)
    return plan(shelf.job(offer, **fields), offer.model, offer.pipe, offer.preset, shelf.device)


def watched(task: Task, *, first: float = 1.0, each: float = 1.0) -> Live:
    """A run, each of whose stages took `first` seconds for its first step, `each` for every other."""
    live = Live(lambda progress: None)
    for stage in task.stages:
        live.steps += [(stage, step, first + each * (step - 1)) for step in range(1, stage.steps + 1)]
    return live


def predicted(pace: Pace, shelf: Shelf, model: str = "emoji-sd", **fields: Any) -> Prediction:
    found = pace.predict(shelf.offer(model), task(shelf, model, **fields))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def counts() -> Counts:
    """Of all tests here: a model is counted once."""
    return Counts()


@pytest.fixture
def pace(counts: Counts) -> Pace:
    pace = Pace()
    pace.counts = counts
    return pace


@pytest.fixture
def learned(pace: Pace, shelf: Shelf) -> Pace:
    """Two steps at the native size: three seconds to the end of the first, one for the other, half to decode."""
    one = task(shelf, steps=2)
    pace.learn(one, watched(one, first=3.0), 4.5)
    return pace


class TestBeforeAnythingRan:
    def test_nothing_is_predicted(self, pace: Pace, shelf: Shelf) -> None:
        assert pace.predict(shelf.offer("emoji-sd"), task(shelf)) is None
        assert not pace.knows(shelf.offer("emoji-sd"))

    def test_nor_from_another_model(self, learned: Pace, shelf: Shelf) -> None:
        assert learned.predict(shelf.offer("emoji-flux"), task(shelf, "emoji-flux")) is None
        assert learned.knows(shelf.offer("emoji-sd"))


class TestOfTheSameSize:
    def test_a_run_of_the_same_kind_takes_as_long_whatever_its_prompt_and_seed(
        self, learned: Pace, shelf: Shelf
    ) -> None:
        found = predicted(learned, shelf, steps=2, prompt="a fox", seed=7)
        assert found == Prediction(4.5, "like the last such run")

    def test_more_steps_take_longer_and_nothing_else_does(self, learned: Pace, shelf: Shelf) -> None:
        """One second for each, two and a half before the first and after the last."""
        found = predicted(learned, shelf, steps=10)
        assert found == Prediction(pytest.approx(10 + 2.5), "from earlier steps at 64×64")

    def test_without_guidance_there_is_one_call_a_step(self, learned: Pace, shelf: Shelf) -> None:
        assert predicted(learned, shelf, steps=10, guidance=1.0).seconds == pytest.approx(5 + 2.5)

    def test_a_run_of_one_step_is_enough(self, pace: Pace, shelf: Shelf) -> None:
        one = task(shelf, steps=1)
        pace.learn(one, watched(one, first=3.0), 3.5)
        assert predicted(pace, shelf, steps=2) == Prediction(pytest.approx(6.5), "from earlier steps at 64×64")

    def test_the_first_run_of_a_process_which_warms_up_counts_no_longer_after_another(
        self, learned: Pace, shelf: Shelf
    ) -> None:
        again = task(shelf, steps=2)
        learned.learn(again, watched(again, first=0.6, each=0.5), 1.2)
        assert predicted(learned, shelf, steps=2).seconds == 1.2
        assert predicted(learned, shelf, steps=10).seconds == pytest.approx(5 + 0.2)

    def test_a_run_that_was_held_up_counts_little(self, pace: Pace, shelf: Shelf) -> None:
        one = task(shelf, steps=2)
        for each in (1.0, 9.0, 1.1):
            pace.learn(one, watched(one, each=each), 2 * each)
        assert predicted(pace, shelf, steps=2).seconds == 2.2

    def test_a_step_that_was_held_up_counts_nothing_where_all_are_alike(self, pace: Pace, shelf: Shelf) -> None:
        one = task(shelf, steps=4)
        live = watched(one)
        live.steps[-1] = (*live.steps[-1][:2], 9.0)
        pace.learn(one, live, 9.0)
        twice = predicted(pace, shelf, steps=8).seconds - predicted(pace, shelf, steps=7).seconds
        assert twice == pytest.approx(1.0)

    def test_what_is_long_past_counts_no_longer(self, learned: Pace, shelf: Shelf) -> None:
        again = task(shelf, steps=2)
        for _ in range(RUNS):
            learned.learn(again, watched(again, first=9.0, each=9.0), 18.0)
        assert predicted(learned, shelf, steps=2).seconds == 18.0


def learn(pace: Pace, task: Task, *, each: float, beside: float = 0.0) -> None:
    pace.learn(task, watched(task, first=each, each=each), sum(stage.steps for stage in task.stages) * each + beside)


def growth(counts: Counts, shelf: Shelf, side: int, *, method: str = "", steps: int = 10) -> float:
    """How many times what the native size does a call computes."""
    offer = shelf.offer("emoji-sd")
    configs = settings.build({method: offer.preset.settings_of(method, side, side)}) if method else []
    larger, native = (counts.call(offer, each, each, None, steps, own) for each, own in ((side, configs), (64, [])))
    assert larger.operations is not None
    assert native.operations is not None
    return larger.operations / native.operations


class TestOfAnotherSize:
    def test_told_from_one_alone_all_grows_with_what_is_computed(
        self, learned: Pace, shelf: Shelf, counts: Counts
    ) -> None:
        ratio = growth(counts, shelf, 192)
        assert ratio > 10, "of nine times the pixels"
        found = predicted(learned, shelf, width=192, height=192, steps=10)
        assert found == Prediction(pytest.approx(10 * ratio + 2.5 * 9), "from earlier steps at 64×64", rough=True)

    def test_told_from_two_there_is_a_part_that_does_not_grow(
        self, learned: Pace, shelf: Shelf, counts: Counts
    ) -> None:
        """Most of a step, of a small model."""
        small = task(shelf, width=32, height=32, steps=2)
        each = 0.9 + 0.1 * growth(counts, shelf, 32)
        learn(learned, small, each=each, beside=2.5)
        larger = predicted(learned, shelf, width=192, height=192, steps=10)
        assert larger.seconds == pytest.approx(10 * (0.9 + 0.1 * growth(counts, shelf, 192)) + 2.5)
        between = predicted(learned, shelf, width=48, height=48, steps=10)
        assert between.seconds == pytest.approx(10 * (0.9 + 0.1 * growth(counts, shelf, 48)) + 2.5)

    @pytest.mark.parametrize("each", [0.01, 2.0], ids=["as if a step took less than nothing", "as if more took less"])
    def test_two_that_load_has_blurred_are_not_believed(
        self, learned: Pace, shelf: Shelf, counts: Counts, each: float
    ) -> None:
        learn(learned, task(shelf, width=32, height=32, steps=2), each=each, beside=3 * each)
        found = predicted(learned, shelf, width=192, height=192, steps=10)
        assert found.seconds == pytest.approx(10 * growth(counts, shelf, 192) + 2.5 * 9)

    def test_a_method_takes_off_what_it_need_not_compute(self, learned: Pace, shelf: Shelf, counts: Counts) -> None:
        ratio = growth(counts, shelf, 128, method="hidiffusion")
        assert ratio < 0.8 * growth(counts, shelf, 128)
        found = predicted(learned, shelf, width=128, height=128, steps=10, methods={"hidiffusion": {}})
        assert found.seconds == pytest.approx(10 * ratio + 2.5 * 4)
        assert found.basis == "from earlier steps with dense attention at 64×64"

    def test_what_was_measured_with_the_same_method_comes_first(self, learned: Pace, shelf: Shelf) -> None:
        learn(learned, task(shelf, width=96, height=96, steps=4, methods={"hidiffusion": {}}), each=5.0)
        said = {
            name: predicted(learned, shelf, width=128, height=128, steps=4, methods={name: {}} if name else {}).basis
            for name in ("hidiffusion", "linfusion", "")
        }
        assert said == {
            "hidiffusion": "from earlier steps at 96×96",
            "linfusion": "from earlier steps with dense attention at 64×64",
            "": "from earlier steps at 64×64",
        }

    def test_then_what_computes_about_as_much(self, learned: Pace, shelf: Shelf) -> None:
        learn(learned, task(shelf, width=192, height=192, steps=4), each=5.0)
        assert predicted(learned, shelf, width=184, height=184, steps=4).basis == "from earlier steps at 192×192"
        assert predicted(learned, shelf, width=72, height=72, steps=4).basis == "from earlier steps at 64×64"

    def test_a_method_that_cannot_act_there_is_said_at_once(self, pace: Pace, shelf: Shelf) -> None:
        one = task(shelf, "emoji-video", steps=2)
        pace.learn(one, watched(one), 2.0)
        late = {"adaspa": {"search_steps": (0, 10)}}
        with pytest.raises(BadInput, match="adaspa: "):
            predicted(pace, shelf, "emoji-video", steps=4, methods=late)


class TestOfStages:
    def test_each_takes_its_own_time(self, learned: Pace, shelf: Shelf, counts: Counts) -> None:
        ladder = task(shelf, width=128, height=128, route="ladder", steps=12, strengths=(0.5,))
        assert [(stage.width, stage.steps) for stage in ladder.stages] == [(64, 12), (128, 6)]
        found = learned.predict(shelf.offer("emoji-sd"), ladder)
        assert found is not None
        assert found.seconds == pytest.approx(12 + 6 * growth(counts, shelf, 128) + 2.5 * 5)

    def test_each_is_learned_from(self, pace: Pace, shelf: Shelf) -> None:
        ladder = task(shelf, width=128, height=128, route="ladder", steps=12, strengths=(0.5,))
        live = Live(lambda progress: None)
        base, upper = ladder.stages
        live.steps = [(base, step, 1.0 * step) for step in range(1, 13)]
        live.steps += [(upper, step, 3.0 * step) for step in range(1, 7)]
        pace.learn(ladder, live, 12 + 18 + 5)
        assert predicted(pace, shelf, steps=3).seconds == pytest.approx(3 + 1)
        assert predicted(pace, shelf, width=128, height=128, steps=3).seconds == pytest.approx(9 + 4)

    def test_a_method_that_rests_in_the_base_is_not_counted_there(
        self, learned: Pace, shelf: Shelf, counts: Counts
    ) -> None:
        fields = {"width": 128, "height": 128, "route": "ladder", "steps": 12, "strengths": (0.5,)}
        found = predicted(learned, shelf, **fields, methods={"hidiffusion": {}})
        ratio = growth(counts, shelf, 128, method="hidiffusion", steps=6)
        assert found.seconds == pytest.approx(12 + 6 * ratio + 2.5 * 5)

    def test_those_taken_from_an_earlier_run_teach_nothing_of_the_whole(self, pace: Pace, shelf: Shelf) -> None:
        ladder = task(shelf, width=128, height=128, route="ladder", steps=12, strengths=(0.5,))
        live = watched(dataclasses.replace(ladder, stages=ladder.stages[1:]))
        pace.learn(ladder, live, 7.0)
        found = pace.predict(shelf.offer("emoji-sd"), ladder)
        assert found is not None
        assert found.basis == "from earlier steps at 128×128"
        assert found.rough, "of the first stage, nothing has run"
        assert 6 < found.seconds < 12


def test_the_last_of_several_runs_is_learned_from(pace: Pace, shelf: Shelf) -> None:
    one = task(shelf, steps=2)
    live = watched(one, first=9.0, each=9.0)
    live.steps += watched(one, each=1.0).steps
    pace.learn(one, live, 2.0)
    assert predicted(pace, shelf, steps=4).seconds == pytest.approx(4)


def test_windows_of_a_long_clip_are_calls_of_their_own(pace: Pace, shelf: Shelf) -> None:
    one = task(shelf, "emoji-video", steps=2)
    pace.learn(one, watched(one), 2.0)
    long = {"frames": 33, "route": "windows", "window": 17, "overlap": 8}
    found = predicted(pace, shelf, "emoji-video", steps=2, **long)
    assert found == Prediction(pytest.approx(2 * 3), "from earlier steps at 96×96, 17 frames", rough=True)


class TestCounts:
    @pytest.mark.parametrize(("model", "method"), [("emoji-sd", "hidiffusion"), ("emoji-flux", "clear")])
    def test_at_one_size_tell_those_at_another(self, shelf: Shelf, model: str, method: str) -> None:
        offer, counts = shelf.offer(model), Counts()
        for side in (128, 256):
            configs = settings.build({method: offer.preset.settings_of(method, side, side)})
            call = counts.call(offer, side, side, None, 2, configs)
        job = task(shelf, model, width=side, height=side, steps=2).job
        cost = attention_cost.cost_of(offer.pipe, offer.preset, job, {method: configs})  # counted at this very size
        assert cost.all_operations is not None
        assert cost.methods[0].most is not None
        assert call.operations == pytest.approx(cost.all_operations / cost.methods[0].most, rel=0.01)

    def test_are_made_once_for_all_sizes(self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
        runs: list[float | None] = []
        count = attention_cost.rehearsal.CallOperations._run

        def counted(self: Any) -> float | None:
            runs.append(count(self))
            return runs[-1]

        monkeypatch.setattr(attention_cost.rehearsal.CallOperations, "_run", counted)
        counts = Counts()
        for side in (128, 256, 64):
            counts.call(shelf.offer("emoji-flux"), side, side, None)
        assert len(runs) == 1

    @pytest.mark.parametrize(("side", "frames"), [(2048, 65), (4096, 257)])
    def test_of_a_huge_clip_are_made_at_once_and_in_little_memory(self, shelf: Shelf, side: int, frames: int) -> None:
        """The masks of AdaSpa would take 73 GB at the first of these sizes, 17.9 TB at the second."""
        counts, offer = Counts(), shelf.offer("emoji-video")
        configs = settings.build({"adaspa": {"block": (16, 16)}})
        small = counts.call(offer, 384, 384, 17, 4, configs)  # at which they are made
        before, started = peak_bytes(torch.device("cpu")), time.perf_counter()
        call = counts.call(offer, side, side, frames, 4, configs)
        assert time.perf_counter() - started < 5
        assert peak_bytes(torch.device("cpu")) - before < 500 * 2**20
        assert call.tokens > 2_000_000
        assert call.share == pytest.approx(small.share, rel=0.02)

    def test_leave_the_model_of_the_offer_alone(self, shelf: Shelf) -> None:
        offer = shelf.offer("emoji-sd")
        before = [dict(vars(module)).keys() for module in offer.pipe.unet.modules()]
        calls: list[str] = []
        hook = offer.pipe.unet.register_forward_pre_hook(lambda *_: calls.append("called"))
        Counts().call(offer, 128, 128, None, 1, settings.build({"hidiffusion": {}}))
        hook.remove()
        assert calls == []
        assert [dict(vars(module)).keys() for module in offer.pipe.unet.modules()] == before

    def test_of_a_model_that_no_call_can_be_told_of_are_tokens(
        self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(*_: Any, **__: Any) -> Any:
            raise attention_cost.UnsupportedModel("its calls are not known")

        monkeypatch.setattr(attention_cost, "arguments_of", refused)
        offer = Offer("emoji-sd", shelf.offer("emoji-sd").model)
        pace = Pace()
        assert pace.counts.call(offer, 128, 64, None).tokens == 32 * 16
        assert pace.counts.call(offer, 128, 64, None).operations is None
        one = task(shelf, steps=2)
        pace.learn(one, watched(one), 2.0)
        large = task(shelf, width=128, height=128, steps=2)
        found = pace.predict(offer, large)
        assert found is not None
        assert found.seconds == pytest.approx(8)


def test_a_preset_is_part_of_what_is_counted(shelf: Shelf) -> None:
    """The text that is joined is as long as the model pads it to."""
    offer = Offer("emoji-flux", shelf.offer("emoji-flux").model)
    assert Counts().call(offer, 128, 128, None).tokens == 256 + (offer.preset.max_sequence_length or 0)
    offer.preset = presets.Preset(max_sequence_length=64)
    assert Counts().call(offer, 128, 128, None).tokens == 256 + 64
