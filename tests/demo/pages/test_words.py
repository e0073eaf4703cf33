"""What is said of real runs of the models that come with attnswap."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attnswap.demo.pages import words
from attnswap.demo.server.visitors import Visitor
from attnswap.pipelines.job import Job
from attnswap.pipelines.session import Result, Session


@pytest.fixture(scope="module")
def sessions() -> Iterator[dict[str, Session]]:
    opened: dict[str, Session] = {}
    yield opened
    for session in opened.values():
        session.close()


@pytest.fixture
def make(sessions: dict[str, Session], tmp_path: Path) -> Any:
    """A result: `make("emoji-sd", "hidiffusion", width=128, height=128)`."""

    def made(model: str, *methods: str, steps: int = 2, **more: Any) -> Result:
        if model not in sessions:
            sessions[model] = Session(Job("", model=model))
        session = sessions[model]
        output = tmp_path / ("made.mp4" if model == "emoji-video" else "made.png")
        chosen: dict[str, Any] = {method: {} for method in methods}
        job = Job("a fox", model=model, methods=chosen, steps=steps, **{"output": output, **more})
        [result] = session.make([session.plan(job)])
        return result

    return made


class TestAcceleration:
    def test_of_a_dense_run_is_none(self, make: Any) -> None:
        result = make("emoji-sd")
        assert words.acceleration(result) == ["Nothing was accelerated: the model ran as it is, with dense attention."]

    def test_names_the_layers_and_the_share_that_was_computed(self, make: Any) -> None:
        said = words.acceleration(make("emoji-sd", "linfusion"))
        assert said == [
            "linfusion replaced 16 of 32 attention layers; "
            "these computed 7.7 % of what dense attention computes there.",
            "Left dense: 16 layers (attention to the prompt or the like, not within the picture). See Inside.",
        ]

    def test_of_hidiffusion_tells_of_the_smaller_maps_and_of_the_layers_it_leaves(self, make: Any) -> None:
        said = words.acceleration(make("emoji-sd", "hidiffusion", width=128, height=128))
        assert "replaced 5 of 32 attention layers; these computed 25 % of" in said[0]
        assert said[1].startswith("In 2 of 2 steps, hidiffusion also shrank the feature maps deep in the U-Net")
        assert "11 layers (deeper level, where windows save little)" in said[2]

    def test_says_why_a_method_rested_at_the_native_size(self, make: Any) -> None:
        said = words.acceleration(make("emoji-sd", "hidiffusion"))[0]
        assert said.startswith("hidiffusion rested and nothing was accelerated, because the size is about that which")

    def test_says_of_two_methods_which_one_rested(self, make: Any) -> None:
        said = words.acceleration(make("emoji-sd", "hidiffusion", "linfusion"))
        assert said[0].startswith("hidiffusion and linfusion replaced 16 of 32 attention layers")
        assert said[1].startswith("hidiffusion rested at a latent of 16x16, because the size is about")

    def test_says_why_too_few_tokens_stayed_dense(self, make: Any) -> None:
        said = words.acceleration(make("emoji-flux", "adaspa"))[0]
        assert "because attention over 272 tokens ran dense: min_tokens is 4096" in said

    def test_counts_the_calls_before_a_search_as_dense(self, make: Any) -> None:
        said = words.acceleration(make("emoji-video", "adaspa", steps=4))
        assert said[0].startswith("adaspa replaced 6 of 12 attention layers")
        assert said[0].endswith(" there. 12 of 48 calls of them ran dense.")
        assert said[1] == "It searches at steps 1, 2 of 4, dense in the first step."

    def test_says_what_auto_chose_and_why_and_no_more_of_it(self, make: Any) -> None:
        result = make("emoji-flux", "auto")
        [said] = words.acceleration(result)
        assert said.startswith("auto chose dense attention: 256 image tokens")
        assert words.others(result) == []

    def test_counts_a_layer_once_though_a_route_has_two_sets_of_methods(self, make: Any) -> None:
        result = make("emoji-flux", "clear", width=256, height=256, route="ladder")
        assert words.acceleration(result)[0].startswith("clear replaced 8 of 8 attention layers")
        assert words.others(result) == ["The base (stage 1/2) runs without clear: only larger pictures need it."]


def test_the_headline_has_what_was_made_with_what_and_how_long_it_took(make: Any) -> None:
    result = dataclasses.replace(make("emoji-sd"), seconds=1.234)
    assert words.headline(result) == "Done in 1.23 s with dense attention: 64×64, 2 steps, seed 0."


def test_the_headline_of_a_clip_has_its_frames(make: Any) -> None:
    assert "96×96, 17 frames at 8 a second, 1 step, seed 0" in words.headline(make("emoji-video", steps=1))


class TestCost:
    def test_says_what_the_memory_is_of(self, make: Any) -> None:
        result = dataclasses.replace(make("emoji-sd"), seconds=2.0, peak_bytes=600 * 2**20, peak_since_start=False)
        said = words.cost(result)
        assert said.endswith("Memory: 600 MiB at most, of this whole program, models included.")
        assert said.startswith("The time is of denoising and decoding, on ")

    def test_says_where_the_memory_was_not_measured_from_the_start_of_the_run(self, make: Any) -> None:
        result = dataclasses.replace(make("emoji-sd"), peak_since_start=True)
        assert words.cost(result).endswith(", the most since it started.")

    def test_is_silent_on_memory_that_is_not_known(self, make: Any) -> None:
        assert "Memory" not in words.cost(dataclasses.replace(make("emoji-sd"), peak_bytes=None))


class TestWhatIsShown:
    def test_is_no_markup_of_anybody_and_names_no_folder(self, make: Any) -> None:
        notice = "/secret/folder/cat.png is 8x8, <b>stretched</b> to *64x64*"
        said = words.explained(dataclasses.replace(make("emoji-sd"), notices=(notice,)))
        assert r"cat.png is 8x8, \<b\>stretched\</b\> to \*64x64\*." in said
        assert "secret" not in said

    def test_ends_with_the_cost(self, make: Any) -> None:
        assert words.explained(make("emoji-sd")).splitlines()[-1].startswith("- The time is of ")


def test_the_details_are_the_record_with_figures(make: Any, tmp_path: Path) -> None:
    visitor = Visitor("a", tmp_path)
    result = make("emoji-sd", "linfusion", output=visitor.new_file(".png", Job("a fox")))
    found = words.details(visitor.keep(result))
    assert found["entry"] == 1
    assert {name: found[name] for name in result.record} == result.record
    assert found["seconds"] == result.seconds
    assert found["report"]["density"] == result.report.density
