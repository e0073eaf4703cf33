from __future__ import annotations

import numpy as np
import pytest
from attnswap.benchmarks.chart import COLOURS, SIZE, line_chart
from PIL import ImageColor

WORDS = {"title": "a title", "across": "x", "upwards": "y"}


def where(picture, number: int) -> np.ndarray:
    """`[n, 2]` of (x, y), the pixels in the colour of a series, its mark in the legend excepted."""
    colour = ImageColor.getrgb(COLOURS[number])
    ys, xs = np.nonzero((np.asarray(picture) == colour).all(-1))
    return np.stack([xs, ys], 1)[xs < SIZE[0] - 180]


def test_points_stand_in_the_order_of_their_numbers():
    picture = line_chart({"rising": [(1.0, 5.0), (0.0, 1.0)], "low": [(0.5, 0.0)]}, **WORDS)
    assert picture.size == SIZE
    rising, low = where(picture, 0), where(picture, 1)
    left, right = rising[rising[:, 0].argmin()], rising[rising[:, 0].argmax()]
    assert left[1] > right[1]  # y counts downwards
    assert left[0] < low[:, 0].mean() < right[0]
    assert low[:, 1].min() > rising[:, 1].max()


def test_a_line_joins_points_from_left_to_right_however_they_are_given():
    ordered = [(0.0, 1.0), (1.0, 3.0), (2.0, 2.0)]
    pictures = [np.asarray(line_chart({"any": points}, **WORDS)) for points in (ordered, ordered[::-1])]
    assert np.array_equal(*pictures)


def test_series_are_told_apart_by_colour_and_named():
    one, two = (line_chart({name: [(0.0, 1.0), (1.0, 2.0)] for name in names}, **WORDS) for names in ("a", "ab"))
    assert len(where(two, 1)) > len(where(one, 1)) == 0
    beside = np.s_[:, SIZE[0] - 150 :]
    assert (np.asarray(one)[beside] != np.asarray(two)[beside]).any()


def test_a_single_point_and_equal_numbers_are_drawn_too():
    assert len(where(line_chart({"one": [(3.0, 7.0)]}, **WORDS), 0)) > 0
    assert len(where(line_chart({"flat": [(0.0, 0.0), (1.0, 0.0)]}, **WORDS), 0)) > 100


def test_without_any_point_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match="a title: no point to draw in 2 series"):
        line_chart({"a": [], "b": []}, **WORDS)
