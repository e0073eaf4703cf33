"""Medians, speed-ups and what is said of them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from attnswap.pipelines.compare import page, text
from attnswap.pipelines.compare.figures import Comparison, Outcome
from attnswap.pipelines.compare.metrics import Likeness
from attnswap.pipelines.compare.variants import Variant

from .cases import comparison

IDENTICAL = Likeness(math.inf, 1.0, math.inf, 1.0)


def change(found: Comparison, number: int, name: str, **values: object) -> None:
    found.outcomes[number, name] = dataclasses.replace(found.outcomes[number, name], **values)


def remark(found: Comparison, figure: str) -> str:
    """What is to be known of a column of the table."""
    [line] = [line for line in text.remarks(found) if line.startswith(f"{figure}: ")]
    return line


@pytest.fixture
def found() -> Comparison:
    """Three prompts, two variants beside dense attention."""
    return comparison(("a fox", "an owl", "a bee"), ("adaspa", "clear"))


class TestSummary:
    def test_has_the_median_over_all_shots(self, found: Comparison) -> None:
        for number, seconds in enumerate((1.0, 9.0, 4.0), 1):
            change(found, number, "adaspa", seconds=seconds)
        assert found.summary(found.variants[1]).seconds == 4.0
        assert found.summary(found.variants[1]).speedup == 0.5

    def test_speed_up_counts_only_what_dense_attention_made_as_well(self, found: Comparison) -> None:
        found.outcomes[1, "dense"] = found.outcomes[2, "dense"] = Outcome(error="out of memory")
        change(found, 3, "adaspa", seconds=4.0)
        assert found.summary(found.variants[1]).speedup == 0.5
        found.outcomes[3, "dense"] = Outcome(error="out of memory")
        assert found.summary(found.variants[1]).speedup is None

    def test_memory_is_the_highest_peak_and_the_worst_frame_that_of_all(self, found: Comparison) -> None:
        change(found, 2, "adaspa", peak_bytes=5 * 2**30, likeness=Likeness(29.0, 0.9, 11.0, 0.2))
        summary = found.summary(found.variants[1])
        assert (summary.peak_bytes, summary.worst_psnr, summary.worst_ssim) == (5 * 2**30, 11.0, 0.2)

    def test_counts_what_failed_and_what_is_identical(self, found: Comparison) -> None:
        found.outcomes[1, "adaspa"] = Outcome(error="not-a-number")
        change(found, 2, "adaspa", likeness=IDENTICAL)
        summary = found.summary(found.variants[1])
        assert (summary.made, summary.failed, summary.identical, summary.error) == (2, 1, 1, "not-a-number")


class TestJson:
    def test_holds_every_figure_and_nothing_that_json_lacks(self, found: Comparison) -> None:
        change(found, 1, "clear", likeness=IDENTICAL)
        found.outcomes[2, "clear"] = Outcome(error="out of memory")
        del found.outcomes[3, "clear"]
        document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        first, second, third = (shot["outcomes"][2] for shot in document["shots"])
        assert first["likeness"] == {
            "psnr": None,
            "ssim": 1.0,
            "worst_psnr": None,
            "worst_ssim": 1.0,
            "identical": True,
        }
        assert second == {"variant": "clear", "error": "out of memory"}
        assert third == {"variant": "clear", "error": "not run"}
        assert document["shots"][0]["outcomes"][1]["likeness"]["psnr"] == 30.0
        assert document["shots"][0]["outcomes"][1]["speedup"] == 2.0
        assert document["interrupted"]


class TestTable:
    def test_columns_stand_one_below_the_other_whatever_the_names(self) -> None:
        names = ["clear weights=/模型/很长", "adaspa sparsity=0.9", "a" * 300, "linfusion é"]
        found = comparison(names=names)
        lines = text.report(found).splitlines()
        table = lines[2 : 3 + len(found.variants)]
        assert {text.width(line) for line in table} == {text.width(table[0])}
        starts = {text.width(line[: line.index(" s ")]) for line in table[1:]}
        assert len(starts) == 1
        assert max(map(text.width, table)) <= text.WIDTH

    def test_every_variant_has_its_line(self, found: Comparison) -> None:
        rows = [line.split() for line in text.report(found).splitlines()]
        assert ["dense", "2.00", "s", "–", "1024", "MiB", "–", "–", "–"] in rows
        assert ["adaspa", "1.00", "s", "2.00x", "1024", "MiB", "0.50", "30.0", "dB", "0.900"] in rows

    def test_a_variant_that_failed_says_why(self, found: Comparison) -> None:
        found.outcomes[2, "clear"] = Outcome(error="out of memory\n\x1b[31m at 64x64")
        said = text.report(found)
        assert "clear: failed in 1 of 3: out of memory [31m at 64x64" in said
        assert "\x1b" not in said

    def test_without_dense_attention_there_is_no_likeness_and_that_is_said(self, found: Comparison) -> None:
        for shot in found.shots:
            found.outcomes[shot.number, "dense"] = Outcome(error="out of memory")
            change(found, shot.number, "adaspa", likeness=None)
        said = text.report(found)
        assert "dense attention failed, so there is nothing to compare with" in said
        assert "dense  " not in said

    def test_identical_pictures_are_called_so(self, found: Comparison) -> None:
        for shot in found.shots:
            change(found, shot.number, "adaspa", likeness=IDENTICAL)
        (row,) = [line for line in text.report(found).splitlines() if line.startswith("adaspa")]
        assert row.split()[-2:] == ["identical", "1.0000"]

    def test_most_of_them_identical_is_not_all(self, found: Comparison) -> None:
        for number in (1, 2):
            change(found, number, "adaspa", likeness=IDENTICAL)
        (row,) = [line for line in text.report(found).splitlines() if line.startswith("adaspa")]
        assert row.split()[-5:] == ["2", "of", "3", "identical", "1.0000"]

    def test_says_how_many_runs_an_interrupt_left(self, found: Comparison) -> None:
        assert "interrupted" not in text.report(found)
        del found.outcomes[3, "clear"]
        assert "interrupted after 8 of 9 runs" in text.report(found)

    def test_says_where_memory_is_that_since_the_start(self, found: Comparison) -> None:
        assert "during the run" in remark(found, "peak memory")
        change(found, 1, "dense", peak_since_start=True)
        assert "since it started" in remark(found, "peak memory")

    def test_explains_every_column(self, found: Comparison) -> None:
        for shown in (found, comparison(frames=9, fps="8")):
            explained = ", ".join(line.partition(":")[0] for line in text.remarks(shown))
            assert explained == ", ".join(text.headings(shown)[1:])

    def test_clips_have_their_worst_frame(self) -> None:
        found = comparison(frames=9, fps="8")
        (row,) = [line for line in text.report(found).splitlines() if line.startswith("adaspa")]
        assert row.split()[-3:] == ["28.0", "dB", "0.800"]

    def test_clips_whose_worst_frame_is_identical_have_no_number_for_it(self) -> None:
        found = comparison(frames=9, fps="8")
        change(found, 1, "adaspa", likeness=IDENTICAL)
        (row,) = [line for line in text.report(found).splitlines() if line.startswith("adaspa")]
        assert row.split()[-4:] == ["identical", "1.0000", "identical", "1.0000"]

    def test_what_auto_says_of_its_choice_is_said_once(self, tmp_path: Path) -> None:
        found = comparison(names=("auto: dense",))
        found.variants = (found.variants[0], Variant("auto: dense", {"auto": {}}))
        change(found, 1, "auto: dense", notes=("auto: dense attention: 256 tokens.", "in another dtype."), file=None)
        change(found, 1, "dense", file=None)
        for said in (text.report(found), page.render(found, tmp_path)):
            assert said.count("auto: dense attention: 256 tokens.") == 1
            assert "auto: dense: auto" not in said
            assert "auto: dense: in another dtype." in said


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (text.seconds(9.994), "9.99 s"),
        (text.seconds(9.996), "10.0 s"),
        (text.seconds(123.4), "123 s"),
        (text.memory(12 * 2**30), "12.0 GiB"),
        (text.share(0.0312), "0.031"),
        (text.similarity(0.99961), "0.9996"),
        (text.decibels(None), "–"),
        (text.decibels(math.inf), "identical"),
        (text.shortened("狐" * 10_000, 5), "狐狐…"),
    ],
)
def test_figures_read_well(said: str, wanted: str) -> None:
    assert said == wanted
