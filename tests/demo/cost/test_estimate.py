"""What a job will cost, as pages say it before it runs."""

from __future__ import annotations

from typing import Any

import pytest
from attnswap.accel.rehearsal import CallOperations
from attnswap.demo.cost import estimate as cost_estimate
from attnswap.demo.cost.counts import Counts
from attnswap.demo.cost.estimate import Estimate, estimate, of_comparison, prepare
from attnswap.demo.cost.pace import Prediction
from attnswap.demo.server.live import Live, Progress, Stop
from attnswap.demo.site import Site
from attnswap.pipelines import load
from attnswap.pipelines.errors import BadInput, JobFailed
from attnswap.pipelines.session import Session


def of(site: Site, model: str = "emoji-sd", **fields: Any) -> Estimate:
    offer = site.shelf.offer(model)
    return estimate(site, offer, site.shelf.job(offer, **fields))


def learn(site: Site, *, each: float, **fields: Any) -> None:
    """From a run of emoji-sd, all of whose steps took as long."""
    task = of(site, **fields).task
    assert task is not None
    live = Live(lambda progress: None)
    [stage] = task.stages
    live.steps += [(stage, step, each * step) for step in range(1, stage.steps + 1)]
    site.pace.learn(task, live, each * stage.steps)


@pytest.fixture(scope="module")
def counts() -> Counts:
    """Of all tests here: a model is counted once."""
    return Counts()


@pytest.fixture
def site(site: Site, counts: Counts) -> Site:
    site.pace.counts = counts
    return site


@pytest.fixture
def quiet() -> Live:
    return Live(lambda progress: None)


class TestTokens:
    def test_are_compared_with_those_of_the_native_size(self, site: Site) -> None:
        assert of(site).text.startswith("**256 tokens** at 64×64, the native size.")
        assert of(site, width=256, height=256).text.startswith(
            "**4,096 tokens** at 256×256, 16 times as many as at the native size."
        )
        assert of(site, width=128, height=72).text.startswith(
            "**576 tokens** at 128×72, 2.2 times as many as at the native size."
        )
        assert of(site, width=32, height=32).text.startswith(
            "**64 tokens** at 32×32, 25 % of those at the native size."
        )
        assert "as many as at the native size" in of(site, width=128, height=32).text

    def test_are_those_of_the_largest_stage(self, site: Site) -> None:
        assert of(site, width=256, height=256, route="ladder").tokens == 4096

    def test_of_a_clip_are_those_of_all_its_frames_or_of_a_window(self, site: Site) -> None:
        clip = of(site, "emoji-video")
        assert clip.tokens == 9 * 12 * 12
        assert clip.text.startswith("**1,296 tokens** at 96×96, 17 frames, the native size.")
        windows = of(site, "emoji-video", frames=33, route="windows", window=17)
        assert windows.tokens == clip.tokens
        assert windows.text.startswith("**1,296 tokens** at 96×96, 17 frames at a time")


class TestMethods:
    def test_what_is_left_of_dense_attention_is_said(self, site: Site) -> None:
        text = of(site, width=128, height=128, methods={"hidiffusion": {}}).text
        assert "hidiffusion leaves 24 % of the self-attention in the whole model." in text

    def test_one_that_rests_at_this_size_is_said_to(self, site: Site) -> None:
        assert "hidiffusion has nothing to do at this size." in of(site, methods={"hidiffusion": {}}).text

    def test_several_are_named_together(self, site: Site) -> None:
        text = of(site, width=128, height=128, methods={"hidiffusion": {}, "linfusion": {}}).text
        assert "hidiffusion + linfusion leave 1.6 % of" in text

    def test_what_auto_chooses_is_named(self, site: Site) -> None:
        assert "auto chooses dense attention." in of(site, methods={"auto": {}}).text
        larger = of(site, width=128, height=128, methods={"auto": {}})
        assert "auto chooses hidiffusion, which leaves 24 % of" in larger.text
        assert larger.task is not None
        assert list(larger.task.job.methods) == ["hidiffusion"]

    def test_without_there_is_nothing_to_say(self, site: Site) -> None:
        assert "attention" not in of(site, width=128, height=128).text


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"width": 100}, "width 100 is not a multiple of 8"),
            ({"width": 264}, "width 264 is more than this server allows"),
            ({"prompt": "a" * 201}, "201 characters"),
            ({"methods": {"clear": {}}}, "clear"),
            ({"frames": 9}, "makes pictures, not clips"),
        ],
    )
    def test_are_those_of_the_job(self, site: Site, fields: dict[str, Any], says: str) -> None:
        with pytest.raises(BadInput, match=says):
            of(site, **fields)


class TestTime:
    def test_is_not_known_before_anything_has_run(self, site: Site) -> None:
        first = of(site)
        assert first.seconds is None
        assert first.text.endswith("The first run will tell how long.")

    @pytest.mark.parametrize("model", ["emoji-sd", "emoji-video"])
    def test_is_told_from_steps_that_leave_nothing_behind(self, site: Site, model: str, quiet: Live) -> None:
        before = list(site.folder.iterdir())
        prepare(site, site.shelf.offer(model), quiet)
        assert list(site.folder.iterdir()) == before
        known = of(site, model)
        assert known.seconds is not None
        size = "96×96, 17 frames" if model == "emoji-video" else "64×64"
        assert known.text.endswith(f" s (from earlier steps at {size}).")
        assert "About" in known.text

    def test_the_model_is_not_counted_again_for_another_size(
        self, site: Site, quiet: Live, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prepare(site, site.shelf.offer("emoji-sd"), quiet)
        monkeypatch.setattr(CallOperations, "_run", lambda self: pytest.fail("it was counted again"))
        seconds = [of(site, width=side, height=side).seconds or 0 for side in (64, 128, 256)]
        assert seconds == sorted(seconds)

    def test_of_another_size_is_said_to_be_rough(self, site: Site) -> None:
        learn(site, steps=2, each=3.4)
        assert of(site, width=128, height=128, steps=5).text.endswith(" min (from earlier steps at 64×64).")
        assert of(site, steps=4).text.endswith("About 14 s (from earlier steps at 64×64).")
        assert of(site, steps=2).text.endswith("About 7 s (like the last such run).")

    @pytest.mark.parametrize(
        ("seconds", "said"),
        [(0.2, "1 s"), (17, "20 s"), (84, "80 s"), (140, "2 min"), (960, "20 min"), (9000, "2 h"), (50_000, "10 h")],
    )
    def test_a_rough_one_is_of_one_digit(
        self, site: Site, monkeypatch: pytest.MonkeyPatch, seconds: float, said: str
    ) -> None:
        predicted = Prediction(seconds, "from earlier steps at 64×64", rough=True)
        monkeypatch.setattr(site.pace, "predict", lambda *_: predicted)
        assert of(site).text.endswith(f"Roughly {said} (from earlier steps at 64×64).")

    def test_no_weights_are_read_for_it(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(load, "load", lambda *_, **__: pytest.fail("the model was loaded"))
        assert of(site, "emoji-flux", methods={"auto": {}}, width=256, height=256).tokens == 1040


class TestOfAComparison:
    METHODS = ({"hidiffusion": {}}, {"linfusion": {}})

    def test_all_runs_and_their_warm_ups_are_in_it(self, site: Site) -> None:
        """Of two steps, on a CPU."""
        learn(site, steps=2, each=3.0)
        offer = site.shelf.offer("emoji-sd")
        job = site.shelf.job(offer, width=128, height=128, steps=4)
        alone = [of(site, width=128, height=128, steps=4, methods=each).seconds or 0 for each in ({}, *self.METHODS)]
        assert alone[1] < alone[0] > 60
        minutes = 1.5 * sum(alone) / 60
        assert of_comparison(site, offer, job, self.METHODS) == (
            f"That is for dense attention alone; roughly {minutes:.1g} min for all runs, each with its warm-up."
        )

    def test_nothing_is_said_before_anything_has_run(self, site: Site) -> None:
        offer = site.shelf.offer("emoji-sd")
        assert of_comparison(site, offer, site.shelf.job(offer), self.METHODS) == ""


class TestPreparing:
    def test_is_told_of(self, site: Site) -> None:
        said: list[Progress] = []
        prepare(site, site.shelf.offer("emoji-sd"), Live(said.append))
        texts = [progress.text for progress in said]
        assert texts[0] == "loading emoji-sd"
        assert list(dict.fromkeys(text for text in texts if text.startswith("timing")))[:2] == [
            "timing emoji-sd at 32×32",
            "timing emoji-sd at 64×64",
        ]

    @pytest.mark.parametrize(
        ("seconds", "timed"),
        [
            (0.2, [(0.5, 1), (0.5, 3), (1, 3), (2, 3)]),
            (5.0, [(0.5, 1), (0.5, 3), (1, 3)]),
            (60.0, [(0.5, 1), (0.5, 3)]),
            (0.0, [(0.5, 1), (0.5, 3), (1, 3)]),  # where it cannot run
        ],
    )
    def test_is_no_longer_than_the_model_is_fast(
        self,
        site: Site,
        quiet: Live,
        monkeypatch: pytest.MonkeyPatch,
        seconds: float,
        timed: list[tuple[float, int]],
    ) -> None:
        done: list[tuple[float, int]] = []

        def took(*arguments: Any, steps: int = 3) -> float:
            done.append((arguments[-1], steps))
            return seconds

        monkeypatch.setattr(cost_estimate, "_timed", took)
        prepare(site, site.shelf.offer("emoji-sd"), quiet)
        assert done == timed

    def test_runs_nothing_where_the_model_is_known(
        self, site: Site, quiet: Live, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        offer = site.shelf.offer("emoji-sd")
        prepare(site, offer, quiet)
        monkeypatch.setattr(Session, "make", lambda *_, **__: pytest.fail("it ran again"))
        prepare(site, offer, quiet)

    def test_can_be_stopped(self, site: Site) -> None:
        offer = site.shelf.offer("emoji-sd")
        site.shelf.session(offer)
        before = list(site.folder.iterdir())
        live = Live(lambda progress: None, lambda: bool(live.steps))
        with pytest.raises(Stop):
            prepare(site, offer, live)
        assert len(live.steps) == 1
        assert list(site.folder.iterdir()) == before
        assert not site.pace.knows(offer)

    def test_what_fails_in_timing_is_left_to_the_job(
        self, site: Site, quiet: Live, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def failed(*_: Any, **__: Any) -> Any:
            raise JobFailed("out of memory")

        monkeypatch.setattr(Session, "make", failed)
        offer = site.shelf.offer("emoji-sd")
        prepare(site, offer, quiet)
        assert not site.pace.knows(offer)
        assert of(site).seconds is None
