"""Batches that are killed, interrupted and shared by processes: no row lost, none twice, no half file."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attnswap import cli
from attnswap.pipelines.batch import run as module
from attnswap.pipelines.batch.run import run
from attnswap.pipelines.batch.share import Share
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.job import Job
from attnswap.pipelines.session import Session
from diffusers import UNet2DConditionModel
from PIL import Image

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

Make = Callable[..., Any]
Whole = Callable[[Iterable[str]], None]
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.utime", "os.mkdir")


@pytest.fixture(autouse=True)
def loaded(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked processes find their model in memory, and look for others at short intervals."""
    session = Session(Job(prompt="", model=str(tiny_sd)))
    monkeypatch.setattr(module, "Session", lambda *_, **__: nullcontext(session))
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.2)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a tenth of a second."""
    forward = UNet2DConditionModel.forward

    def slowed(*arguments: Any, **named: Any) -> Any:
        time.sleep(0.1)
        return forward(*arguments, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", slowed)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_at(number: int, out: Path, function: Callable[[], Any]) -> Callable[[], None]:
    """`function`, killed as it is about to do something to the files in `out` for the `number`-th time."""

    def body() -> None:
        events = itertools.count()

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in FILE_EVENTS and str(arguments[0]).startswith(str(out)) and next(events) == number:
                die()

        sys.addaudithook(hook)
        function()

    return body


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "that never came"
        time.sleep(0.005)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


class TestKilled:
    # Claiming does more, and much of it alike.
    @pytest.mark.parametrize(
        ("share", "first", "every"),
        [(Share(), 0, 2), (Share(), 1, 2), (Share(0, 1, claim=True, worker="me"), 0, 3)],
        ids=["alone, even", "alone, odd", "claiming"],
    )
    def test_before_anything_it_does_to_a_file_and_resumed(
        self, batch: Make, out: Path, forks: Any, assert_whole: Whole, share: Share, first: int, every: int
    ) -> None:
        given = batch("a fox", "a cat", share=share)
        killed = 0
        for number in itertools.count(first, every):
            shutil.rmtree(out, ignore_errors=True)
            status = forks.run(dies_at(number, out, lambda: run(given)))
            if status == 0:
                break
            assert status == -signal.SIGKILL
            killed += 1
            outcome = run(replace(given, resume=True))
            assert not outcome.failures
            assert_whole(["0001", "0002"])
        assert killed > 5

    def test_in_the_middle_of_a_picture(
        self, batch: Make, forks: Any, assert_whole: Whole, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def half(self: Image.Image, file: Any, **named: Any) -> None:
            file.write(b"\x89PNG")
            file.flush()
            die()

        with monkeypatch.context() as broken:
            broken.setattr(Image.Image, "save", half)
            assert forks.run(lambda: run(batch("a fox"))) == -signal.SIGKILL
        assert [path.name.rpartition(".")[2] for path in out.glob(".0001*")] == ["part"]
        run(batch(resume=True))
        assert_whole(["0001"])

    @pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
    def test_in_the_middle_of_an_entry(
        self, batch: Make, forks: Any, assert_whole: Whole, monkeypatch: pytest.MonkeyPatch, share: float
    ) -> None:
        write = os.write

        def half(descriptor: int, data: bytes) -> int:
            if b'"0002"' in data:
                write(descriptor, data[: int(share * len(data))])
                die()
            return write(descriptor, data)

        with monkeypatch.context() as broken:
            broken.setattr(os, "write", half)
            assert forks.run(lambda: run(batch("a fox", "a cat", "a dog"))) == -signal.SIGKILL
        # What lacks nothing but its line's end is an entry.
        assert run(batch(resume=True)).done == (1 if share > 0.9 else 2)
        assert_whole(["0001", "0002", "0003"])

    def test_at_any_moment_again_and_again(self, batch: Make, out: Path, forks: Any, assert_whole: Whole) -> None:
        moments = random.Random(6)
        rows = [{"prompt": "a fox", "seed": seed} for seed in range(12)]
        given = batch(*rows, resume=True, batch_size=2)
        for _ in range(8):
            child = forks.start(lambda: run(given))
            time.sleep(moments.uniform(0.03, 0.25))
            os.kill(child, signal.SIGKILL)
            forks.wait(child)
        run(given)
        assert_whole([f"{number:04}" for number in range(1, 13)])

    def test_as_a_command(self, batch: Make, tiny_sd: Path, out: Path, assert_whole: Whole) -> None:
        given = batch(*({"prompt": "a fox", "seed": seed} for seed in range(20)))
        command = [sys.executable, "-m", "attnswap.cli", "batch", given.manifest, "-o", out, "-m", tiny_sd]
        process = subprocess.Popen([*command, "--steps", "1"], stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("[3/20]"):
                process.kill()
                break
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
        outcome = run(batch(resume=True))
        assert outcome.before >= 3
        assert_whole([f"{number:04}" for number in range(1, 21)])


class TestAskedToEnd:
    """The command itself, in a process with a terminal's worth of signals."""

    def command(self, batch: Make, out: Path, tiny_sd: Path, tmp_path: Path, *flags: str, steps: int = 12) -> Any:
        manifest = batch("a fox", "a cat").manifest
        arguments = ["batch", manifest, "-o", out, "-m", tiny_sd, "--steps", steps, *flags]

        def run_it() -> int:
            log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            status = cli.main([str(argument) for argument in arguments])
            sys.stdout.flush()
            return status

        return run_it

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    @pytest.mark.usefixtures("slow")
    def test_ends_after_the_step_and_goes_on_later(
        self, batch: Make, out: Path, tiny_sd: Path, tmp_path: Path, forks: Any, assert_whole: Whole,
        number: int, status: int,
    ) -> None:  # fmt: skip
        child = forks.start(self.command(batch, out, tiny_sd, tmp_path))
        until(lambda: (tmp_path / "log").exists() and "0001: " in (tmp_path / "log").read_text())
        time.sleep(0.2)  # a step or two into the second row
        os.kill(child, number)
        begun = time.monotonic()
        assert forks.wait(child) == status
        assert time.monotonic() - begun < 0.8  # of 12 steps, most were left
        said = (tmp_path / "log").read_text()
        assert "ending after this step; once more ends at once" in said
        assert "1 done, 1 left" in said
        assert "Ended early: interrupted. The same command with --resume goes on." in said
        assert "Traceback" not in said
        assert_whole(["0001"])
        assert forks.run(self.command(batch, out, tiny_sd, tmp_path, "--resume")) == 0
        assert_whole(["0001", "0002"])

    def test_twice_ends_at_once(
        self, batch: Make, out: Path, tiny_sd: Path, tmp_path: Path, forks: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(UNet2DConditionModel, "forward", lambda *_, **__: time.sleep(60))
        child = forks.start(self.command(batch, out, tiny_sd, tmp_path))
        until(lambda: (out / ".attnswap-locks").exists())
        time.sleep(1)
        os.kill(child, signal.SIGINT)
        until(lambda: "once more" in (tmp_path / "log").read_text())
        os.kill(child, signal.SIGINT)
        assert forks.wait(child, 10) == 130
        assert "Traceback" not in (tmp_path / "log").read_text()
        assert not list(out.glob("*.png"))


@pytest.mark.usefixtures("slow")
class TestTogether:
    NAMES = tuple(f"{number:04}" for number in range(1, 9))

    def rows(self) -> list[dict[str, Any]]:
        return [{"prompt": "a fox", "seed": seed} for seed in range(8)]

    def test_a_second_batch_is_refused_until_the_first_is_dead(
        self, batch: Make, out: Path, forks: Any, assert_whole: Whole
    ) -> None:
        given = batch(*self.rows())

        def stays() -> bool:
            """After its first row."""
            while lines(out / "results.jsonl"):
                time.sleep(0.1)
            return False

        child = forks.start(lambda: run(given, stopping=nullcontext(stays)))
        until(lambda: lines(out / "results.jsonl"))
        with pytest.raises(BadInput, match=f"another batch is at work there, process {child} "):
            run(replace(given, resume=True))
        os.kill(child, signal.SIGKILL)
        forks.wait(child)
        run(replace(given, resume=True))
        assert_whole(self.NAMES)

    def test_two_shards_one_killed_half_way(self, batch: Make, out: Path, forks: Any, assert_whole: Whole) -> None:
        def shard(index: int, **options: Any) -> Any:
            return batch(*self.rows(), share=Share(index, 2, worker=f"{index}-of-2"), **options)

        first = forks.start(lambda: run(shard(0)))
        second = forks.start(lambda: run(shard(1)))
        until(lambda: len(lines(out / "results.1-of-2.jsonl")) >= 2)
        os.kill(second, signal.SIGKILL)
        assert forks.wait(second) == -signal.SIGKILL
        assert forks.wait(first) == 0
        outcome = run(shard(1, resume=True))
        assert (outcome.rows, outcome.before >= 2) == (4, True)
        assert_whole(self.NAMES)

    def test_three_that_claim_one_killed_at_a_row(
        self, batch: Make, out: Path, forks: Any, assert_whole: Whole
    ) -> None:
        workers = {}
        for name in "abc":
            given = batch(*self.rows(), share=Share(claim=True, worker=name))
            workers[name] = forks.start(lambda given=given: run(given))
        until(lambda: lines(out / "results.b.jsonl"))
        os.kill(workers["b"], signal.SIGKILL)
        assert forks.wait(workers["b"]) == -signal.SIGKILL
        assert (forks.wait(workers["a"]), forks.wait(workers["c"])) == (0, 0)
        assert_whole(self.NAMES)
        made = [json.loads(line)["id"] for name in "abc" for line in lines(out / f"results.{name}.jsonl")]
        assert sorted(made) == sorted(self.NAMES)  # each of them once

    def test_workers_that_come_and_go_lose_nothing(
        self, batch: Make, out: Path, forks: Any, assert_whole: Whole
    ) -> None:
        moments = random.Random(7)
        names = itertools.count()

        def worker() -> int:
            given = batch(*self.rows(), share=Share(claim=True, worker=f"w{next(names)}"), resume=True)
            return int(forks.start(lambda: run(given)))

        living = [worker(), worker()]
        for _ in range(4):
            time.sleep(moments.uniform(0.05, 0.3))
            os.kill(living[0], signal.SIGKILL)
            forks.wait(living.pop(0))
            living.append(worker())
        assert [forks.wait(child) for child in living] == [0, 0]
        assert_whole(self.NAMES)


def test_accelerate_starts_processes_that_share_the_rows(
    batch: Make, tiny_sd: Path, out: Path, assert_whole: Whole
) -> None:
    pytest.importorskip("accelerate")
    given = batch(*({"prompt": "a fox", "seed": seed} for seed in range(5)))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "attnswap.cli", "batch", str(given.manifest), "-o", str(out)]
    done = subprocess.run(
        [*launch, "-m", str(tiny_sd), "--steps", "1", "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert_whole([f"{number:04}" for number in range(1, 6)])
    assert len(lines(out / "results.0-of-2.jsonl")) == 3
    assert len(lines(out / "results.1-of-2.jsonl")) == 2
    assert "0-of-2: 3 done" in done.stdout
