"""A batch whose rows are claimed one by one: what is made, what is left to others, and what is lost to them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from attnswap.pipelines.batch import run as module
from attnswap.pipelines.batch.run import Outcome, run
from attnswap.pipelines.batch.share import Share

Make = Callable[..., Any]
Entries = Callable[[], list[dict[str, Any]]]
Whole = Callable[[Iterable[str]], None]
FOUR = ("a fox", "a cat", "a dog", "a cow")
IDS = ("0001", "0002", "0003", "0004")


class TestClaims:
    MINE = Share(claim=True, worker="me")

    def others(self, out: Path) -> Any:
        from attnswap.pipelines.batch.claims import Claims

        out.mkdir(exist_ok=True)
        return Claims(out)

    def test_a_row_that_others_have_is_left_to_them(
        self, batch: Make, out: Path, calls: Any, assert_whole: Whole, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Until they let it go without a result, which is seen without an end of ours."""
        monkeypatch.setattr(module, "WAIT_SECONDS", 0.2)
        with self.others(out) as claims:
            lease = claims.acquire("0001")
            said: list[str] = []

            def say(text: str) -> None:
                said.append(text)
                if "waiting" in text:
                    lease.release()

            assert run(batch(*FOUR[:3], share=self.MINE), print_line=say).done == 3
        assert calls == [["0002"], ["0003"], ["0001"]]
        assert said[3] == "waiting for 1 row that others have claimed."
        assert_whole(IDS[:3])

    def test_a_row_that_others_finish_meanwhile_is_not_made_again(
        self, batch: Make, out: Path, calls: Any, entries: Entries, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from attnswap.pipelines.batch.journal import Journal

        monkeypatch.setattr(module, "WAIT_SECONDS", 0.2)
        run(batch(*FOUR[:3], share=self.MINE))
        made = entries()
        shutil.rmtree(out)
        calls.clear()
        with self.others(out) as claims:
            lease = claims.acquire("0001")

            def say(text: str) -> None:
                if "waiting" in text:
                    Journal(out, "other").append(made[0])
                    lease.release()

            outcome = run(batch(share=self.MINE), print_line=say)
        assert calls == [["0002"], ["0003"]]
        assert (outcome.done, outcome.others, outcome.left) == (2, 1, 0)
        assert [entry["id"] for entry in entries()] == list(IDS[:3])

    def test_a_row_that_was_lost_to_others_is_not_recorded(
        self, batch: Make, out: Path, entries: Entries, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from attnswap.pipelines.batch.claims import Lease

        asked: list[str] = []

        def held(self: Lease) -> bool:
            """When it is claimed, and no longer when it is made."""
            asked.append(self.name)
            return self.name != "0002" or asked.count("0002") == 1

        monkeypatch.setattr(Lease, "held", held)
        outcome = run(batch(*FOUR[:3], share=self.MINE))
        assert (outcome.done, outcome.others, outcome.left) == (2, 1, 0)
        assert [entry["id"] for entry in entries()] == ["0001", "0003"]

    def test_waiting_ends_when_asked_to(self, batch: Make, out: Path, calls: Any) -> None:
        waiting: list[str] = []
        with self.others(out) as claims:
            assert claims.acquire("0001")
            outcome = run(
                batch("a fox", share=self.MINE),
                print_line=lambda text: waiting.append(text) if "waiting" in text else None,
                stopping=nullcontext(lambda: bool(waiting)),
            )
        assert (outcome.interrupted, outcome.left, calls) == (True, 1, [])

    def test_whoever_joins_does_not_repeat_a_failure_but_who_resumes_does(
        self, batch: Make, calls: Any, poison: None
    ) -> None:
        run(batch("poison", "a fox", share=self.MINE))
        calls.clear()
        joined = Share(claim=True, worker="you")
        assert run(batch(share=joined)) == Outcome(rows=2, before=2)
        assert calls == []
        run(batch(share=joined, resume=True))
        assert calls == [["0001"]]
