"""Bars that are as long as what they stand for, and can be told apart."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import Any

import pytest
from attnswap.pipelines.compare.figures import Comparison, Outcome

from ...pipelines.compare.cases import comparison

gr = pytest.importorskip("gradio")
from attnswap.demo.pages import charts  # noqa: E402

TIME, MEMORY, DENSITY = charts.FIGURES
# Of pages of Gradio's themes.
WHITE, BLACK = "#ffffff", "#27272a"


@pytest.fixture
def found() -> Comparison:
    """Dense attention took 2 s, both others one; all held 1 GiB."""
    return comparison(names=("linfusion", "hidiffusion+linfusion"))


def bars(update: Any) -> list[tuple[str, float]]:
    """What is drawn: the variant of each bar, and the share of the chart's height that it has."""
    plot = update.value
    bottom, top = update.y_lim
    x, y, colour = (plot["columns"].index(name) for name in ("figure", "value", "variant"))
    order = {label: place for place, label in enumerate(update.sort)}
    rows = sorted(plot["data"], key=lambda row: order[row[x]])
    return [(row[colour], (row[y] - bottom) / (top - bottom)) for row in rows]


def luminance(colour: str) -> float:
    """As WCAG has it."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


class TestBars:
    def test_begin_at_zero_and_are_in_proportion(self, found: Comparison) -> None:
        update = charts.plot(found, TIME)
        assert update.y_lim[0] == 0
        (_, dense), (_, first), (_, second) = bars(update)
        assert first == second == pytest.approx(dense / 2)
        assert 0.85 < dense < 1

    @pytest.mark.parametrize("figure", charts.FIGURES, ids=lambda figure: figure.name)
    def test_have_the_order_of_the_variants_in_every_chart(self, found: Comparison, figure: charts.Figure) -> None:
        assert [name for name, _ in bars(charts.plot(found, figure))] == ["dense", "linfusion", "hidiffusion+linfusion"]

    def test_of_density_have_dense_attention_as_the_whole(self, found: Comparison) -> None:
        assert [share for _, share in bars(charts.plot(found, DENSITY))] == [1, 0.5, 0.5]

    def test_of_more_than_dense_attention_are_seen_whole(self, found: Comparison) -> None:
        """Linear attention over few tokens."""
        found.outcomes[1, "linfusion"] = dataclasses.replace(found.outcomes[1, "linfusion"], density=1.25)
        assert [share for _, share in bars(charts.plot(found, DENSITY))] == [0.8, 1, 0.4]

    def test_are_not_one_where_the_figures_are_the_same(self, found: Comparison) -> None:
        labels = list(charts.table(found, MEMORY)["figure"])
        assert len(set(labels)) == 3
        assert {label.strip(charts.NOTHING) for label in labels} == {"1024"}

    def test_of_what_failed_or_was_not_run_are_missing_and_say_so(self, found: Comparison) -> None:
        found.outcomes[1, "linfusion"] = Outcome(error="out of memory")
        del found.outcomes[1, "hidiffusion+linfusion"]
        rows = charts.table(found, TIME)
        assert [label.strip(charts.NOTHING) for label in rows["figure"]] == ["2.00", "failed", "–"]
        assert rows["value"].isna().tolist() == [False, True, True]
        assert charts.plot(found, TIME).y_lim[0] == 0

    def test_of_nothing_at_all_are_still_a_chart(self, found: Comparison) -> None:
        found.outcomes = {key: Outcome(error="out of memory") for key in found.outcomes}
        assert charts.plot(found, MEMORY).y_lim == [0, None]


class TestColours:
    @pytest.mark.parametrize("page", [WHITE, BLACK])
    def test_stand_out_from_the_page(self, page: str) -> None:
        assert min(contrast(colour, page) for colour in charts.COLOURS) >= 3

    def test_of_a_comparison_of_two_methods_are_apart_without_red_or_green(self) -> None:
        """Those who see neither have blue against yellow, and grey between them, left."""

        def seen(colour: str) -> float:
            red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
            return blue - (red + green) / 2

        assert min(abs(seen(one) - seen(other)) for one, other in combinations(charts.COLOURS[:3], 2)) > 0.2

    def test_are_the_same_in_the_key(self, found: Comparison) -> None:
        key = charts.key(found)
        for name, colour in charts.plot(found, TIME).color_map.items():
            assert f'background: {colour}"></span>{name}</li>' in key

    def test_of_a_key_are_beside_names_that_are_no_markup(self) -> None:
        assert "<b>" not in charts.key(comparison(names=("adaspa <b>",)))
