"""What is said of a comparison, and its table."""

from __future__ import annotations

from typing import Any

import pytest
from attnswap.demo.pages import verdict
from attnswap.pipelines.compare.figures import Comparison, Outcome
from attnswap.pipelines.compare.metrics import Likeness

from ...pipelines.compare.cases import comparison

SAME = Likeness(float("inf"), 1.0, float("inf"), 1.0)


def of(frames: int | None = None, **more: Any) -> Comparison:
    """Dense attention took 2 s, adaspa one if no `seconds` are given."""
    found = comparison(frames=frames)
    found.outcomes[1, "adaspa"] = Outcome(**{"file": "a.png", "seconds": 1.0, "peak_bytes": 2**30, **more})
    return found


def said(**more: Any) -> str:
    return "\n".join(verdict.sentences(of(**more)))


class TestSentences:
    @pytest.mark.parametrize(
        ("seconds", "speed"),
        [
            (0.5, "adaspa was 4.0 times as fast as dense attention (0.50 s against 2.00 s)."),
            (1.8, "adaspa was 1.11 times as fast as dense attention (1.80 s against 2.00 s)."),
            (2.05, "adaspa was as fast as dense attention (2.05 s against 2.00 s)."),
            (5.0, "adaspa took 2.5 times as long as dense attention (5.00 s against 2.00 s)."),
        ],
    )
    def test_are_of_the_times_that_were_measured(self, seconds: float, speed: str) -> None:
        assert said(seconds=seconds) == speed

    def test_say_how_much_was_computed_and_where(self) -> None:
        share = "the layers it replaced computed 1.9\N{NO-BREAK SPACE}% of what dense attention computes there."
        assert said(density=0.019).endswith(f"; {share}")

    @pytest.mark.parametrize(
        ("psnr", "likeness"),
        [
            (12.3, "PSNR 12.3 dB: a different picture; judge it by eye."),
            (25.0, "PSNR 25.0 dB: similar; look for the differences."),
            (40.0, "PSNR 40.0 dB: hard to tell apart."),
        ],
    )
    def test_are_of_the_likeness(self, psnr: float, likeness: str) -> None:
        assert likeness in said(likeness=Likeness(psnr, 0.5, psnr, 0.5))

    def test_say_once_which_way_the_psnr_goes(self) -> None:
        two = verdict.sentences(comparison(names=("hidiffusion", "linfusion")))
        assert len(two) == 3
        assert two[-1] == "The higher the PSNR, the closer to the picture of dense attention."
        assert "the closer to the clip" in said(frames=9, likeness=Likeness(25.0, 0.5, 20.0, 0.4))

    def test_of_the_same_picture_need_no_psnr(self) -> None:
        found = said(likeness=SAME, report={"accelerated_calls": 3})
        assert found.endswith(". The picture is the same, to the last pixel.")
        assert "PSNR" not in found

    def test_of_a_method_that_rested_claim_nothing(self) -> None:
        assert said(likeness=SAME, density=1.0, report={"accelerated_calls": 0}) == (
            "adaspa replaced no attention in this run, so it changed nothing; it may do more at a larger size."
        )


def test_the_table_has_the_density_of_dense_attention_as_the_chart_does() -> None:
    table = verdict.table(comparison()).value
    rows = {row[0]: row[1:] for row in table["data"]}
    assert rows["density"] == ["1.00", "0.50"]
    assert rows["speed-up"] == ["–", "2.00x"]


class TestRemarks:
    def test_have_a_line_for_each_kind_of_figure(self) -> None:
        figures = [line.partition(":")[0] for line in verdict.remarks(of())]
        assert figures == ["time", "speed-up", "peak memory", "density", "PSNR, SSIM"]

    def test_of_memory_since_the_start_say_so(self) -> None:
        assert any("since it started" in line for line in verdict.remarks(of(peak_since_start=True)))
