"""Rows come in their order, in company where they can share a call, and never after somebody else has made them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attnswap.pipelines.batch import plan
from attnswap.pipelines.batch.claims import Claims
from attnswap.pipelines.batch.plan import Planned
from attnswap.pipelines.batch.queue import Queue

Rows = Callable[..., tuple[Planned, ...]]


@pytest.fixture
def rows(batch: Any) -> Rows:
    def planned(*given: Any) -> tuple[Planned, ...]:
        asked = batch(*given)
        return plan.read(asked.manifest, asked.defaults, asked.folder)[0]

    return planned


def taken(queue: Queue) -> list[list[str]]:
    groups = []
    while len(queue):
        group, dropped = queue.take()
        assert group or dropped
        groups.append([row.id for row, _ in group])
    return groups


def test_rows_come_in_their_order(rows: Rows) -> None:
    assert taken(Queue(rows("a", "b", "c"))) == [["0001"], ["0002"], ["0003"]]


def test_rows_of_one_method_come_together(rows: Rows) -> None:
    made = rows("a", {"prompt": "b", "method": "hidiffusion"}, "c", {"prompt": "d", "method": "hidiffusion"})
    assert taken(Queue(made)) == [["0001"], ["0003"], ["0002"], ["0004"]]


def test_company_is_as_large_as_is_allowed_and_of_one_shape(rows: Rows) -> None:
    wide = {"prompt": "w", "width": 72}
    guided = {"prompt": "g", "guidance": 3}
    negative = {"prompt": "n", "negative": "x"}
    made = rows("a", wide, "b", "c", guided, negative, wide)
    assert taken(Queue(made, batch_size=2)) == [["0001", "0003"], ["0002", "0007"], ["0004"], ["0005"], ["0006"]]


def test_those_that_failed_together_come_alone_and_first(rows: Rows) -> None:
    queue = Queue(rows("a", "b", "c", "d"), batch_size=2)
    group, _ = queue.take()
    queue.put_back([row for row, _ in group])
    assert len(queue) == 4
    assert taken(queue) == [["0001"], ["0002"], ["0003", "0004"]]


class TestClaims:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "shared").mkdir()
        return tmp_path / "shared"

    def test_rows_of_others_are_left_to_them(self, rows: Rows, folder: Path) -> None:
        with Claims(folder) as others, Claims(folder) as mine:
            held = others.acquire("0002")
            assert held is not None
            queue = Queue(rows("a", "b", "c"), batch_size=3, claims=mine)
            group, _ = queue.take()
            assert [row.id for row, _ in group] == ["0001", "0003"]
            assert queue.take() == ([], [])
            assert len(queue) == 1
            held.release()
            assert taken(queue) == [["0002"]]

    def test_rows_that_others_have_made_are_not_claimed(self, rows: Rows, folder: Path) -> None:
        with Claims(folder) as mine:
            queue = Queue(rows("a", "b"), claims=mine, look=lambda: lambda row: row.id == "0001")
            group, dropped = queue.take()
            assert ([row.id for row, _ in group], [row.id for row in dropped]) == (["0002"], ["0001"])
            assert mine.owner("0001") is None

    def test_a_row_made_between_the_look_and_the_claim_is_not_made_again(self, rows: Rows, folder: Path) -> None:
        looks = iter([False, True])

        def look() -> Callable[[Planned], bool]:
            made = next(looks)
            return lambda row: made

        with Claims(folder) as others, Claims(folder) as mine:
            earlier = others.acquire("0001")
            assert earlier is not None
            earlier.release()
            queue = Queue(rows("a"), claims=mine, look=look)
            group, dropped = queue.take()
            assert (group, [row.id for row in dropped], len(queue)) == ([], ["0001"], 0)
            assert others.acquire("0001") is not None  # it was let go


def test_ten_thousand_rows_cost_little_each(rows: Rows) -> None:
    """Nothing is gone through for every row: twice the rows would take four times as long."""
    import dataclasses
    import time

    [first] = rows("a")
    many = [dataclasses.replace(first, row=dataclasses.replace(first.row, id=f"{n}")) for n in range(10_000)]
    begun = time.process_time()
    assert len(taken(Queue(many, batch_size=4))) == 2500
    assert (time.process_time() - begun) / len(many) < 1e-3
