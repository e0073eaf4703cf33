"""How long a job will take, told from what ran before it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
from attnswap.demo.cost.counts import Counts
from attnswap.demo.cost.pace import RUNS, Pace
from attnswap.demo.server.live import Live
from attnswap.demo.server.shelf import Offer, Shelf
from attnswap.pipelines import attention_cost, presets, settings
from attnswap.pipelines.errors import BadInput
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


def predicted(pace: Pace, shelf: Shelf, model: str = "emoji-sd", **fields: Any) -> tuple[float, str]:
    seconds, said = pace.predict(shelf.offer(model), task(shelf, model, **fields))
    assert seconds is not None
    return seconds, said


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
        assert pace.predict(shelf.offer("emoji-sd"), task(shelf)) == (None, "")
        assert not pace.knows(shelf.offer("emoji-sd"))

    def test_nor_from_another_model(self, learned: Pace, shelf: Shelf) -> None:
        assert learned.predict(shelf.offer("emoji-flux"), task(shelf, "emoji-flux")) == (None, "")
        assert learned.knows(shelf.offer("emoji-sd"))


class TestOfTheSameSize:
    def test_a_run_of_the_same_kind_takes_as_long_whatever_its_prompt_and_seed(
        self, learned: Pace, shelf: Shelf
    ) -> None:
        assert predicted(learned, shelf, steps=2, prompt="a fox", seed=7) == (4.5, "as the last run of this kind")

    def test_more_steps_take_longer_and_nothing_else_does(self, learned: Pace, shelf: Shelf) -> None:
        """Two seconds before the first step, one for each, half a second after the last."""
        assert predicted(learned, shelf, steps=10) == (pytest.approx(2 + 10 + 0.5), "from 2 steps at 64×64")

    def test_without_guidance_there_is_one_call_a_step(self, learned: Pace, shelf: Shelf) -> None:
        assert predicted(learned, shelf, steps=10, guidance=1.0)[0] == pytest.approx(2 + 5 + 0.5)

    def test_a_run_of_one_step_is_enough(self, pace: Pace, shelf: Shelf) -> None:
        one = task(shelf, steps=1)
        pace.learn(one, watched(one, first=3.0), 3.5)
        assert predicted(pace, shelf, steps=2) == (pytest.approx(6.5), "from 1 step at 64×64")

    def test_the_first_run_of_a_process_which_warms_up_counts_no_longer_after_another(
        self, learned: Pace, shelf: Shelf
    ) -> None:
        again = task(shelf, steps=2)
        learned.learn(again, watched(again, first=0.6, each=0.5), 1.2)
        assert predicted(learned, shelf, steps=2)[0] == 1.2
        assert predicted(learned, shelf, steps=10)[0] == pytest.approx(0.1 + 5 + 0.1)

    def test_a_run_that_was_held_up_counts_little(self, pace: Pace, shelf: Shelf) -> None:
        one = task(shelf, steps=2)
        for each in (1.0, 9.0, 1.1):
            pace.learn(one, watched(one, each=each), 2 * each)
        assert predicted(pace, shelf, steps=2)[0] == 2.2

    def test_what_is_long_past_counts_no_longer(self, learned: Pace, shelf: Shelf) -> None:
        again = task(shelf, steps=2)
        for _ in range(RUNS):
            learned.learn(again, watched(again, first=9.0, each=9.0), 18.0)
        assert predicted(learned, shelf, steps=2)[0] == 18.0


@functools.cache
def operations(shelf: Shelf, side: int, *, model: str = "emoji-sd", method: str = "", steps: int = 10) -> float:
    """Of a call, counted at this very size."""
    offer = shelf.offer(model)
    configs = settings.build({method: offer.preset.settings_of(method, side, side)}) if method else []
    job = task(shelf, model, width=side, height=side, steps=steps).job
    cost = attention_cost.cost_of(offer.pipe, offer.preset, job, {method: configs} if method else {})
    assert cost.all_operations is not None
    return cost.all_operations / (cost.methods[0].most or 1.0) if method else cost.all_operations


class TestOfAnotherSize:
    def test_steps_take_as_much_longer_as_they_compute_and_decoding_by_the_pixel(
        self, learned: Pace, shelf: Shelf
    ) -> None:
        ratio = operations(shelf, 192) / operations(shelf, 64)
        assert ratio > 10, "of nine times the pixels"
        seconds, said = predicted(learned, shelf, width=192, height=192, steps=10)
        assert seconds == pytest.approx(2 + 10 * ratio + 0.5 * 9, rel=0.02)
        assert said == "from 2 steps at 64×64"

    def test_a_method_takes_off_what_it_need_not_compute(self, learned: Pace, shelf: Shelf) -> None:
        ratio = operations(shelf, 128, method="hidiffusion") / operations(shelf, 64)
        seconds, said = predicted(learned, shelf, width=128, height=128, steps=10, methods={"hidiffusion": {}})
        assert seconds == pytest.approx(2 + 10 * ratio + 0.5 * 4, rel=0.02)
        assert said == "from 2 steps with dense attention at 64×64"

    def test_what_was_measured_with_the_same_method_comes_first(self, learned: Pace, shelf: Shelf) -> None:
        known = task(shelf, width=96, height=96, steps=4, methods={"hidiffusion": {}})
        learned.learn(known, watched(known, each=5.0), 20.0)
        said = {
            name: predicted(learned, shelf, width=128, height=128, steps=4, methods={name: {}} if name else {})[1]
            for name in ("hidiffusion", "linfusion", "")
        }
        assert said == {
            "hidiffusion": "from 4 steps at 96×96",
            "linfusion": "from 2 steps with dense attention at 64×64",
            "": "from 2 steps at 64×64",
        }

    def test_then_what_computes_about_as_much(self, learned: Pace, shelf: Shelf) -> None:
        large = task(shelf, width=192, height=192, steps=4)
        learned.learn(large, watched(large, each=5.0), 20.0)
        assert predicted(learned, shelf, width=184, height=184, steps=4)[1] == "from 4 steps at 192×192"
        assert predicted(learned, shelf, width=72, height=72, steps=4)[1] == "from 2 steps at 64×64"

    def test_a_method_that_cannot_act_there_is_said_at_once(self, pace: Pace, shelf: Shelf) -> None:
        one = task(shelf, "emoji-video", steps=2)
        pace.learn(one, watched(one), 2.0)
        late = {"adaspa": {"search_steps": (0, 10)}}
        with pytest.raises(BadInput, match="adaspa: "):
            predicted(pace, shelf, "emoji-video", steps=4, methods=late)


class TestOfStages:
    def test_each_takes_its_own_time(self, learned: Pace, shelf: Shelf) -> None:
        ladder = task(shelf, width=128, height=128, route="ladder", steps=12, strengths=(0.5,))
        assert [(stage.width, stage.steps) for stage in ladder.stages] == [(64, 12), (128, 6)]
        ratio = operations(shelf, 128) / operations(shelf, 64)
        seconds, _ = learned.predict(shelf.offer("emoji-sd"), ladder)
        assert seconds == pytest.approx(2 + 12 + 6 * ratio + 0.5 * 5, rel=0.02)

    def test_each_is_learned_from(self, pace: Pace, shelf: Shelf) -> None:
        ladder = task(shelf, width=128, height=128, route="ladder", steps=12, strengths=(0.5,))
        live = Live(lambda progress: None)
        base, upper = ladder.stages
        live.steps = [(base, step, 1.0 * step) for step in range(1, 13)]
        live.steps += [(upper, step, 3.0 * step) for step in range(1, 7)]
        pace.learn(ladder, live, 12 + 18 + 5)
        assert predicted(pace, shelf, steps=3)[0] == pytest.approx(3 + 1)
        assert predicted(pace, shelf, width=128, height=128, steps=3)[0] == pytest.approx(9 + 4)

    def test_a_method_that_rests_in_the_base_is_not_counted_there(self, learned: Pace, shelf: Shelf) -> None:
        fields = {"width": 128, "height": 128, "route": "ladder", "steps": 12, "strengths": (0.5,)}
        ladder = task(shelf, **fields, methods={"hidiffusion": {}})
        seconds, _ = learned.predict(shelf.offer("emoji-sd"), ladder)
        ratio = operations(shelf, 128, method="hidiffusion", steps=6) / operations(shelf, 64)
        assert seconds == pytest.approx(2 + 12 + 6 * ratio + 0.5 * 5, rel=0.02)

    def test_those_taken_from_an_earlier_run_teach_nothing_of_the_whole(self, pace: Pace, shelf: Shelf) -> None:
        ladder = task(shelf, width=128, height=128, route="ladder", steps=12, strengths=(0.5,))
        live = watched(dataclasses.replace(ladder, stages=ladder.stages[1:]))
        pace.learn(ladder, live, 7.0)
        seconds, said = pace.predict(shelf.offer("emoji-sd"), ladder)
        assert said == "from 6 steps at 128×128"
        assert seconds is not None
        assert 6 < seconds < 12


def test_the_last_of_several_runs_is_learned_from(pace: Pace, shelf: Shelf) -> None:
    one = task(shelf, steps=2)
    live = watched(one, first=9.0, each=9.0)
    live.steps += watched(one, each=1.0).steps
    pace.learn(one, live, 2.0)
    assert predicted(pace, shelf, steps=4)[0] == pytest.approx(4)


def test_windows_of_a_long_clip_are_calls_of_their_own(pace: Pace, shelf: Shelf) -> None:
    one = task(shelf, "emoji-video", steps=2)
    pace.learn(one, watched(one), 2.0)
    long = {"frames": 33, "route": "windows", "window": 17, "overlap": 8}
    seconds, said = predicted(pace, shelf, "emoji-video", steps=2, **long)
    assert seconds == pytest.approx(2 * 3)
    assert said == "from 2 steps at 96×96, 17 frames"


class TestCounts:
    @pytest.mark.parametrize(
        ("model", "method", "sides"),
        [("emoji-sd", "", (64, 200)), ("emoji-sd", "hidiffusion", (128, 256)), ("emoji-flux", "clear", (128, 256))],
    )
    def test_at_one_size_tell_those_at_another(
        self, shelf: Shelf, model: str, method: str, sides: tuple[int, int]
    ) -> None:
        offer, counts = shelf.offer(model), Counts()
        for side in sides:
            configs = settings.build({method: offer.preset.settings_of(method, side, side)}) if method else []
            call = counts.call(offer, side, side, None, 10, configs)
            assert call.operations == pytest.approx(operations(shelf, side, model=model, method=method), rel=0.01)

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

    def test_leave_the_model_of_the_offer_alone(self, shelf: Shelf) -> None:
        offer = shelf.offer("emoji-sd")
        before = [dict(vars(module)).keys() for module in offer.pipe.unet.modules()]
        calls: list[str] = []
        hook = offer.pipe.unet.register_forward_pre_hook(lambda *_: calls.append("called"))
        Counts().call(offer, 128, 128, None, 4, settings.build({"hidiffusion": {}}))
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
        assert pace.predict(offer, large)[0] == pytest.approx(8)


def test_a_preset_is_part_of_what_is_counted(shelf: Shelf) -> None:
    """The text that is joined is as long as the model pads it to."""
    offer = Offer("emoji-flux", shelf.offer("emoji-flux").model)
    assert Counts().call(offer, 128, 128, None).tokens == 256 + (offer.preset.max_sequence_length or 0)
    offer.preset = presets.Preset(max_sequence_length=64)
    assert Counts().call(offer, 128, 128, None).tokens == 256 + 64
