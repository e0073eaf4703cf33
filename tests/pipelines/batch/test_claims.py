"""A name has one owner at a time, whatever happens to the processes that want it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from attnswap.pipelines.batch import claims
from attnswap.pipelines.batch.claims import Claims, Lease, occupy
from attnswap.pipelines.batch.share import Share
from attnswap.pipelines.errors import BadInput

PRELUDE = """
import os, random, sys, time
from pathlib import Path
from attnswap.pipelines.batch.claims import Claims
folder = Path(sys.argv[1])
claims = Claims(folder)

def wait_for(name):
    while not (folder / name).exists():
        pass

def say(*words):
    print(*words, flush=True)
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process with `PRELUDE` and a script, on tmp_path."""
    processes = []

    def begin(script: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PRELUDE + script, str(tmp_path)]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Claims]:
    """Makes the claims of a process on another machine."""

    def make(folder: Path, kind: str = "lock") -> Claims:
        with monkeypatch.context() as patch:
            patch.setattr(claims, "machine", lambda: "elsewhere boot container")
            return Claims(folder, kind)

    return make


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def together(folder: Path, processes: list[subprocess.Popen[str]]) -> list[list[str]]:
    """What they say after they were all let loose at once, each having said that it is ready."""
    assert [line(process) for process in processes] == ["ready"] * len(processes)
    (folder / "go").touch()
    said = [process.communicate(timeout=30)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return said


def take(claims: Claims, name: str) -> Lease:
    lease = claims.acquire(name)
    assert lease is not None
    return lease


def lock(folder: Path, name: str, number: int = 0, kind: str = "lock") -> Path:
    return folder / ".attnswap-locks" / f"{name}.{kind}.{number}"


def silent(path: Path, seconds: float) -> None:
    """As if the owner had not touched it for so long."""
    past = path.stat().st_mtime - seconds
    os.utime(path, (past, past))


OWNER = 'lease = claims.acquire("a")\nsay("mine" if lease else "not mine")\n'


def test_a_name_has_one_owner_and_is_free_when_let_go(tmp_path: Path) -> None:
    mine, other = Claims(tmp_path), Claims(tmp_path)
    lease = take(mine, "a")
    assert lease.held()
    assert mine.acquire("a") is None
    assert other.acquire("a") is None
    assert other.acquire("b") is not None
    lease.release()
    assert not lease.held()
    again = take(other, "a")
    assert again.held()
    lease.release()  # once more does nothing to the new owner
    assert mine.acquire("a") is None


def test_closing_lets_all_names_go(tmp_path: Path) -> None:
    with Claims(tmp_path) as mine:
        assert mine.acquire("a")
        assert mine.acquire("b")
    other = Claims(tmp_path)
    assert other.acquire("a")
    assert other.acquire("b")


@pytest.mark.parametrize("name", ["ein-Füchslein 🦊", "é" * 60, "a.lock.0", "a.lock", "[a]*", "-"])
def test_names_of_all_sorts(tmp_path: Path, name: str) -> None:
    claims = Claims(tmp_path)
    assert claims.acquire("a")
    assert claims.acquire(name)
    assert claims.acquire(name) is None


def test_of_three_processes_that_race_for_many_names_one_gets_each(tmp_path: Path, start: Start) -> None:
    script = """
names = [str(number) for number in range(150)]
say("ready")
wait_for("go")
say(*[name for name in names if claims.acquire(name)])
wait_for("done")
"""
    processes = [start(script) for _ in range(3)]
    assert [line(process) for process in processes] == ["ready"] * 3
    (tmp_path / "go").touch()
    won = [line(process).split() for process in processes]
    assert sorted(int(name) for names in won for name in names) == list(range(150))
    (tmp_path / "done").touch()


def test_no_two_are_ever_inside_when_they_take_and_let_go_in_turn(tmp_path: Path, start: Start) -> None:
    script = """
say("ready")
wait_for("go")
entered, end = 0, time.monotonic() + 1.5
while time.monotonic() < end:
    if lease := claims.acquire("a"):
        os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))  # fails where somebody else is inside
        entered += 1
        assert lease.held()
        (folder / "inside").unlink()
        lease.release()
say(entered)
"""
    entered = together(tmp_path, [start(script) for _ in range(3)])
    assert sum(int(number) for (number,) in entered) >= 20


def test_who_looked_too_early_does_not_get_what_was_let_go_and_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race of locks that are deleted: the slow one deletes the fresh lock, or makes a second one."""
    slow, quick, third = Claims(tmp_path), Claims(tmp_path), Claims(tmp_path)
    old = take(quick, "a")
    old.release()
    stale = slow._stale

    def look_and_pause(path: Path) -> bool:
        found = stale(path)
        lease = take(quick, "a")
        lease.release()
        assert third.acquire("a")
        return found

    monkeypatch.setattr(slow, "_stale", look_and_pause)
    assert slow.acquire("a") is None


def test_a_killed_owner_is_followed_at_once(tmp_path: Path, start: Start) -> None:
    owner = start(OWNER + "time.sleep(60)")
    assert line(owner) == "mine"
    mine = Claims(tmp_path)
    assert mine.acquire("a") is None
    owner.kill()
    # Before its parent has asked after it: it is a zombie then, and its number is still taken.
    deadline = time.monotonic() + 5
    while (lease := mine.acquire("a")) is None and time.monotonic() < deadline:
        pass
    assert lease is not None
    assert owner.returncode is None


def test_the_number_of_a_dead_process_may_have_gone_to_another(tmp_path: Path, start: Start) -> None:
    owner = start(OWNER + "time.sleep(60)")
    assert line(owner) == "mine"
    mine = Claims(tmp_path)
    assert mine.acquire("a") is None
    claim = json.loads(lock(tmp_path, "a").read_text())
    assert claim["pid"] == owner.pid
    lock(tmp_path, "a").write_text(json.dumps({**claim, "started": claim["started"] - 3600}))
    assert mine.acquire("a") is not None


@pytest.mark.skipif(not psutil.LINUX, reason="elsewhere, a time of start is written down when a process starts")
def test_setting_the_clock_does_not_make_an_owner_another_process(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = start(OWNER + "time.sleep(60)")
    assert line(owner) == "mine"
    created = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) + 3600)
    assert Claims(tmp_path).acquire("a") is None


@pytest.mark.skipif(not psutil.LINUX, reason="/proc")
def test_an_owner_is_known_by_its_start_whatever_it_is_called(tmp_path: Path) -> None:
    odd = tmp_path / "a) S 1 (b"
    odd.symlink_to(sys.executable)
    with (
        subprocess.Popen([odd, "-c", "input()"], stdin=subprocess.PIPE) as first,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as second,
    ):
        # In hundredths of a second, usually.
        assert 0 <= claims._started(second.pid) - claims._started(first.pid) < 1000


def test_of_eight_processes_that_race_for_a_stale_lock_one_gets_it(tmp_path: Path, start: Start) -> None:
    owner = start(OWNER + "time.sleep(60)")
    assert line(owner) == "mine"
    owner.kill()
    owner.wait()
    script = """
say("ready")
wait_for("go")
say("mine" if claims.acquire("a") else "no")
wait_for("done")
"""
    processes = [start(script) for _ in range(8)]
    assert [line(process) for process in processes] == ["ready"] * 8
    (tmp_path / "go").touch()
    assert sorted(line(process) for process in processes) == ["mine"] + ["no"] * 7
    (tmp_path / "done").touch()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_suspended_owner_loses_the_name_and_is_told(tmp_path: Path, start: Start) -> None:
    owner = start(OWNER + "input()\nsay(lease.held())\nlease.release()\nsay('let go')\n")
    assert line(owner) == "mine"
    owner.send_signal(signal.SIGSTOP)
    mine = Claims(tmp_path)
    silent(lock(tmp_path, "a"), 55)
    assert mine.acquire("a") is None
    silent(lock(tmp_path, "a"), 10)
    lease = take(mine, "a")
    owner.send_signal(signal.SIGCONT)
    assert owner.communicate("\n", timeout=10)[0].split("\n")[:2] == ["False", "let go"]
    assert lease.held()
    assert Claims(tmp_path).acquire("a") is None


def test_an_owner_on_another_machine_is_followed_after_a_minute(
    tmp_path: Path, elsewhere: Callable[[Path], Claims]
) -> None:
    theirs, mine = elsewhere(tmp_path), Claims(tmp_path)
    lease = take(theirs, "a")
    # A number of theirs means nothing here.
    text = lock(tmp_path, "a").read_text()
    lock(tmp_path, "a").write_text(text.replace(f'"pid": {os.getpid()}', '"pid": 999999999'))
    silent(lock(tmp_path, "a"), 50)
    assert mine.acquire("a") is None
    assert lease.held()
    silent(lock(tmp_path, "a"), 15)
    assert lease.held()
    assert mine.acquire("a") is not None
    assert not lease.held()


def test_a_sign_of_life_keeps_a_name(
    tmp_path: Path, elsewhere: Callable[[Path], Claims], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.05)
    theirs, mine = elsewhere(tmp_path), Claims(tmp_path)
    first, second = take(theirs, "a"), take(theirs, "b")
    second.release()
    silent(lock(tmp_path, "a"), 3600)
    deadline = time.monotonic() + 10
    while mine._now() - lock(tmp_path, "a").stat().st_mtime > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert mine.acquire("a") is None
    assert first.held()
    assert mine.acquire("b") is not None  # what was let go is not kept alive
    theirs.close()


def test_age_is_told_by_the_clock_of_the_file_system(
    tmp_path: Path, elsewhere: Callable[[Path], Claims], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, mine = elsewhere(tmp_path), Claims(tmp_path)
    assert theirs.acquire("a")
    monkeypatch.setattr(time, "time", lambda: 4e9)  # this machine's clock is decades ahead
    assert mine.acquire("a") is None


def test_a_lock_whose_maker_was_killed_before_it_signed(tmp_path: Path) -> None:
    mine = Claims(tmp_path)
    lock(tmp_path, "a").write_text('{"machine": "el')
    assert mine.acquire("a") is None
    silent(lock(tmp_path, "a"), claims.HALF_WRITTEN_SECONDS + 1)
    assert mine.acquire("a") is not None


def test_who_was_taken_for_dead_before_it_signed_has_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Claims(tmp_path)
    write = os.write

    def late(descriptor: int, data: bytes) -> int:
        lock(tmp_path, "a", 1).touch()
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", late)
    assert mine.acquire("a") is None


def test_a_deleted_folder_of_locks_is_no_claim_any_more(tmp_path: Path) -> None:
    mine = Claims(tmp_path)
    lease = take(mine, "a")
    lock(tmp_path, "a").unlink()
    assert not lease.held()
    assert not lease.taken_over()
    assert Claims(tmp_path).acquire("a") is not None  # by a file of the same name
    assert not lease.held()
    assert lease.taken_over()
    lock(tmp_path, "a").unlink()
    (tmp_path / ".attnswap-locks").rmdir()
    with pytest.raises(FileNotFoundError):
        mine.acquire("b")
    lease.release()


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Claims(tmp_path / "no")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        Claims(tmp_path / "file")


def test_nothing_but_locks_is_left_behind(tmp_path: Path) -> None:
    with Claims(tmp_path) as mine:
        assert mine.acquire("a")
        assert Claims(tmp_path).acquire("a") is None
    assert os.listdir(tmp_path) == [".attnswap-locks"]
    assert os.listdir(tmp_path / ".attnswap-locks") == ["a.lock.0"]


SINGLE = Share()
SHARDS = [Share(index, 4, worker=f"{index}-of-4") for index in range(4)]
OTHER_SHARD = Share(1, 3, worker="1-of-3")
CLAIM = Share(claim=True, worker="host-1-aaaaaa")


@pytest.mark.parametrize(
    ("first", "second"), [(SHARDS[0], SHARDS[1]), (SHARDS[3], SHARDS[2]), (CLAIM, CLAIM), (CLAIM, Share(claim=True))]
)
def test_batches_that_may_meet_in_a_folder(tmp_path: Path, first: Share, second: Share) -> None:
    with occupy(tmp_path, first) as lease, occupy(tmp_path, second) as other:
        assert lease.held()
        assert other.held()


@pytest.mark.parametrize(
    ("first", "second", "how"),
    [
        (SINGLE, SINGLE, ""),
        (SINGLE, SHARDS[0], ""),
        (SINGLE, CLAIM, ""),
        (SHARDS[0], SINGLE, " as shard 0/4"),
        (SHARDS[0], SHARDS[0], " as shard 0/4"),
        (SHARDS[0], OTHER_SHARD, " as shard 0/4"),
        (OTHER_SHARD, SHARDS[1], " as shard 1/3"),
        (SHARDS[2], CLAIM, " as shard 2/4"),
        (CLAIM, SINGLE, " with --claim"),
        (CLAIM, SHARDS[0], " with --claim"),
    ],
)
def test_batches_that_may_not(tmp_path: Path, first: Share, second: Share, how: str) -> None:
    with occupy(tmp_path, first) as lease:
        with pytest.raises(BadInput) as refused:
            occupy(tmp_path, second)
        text = str(refused.value)
        assert f"{tmp_path}: another batch is at work there{how}, process {os.getpid()} on " in text
        assert "--claim" in text
        assert "\n" not in text
        assert lease.held()
    # Both places are free again, that of the one who gave way too.
    with occupy(tmp_path, second):
        pass
    with occupy(tmp_path, first):
        pass


def test_the_place_of_a_killed_batch_is_free(tmp_path: Path, start: Start) -> None:
    script = """
from attnswap.pipelines.batch.claims import occupy
from attnswap.pipelines.batch.share import Share
lease = occupy(folder, Share())
say("in")
time.sleep(60)
"""
    batch = start(script)
    assert line(batch) == "in"
    with pytest.raises(BadInput, match=f"process {batch.pid} on "):
        occupy(tmp_path, SHARDS[0])
    batch.kill()
    batch.wait()
    with occupy(tmp_path, SHARDS[0]), occupy(tmp_path, SHARDS[1]):
        pass
    with occupy(tmp_path, SINGLE):
        pass


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_suspended_batch_keeps_its_place(tmp_path: Path, start: Start) -> None:
    script = """
from attnswap.pipelines.batch.claims import occupy
from attnswap.pipelines.batch.share import Share
lease = occupy(folder, Share())
say("in")
input()
say(lease.held(), lease.taken_over())
"""
    batch = start(script)
    assert line(batch) == "in"
    batch.send_signal(signal.SIGSTOP)
    silent(lock(tmp_path, "single", kind="batch"), 100)
    for share in (SINGLE, SHARDS[0], CLAIM):
        with pytest.raises(BadInput, match=f"process {batch.pid} on "):
            occupy(tmp_path, share)
    batch.send_signal(signal.SIGCONT)
    assert batch.communicate("\n", timeout=10)[0] == "True False\n"


def test_a_place_is_let_go_where_files_cannot_be_of_1970(tmp_path: Path) -> None:
    occupy(tmp_path, SINGLE).release()
    os.utime(lock(tmp_path, "single", kind="batch"), (315532800, 315532800))  # 1980
    with occupy(tmp_path, SINGLE) as lease:
        assert claims.alone(tmp_path, lease)


def test_a_batch_on_another_machine_that_wakes_up_finds_its_place_taken(
    tmp_path: Path, elsewhere: Callable[..., Claims]
) -> None:
    theirs = take(elsewhere(tmp_path, "batch"), "single")
    with pytest.raises(BadInput, match="on elsewhere; if it was killed, the folder is free 60 seconds after"):
        occupy(tmp_path, SHARDS[0])
    silent(lock(tmp_path, "single", kind="batch"), 61)
    with occupy(tmp_path, SHARDS[0]):
        assert not theirs.held()
        assert theirs.taken_over()


def test_of_batches_that_begin_at_the_same_moment_no_two_that_collide_get_in(tmp_path: Path, start: Start) -> None:
    script = """
from attnswap.pipelines.batch.claims import occupy
from attnswap.pipelines.batch.share import Share
from attnswap.pipelines.errors import BadInput
share = SHARE
say("ready")
wait_for("go")
try:
    lease = occupy(folder, share)
    say("in")
except BadInput:
    say("out")
wait_for("done")
"""
    shares = [Share(), Share(), Share(1, 2, worker="1-of-2"), Share(0, 3, worker="0-of-3"), Share(claim=True)]
    processes = [start(script.replace("SHARE", repr(share))) for share in shares]
    assert [line(process) for process in processes] == ["ready"] * 5
    (tmp_path / "go").touch()
    assert [line(process) for process in processes].count("in") <= 1
    (tmp_path / "done").touch()
