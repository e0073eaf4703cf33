"""A batch whose rows are claimed one by one: what is made, what is left to others, and what is lost to them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from attnswap.pipelines import save
from attnswap.pipelines.batch import plan
from attnswap.pipelines.batch import run as module
from attnswap.pipelines.batch.journal import sha256_of
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

    @pytest.mark.parametrize("status", ["done", "failed"])
    def test_a_row_that_others_finish_meanwhile_is_not_made_again(
        self, batch: Make, out: Path, calls: Any, entries: Entries, monkeypatch: pytest.MonkeyPatch, status: str
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
                    Journal(out, "other").append(made[0] | {"status": status})
                    lease.release()

            outcome = run(batch(share=self.MINE), print_line=say)
        assert calls == [["0002"], ["0003"]]
        assert (outcome.done, outcome.left) == (2, 0)
        assert (outcome.others, outcome.others_failed) == ((1, 0) if status == "done" else (0, 1))
        assert [entry["id"] for entry in entries()] == list(IDS[:3])

    @pytest.mark.parametrize("status", ["done", "failed"])
    def test_the_entry_of_a_row_that_was_lost_to_others_is_that_of_the_file(
        self, batch: Make, out: Path, assert_whole: Whole, monkeypatch: pytest.MonkeyPatch, status: str
    ) -> None:
        """It is lost by a suspension in the last moment, and made by others, whose clock is ahead, in the meantime."""
        from attnswap.pipelines.batch.journal import Journal

        write = save.write_png
        given = batch(*FOUR[:2], share=self.MINE)
        rows = {row.file: row for row in plan.read(given.manifest, given.defaults, out)[0]}

        def late(image: Any, path: Path, record: Any) -> None:
            lock = out / ".attnswap-locks" / f"{path.stem}.lock.0"
            past = lock.stat().st_mtime - 100
            os.utime(lock, (past, past))
            theirs = self.others(out).acquire(path.stem)
            assert theirs is not None
            write(image.rotate(90), path, record)
            entry = {"id": path.stem, "row": rows[path].asked, "status": status, "sha256": sha256_of(path)}
            Journal(out, "other").append(entry | {"file": path.name, "time": "2099-01-01T00:00:00+00:00"})
            theirs.release()
            write(image, path, record)

        monkeypatch.setattr(save, "write_png", late)
        assert run(given).failures == {}
        assert_whole(IDS[:2])
        monkeypatch.undo()
        assert run(batch(resume=True)) == Outcome(rows=2, before=2)

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
        assert run(batch(share=joined)) == Outcome(rows=2, before=1, others_failed=1)
        assert calls == []
        run(batch(share=joined, resume=True))
        assert calls == [["0001"]]
