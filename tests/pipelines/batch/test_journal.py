"""What has become of each row is known after any kill, and whoever merges loses nothing."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from attnswap.pipelines.batch.journal import Journal, sha256_of

PRELUDE = """
import os, sys, time
from pathlib import Path
from attnswap.pipelines.batch.journal import Journal
folder = Path(sys.argv[1])

def entry(id, second=0):
    return {"id": id, "status": "done", "file": id + ".png", "time": f"2026-01-01T00:00:{second:02}+00:00"}

def say(*words):
    print(*words, flush=True)
"""


def entry(id: str, second: int = 0, **more: Any) -> dict[str, Any]:
    return {"id": id, "status": "done", "time": f"2026-01-01T00:00:{second:02}+00:00", **more}


def start(script: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PRELUDE + script, str(folder)], stdout=subprocess.PIPE, text=True)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, *entries: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in entries)


def test_an_entry_survives_the_file(tmp_path: Path) -> None:
    given = entry("ein Füchslein 🦊", error='a "quote",\nlines and a \u2028', seconds=1.5, report=None)
    Journal(tmp_path).append(given)
    assert Journal(tmp_path).latest() == {given["id"]: given}
    assert (tmp_path / "results.jsonl").read_text().count("\n") == 1
    assert "Füchslein 🦊" in (tmp_path / "results.jsonl").read_text()


def test_an_error_about_a_file_name_that_is_no_text_can_be_noted(tmp_path: Path) -> None:
    given = entry("a", error="no such file: \udcff.png")
    Journal(tmp_path).append(given)
    Journal(tmp_path).merge(["a"])
    assert Journal(tmp_path).latest() == {"a": given}


def test_no_journal_is_no_entry(tmp_path: Path) -> None:
    assert Journal(tmp_path).latest() == {}


def test_the_latest_entry_of_an_id_counts_in_whichever_journal(tmp_path: Path) -> None:
    write(tmp_path / "results.0-of-2.jsonl", entry("a", 5, error="later"))
    write(tmp_path / "results.1-of-2.jsonl", entry("a", 3, error="earlier"))
    write(tmp_path / "results.jsonl", entry("b", 1, error="one"), entry("b", 1, error="two, in the same second"))
    latest = Journal(tmp_path).latest()
    assert {id: found["error"] for id, found in latest.items()} == {"a": "later", "b": "two, in the same second"}


FUTURE = "2099-01-01T00:00:00+00:00"


def test_a_later_line_of_a_journal_counts_whatever_the_clock_said(tmp_path: Path) -> None:
    path = tmp_path / "results.0-of-2.jsonl"
    other = entry("a", 3, error="between")
    write(tmp_path / "results.1-of-2.jsonl", other)
    write(path, entry("a", status="failed") | {"time": FUTURE})
    watching = Journal(tmp_path)
    assert watching.latest()["a"]["status"] == "failed"
    write(path, entry("a", 5, error="after the clock was set"))
    assert watching.latest()["a"]["error"] == "after the clock was set"
    write(path, entry("a", 1, error="older than the other worker's"))
    assert watching.latest() == Journal(tmp_path).latest() == {"a": other}


@pytest.mark.parametrize("worker", ["", "0-of-2", "1-of-2"])
def test_what_is_appended_counts_though_a_clock_was_ahead(tmp_path: Path, worker: str) -> None:
    failed = entry("a", status="failed") | {"time": FUTURE}
    Journal(tmp_path, "0-of-2").append(failed)
    Journal(tmp_path, "0-of-2").merge(["a"])
    watching = Journal(tmp_path)
    assert watching.latest() == {"a": failed}
    done = entry("a", 7)
    Journal(tmp_path, worker).append(done)
    latest = done | {"time": "2099-01-01T00:00:00.000001+00:00"}
    assert watching.latest() == {"a": latest}
    for name in ("0-of-2", "1-of-2", ""):
        Journal(tmp_path, name).merge(["a"])
        assert lines(tmp_path / "results.jsonl") == [latest]
    Journal(tmp_path, worker).append(entry("a", 8, status="failed"))
    assert watching.latest()["a"]["status"] == "failed"


@pytest.mark.parametrize("time", ["zzz", "9999-12-31T23:59:59.999999+00:00", "2099-01-01", "2099-01-01T00:00:00+05:00"])
def test_what_is_appended_counts_after_a_time_of_any_kind(tmp_path: Path, time: str) -> None:
    write(tmp_path / "results.jsonl", entry("a", status="failed") | {"time": time})
    watching = Journal(tmp_path)
    assert watching.latest()["a"]["status"] == "failed"
    Journal(tmp_path).append(entry("a"))
    assert watching.latest()["a"]["status"] == Journal(tmp_path).latest()["a"]["status"] == "done"


def test_a_merge_of_nothing_writes_nothing(tmp_path: Path) -> None:
    Journal(tmp_path).merge(["a"])
    assert os.listdir(tmp_path) == []


def test_each_worker_has_a_file_of_its_own(tmp_path: Path) -> None:
    Journal(tmp_path, "host-7").append(entry("a"))
    Journal(tmp_path).append(entry("b"))
    assert sorted(os.listdir(tmp_path)) == ["results.host-7.jsonl", "results.jsonl"]


def test_what_others_append_is_seen_at_the_next_look(tmp_path: Path) -> None:
    mine, other = Journal(tmp_path, "0-of-2"), Journal(tmp_path, "1-of-2")
    assert mine.latest() == {}
    other.append(entry("a"))
    assert set(mine.latest()) == {"a"}
    other.append(entry("b"))
    mine.append(entry("c"))
    assert set(mine.latest()) == {"a", "b", "c"}


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    for number in range(20):
        journal.append(entry(str(number)))
    journal.latest()
    loads, read = json.loads, []
    monkeypatch.setattr(json, "loads", lambda text: read.append(text) or loads(text))
    journal.append(entry("new"))
    assert len(journal.latest()) == 21
    assert [text for text in read if text] == [json.dumps(entry("new")).encode()]


@pytest.mark.parametrize("length", [1, 20, -1])
def test_a_line_cut_off_by_a_kill_costs_only_itself(tmp_path: Path, length: int) -> None:
    journal = Journal(tmp_path)
    journal.append(entry("a"))
    with journal.path.open("ab") as file:
        file.write(json.dumps(entry("torn")).encode()[:length])
    assert set(journal.latest()) == {"a"}
    assert journal.skipped == 0
    journal.append(entry("b"))
    assert set(journal.latest()) == {"a", "b"}
    assert journal.skipped == 1
    assert set(Journal(tmp_path).latest()) == {"a", "b"}


def test_a_line_that_lacks_only_its_end_is_an_entry(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps(entry("a")))
    journal = Journal(tmp_path)
    assert set(journal.latest()) == {"a"}
    journal.append(entry("b"))
    assert set(journal.latest()) == {"a", "b"}
    assert journal.skipped == 0


def test_lines_that_are_no_entries_are_counted(tmp_path: Path) -> None:
    others = ["", "{", "7", "[]", "{}", '{"id": 7, "status": "done", "time": "x"}', "[" * 100_000, "1" * 5000, "\x00"]
    text = "\n".join([json.dumps(entry("a")), *others, json.dumps(entry("b")), ""])
    (tmp_path / "results.jsonl").write_bytes(b"\xff\xfe\n" + text.encode())
    journal = Journal(tmp_path)
    assert set(journal.latest()) == {"a", "b"}
    assert journal.skipped == len(others)  # with the one that is no UTF-8, without the empty one
    journal.latest()
    assert journal.skipped == len(others)


def test_a_merge_has_a_line_an_id_in_the_order_asked_for(tmp_path: Path) -> None:
    first, second = Journal(tmp_path, "0-of-2"), Journal(tmp_path, "1-of-2")
    Journal(tmp_path).append(entry("from an earlier batch"))
    for id in ("c", "a"):
        first.append(entry(id, 1, status="failed"))
    second.append(entry("b"))
    first.append(entry("c", 2))
    first.merge(["a", "b", "c", "not made"])
    merged = lines(tmp_path / "results.jsonl")
    assert [line["id"] for line in merged] == ["a", "b", "c", "from an earlier batch"]
    assert [line["status"] for line in merged] == ["failed", "done", "done", "done"]
    assert Journal(tmp_path).latest() == {line["id"]: line for line in merged}


def test_a_second_merge_changes_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "0-of-2")
    journal.append(entry("b"))
    journal.append(entry("a"))
    journal.merge(["a", "b"])
    before = (tmp_path / "results.jsonl").stat()
    Journal(tmp_path, "1-of-2").merge(["a", "b"])
    after = (tmp_path / "results.jsonl").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_journal_goes_on_after_a_merge_of_itself(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for second in range(3):
        journal.append(entry("a", second))
    journal.merge(["a"])
    assert lines(journal.path) == [entry("a", 2)]
    journal.append(entry("b"))
    assert set(journal.latest()) == {"a", "b"}
    assert set(Journal(tmp_path).latest()) == {"a", "b"}


def test_a_file_put_in_place_of_another_is_read_anew(tmp_path: Path) -> None:
    """Even where the system gives it the number of the file that was there before."""
    journal = Journal(tmp_path)
    journal.append(entry("a", 1))
    journal.append(entry("b", 1))
    journal.latest()
    inode = journal.path.stat().st_ino
    journal.path.write_text("".join(json.dumps(entry(id, 2)) + "\n" for id in "cdef"))
    assert journal.path.stat().st_ino == inode
    assert set(journal.latest()) == set("cdef")
    journal.path.unlink()
    assert journal.latest() == {}


def test_what_is_appended_while_another_merges_is_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other's older view replaces the newer one: the other sees so, and does it again."""
    slow, quick = Journal(tmp_path, "0-of-2"), Journal(tmp_path, "1-of-2")
    slow.append(entry("a"))
    replace = os.replace
    pending = ["b", "c"]

    def slowly(source: Path, target: Path) -> None:
        if source.name.startswith(".results.0") and pending:
            quick.append(entry(pending.pop(0)))
            quick.merge("abc")
        replace(source, target)

    monkeypatch.setattr(os, "replace", slowly)
    slow.merge("abc")
    assert [line["id"] for line in lines(tmp_path / "results.jsonl")] == ["a", "b", "c"]


def test_a_merge_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.append(entry("a"))
    journal.append(entry("a", 1))
    before = journal.path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        journal.merge("a")
    assert journal.path.read_bytes() == before
    assert os.listdir(tmp_path) == ["results.jsonl"]


def test_three_processes_that_append_and_merge_at_once_lose_nothing(tmp_path: Path) -> None:
    script = """
worker = "WORKER"
journal = Journal(folder, worker)
(folder / worker).touch()
while not all((folder / name).exists() for name in "012"):
    pass
for number in range(12):
    journal.append(entry(f"{worker}-{number}"))
    journal.merge([])
"""
    processes = [start(script.replace("WORKER", name), tmp_path) for name in "012"]
    assert [process.wait(timeout=30) for process in processes] == [0, 0, 0]
    merged = [line["id"] for line in lines(tmp_path / "results.jsonl")]
    assert len(merged) == 36
    assert set(merged) == {f"{worker}-{number}" for worker in "012" for number in range(12)}


@pytest.mark.parametrize("worker", ["", "0-of-1"])
def test_a_kill_at_any_moment_of_append_and_merge_loses_nothing_acknowledged(tmp_path: Path, worker: str) -> None:
    script = """
journal = Journal(folder, "WORKER")
say("ready")
number = len(journal.latest())
while True:
    journal.append(entry(f"row {number}"))
    say(number)
    journal.merge([])
    number += 1
"""
    known = 0
    for delay in (0.01, 0.023, 0.05):
        process = start(script.replace("WORKER", worker), tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.kill()
        acknowledged = [int(line) for line in process.communicate()[0].split("\n")[:-1]]
        known = max([known, *(number + 1 for number in acknowledged)])
        latest = Journal(tmp_path).latest()
        assert {f"row {number}" for number in range(known)} <= set(latest)
    assert known > 0
    Journal(tmp_path).merge([])
    assert len(lines(tmp_path / "results.jsonl")) == len(latest)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of processes")
def test_a_disk_that_fills_up_within_a_line_is_an_error_and_costs_only_that_line(tmp_path: Path) -> None:
    script = """
import resource
journal = Journal(folder)
journal.append(entry("a"))
size = journal.path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
try:
    journal.append(entry("b"))
except OSError as error:
    say(type(error).__name__, journal.path.stat().st_size - size)
"""
    assert start(script, tmp_path).communicate()[0] == "OSError 10\n"
    journal = Journal(tmp_path)
    assert set(journal.latest()) == {"a"}
    journal.append(entry("c"))
    assert set(journal.latest()) == {"a", "c"}


def test_a_folder_that_has_vanished(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        journal.append(entry("a"))


def test_the_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"fox" * 100_000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"fox" * 100_000).hexdigest()
