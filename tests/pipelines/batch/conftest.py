"""Batches of a tiny random model: what they leave behind, and processes that are cheap to kill."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from attnswap.pipelines.session import Session
from diffusers import StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm


@pytest.fixture
def batch(tiny_sd: Path, tmp_path: Path) -> Callable[..., Any]:
    """A `Batch` of 64x64 pictures in one step, into tmp_path/out: `batch("a fox", {"prompt": "a cat", "seed": 1})`.

    Without rows, the manifest stays as it is.
    """
    from attnswap.pipelines.batch.run import Batch
    from attnswap.pipelines.job import Job

    def given(*rows: str | Mapping[str, Any], fields: Mapping[str, Any] | None = None, **options: Any) -> Batch:
        manifest = tmp_path / "rows.jsonl"
        if rows:
            objects = [{"prompt": row} if isinstance(row, str) else row for row in rows]
            manifest.write_text("".join(json.dumps(row) + "\n" for row in objects))
        defaults = Job(prompt="", **{"model": str(tiny_sd), "steps": 1, **(fields or {})})
        return Batch(manifest, defaults, tmp_path / "out", **options)

    return given


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of `batch`."""
    return tmp_path / "out"


@pytest.fixture
def entries(out: Path) -> Callable[[], list[dict[str, Any]]]:
    """Reads results.jsonl."""
    return lambda: [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.fixture
def assert_whole(out: Path, entries: Callable[[], list[dict[str, Any]]]) -> Callable[[Iterable[str]], None]:
    """Each row is there once, in its place; its file is what was written; and there is nothing else."""

    def check(ids: Iterable[str]) -> None:
        found = entries()
        assert [entry["id"] for entry in found] == list(ids)
        for entry in found:
            path = out / entry["file"]
            assert entry["status"] == "done"
            assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
            if path.suffix == ".png":
                Image.open(path).load()
        names = {name for name in os.listdir(out) if name != ".attnswap-locks" and not name.startswith("results.")}
        assert names == {entry["file"] for entry in found}

    return check


class Forks:
    """Copies of this process, in which there is a function to run; they begin within milliseconds."""

    def __init__(self) -> None:
        self._living: set[int] = set()

    def start(self, function: Callable[[], object]) -> int:
        """Gives the number of the process, whose status is what `function` gives if that is one, else 0."""
        sys.stdout.flush()
        sys.stderr.flush()
        if child := os.fork():
            self._living.add(child)
            return child
        status = 70
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)  # the other threads did not come along
            # That of the parent is one for all forked processes: whoever is killed with it would stop the others.
            tqdm.set_lock(threading.RLock())
            given = function()
            status = given if isinstance(given, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def wait(self, child: int, seconds: float = 60) -> int:
        """Its status, negative for a signal."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            number, status = os.waitpid(child, os.WNOHANG)
            if number:
                self._living.discard(child)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        raise TimeoutError(f"after {seconds} s it still runs")

    def run(self, function: Callable[[], object]) -> int:
        return self.wait(self.start(function))

    def kill(self) -> None:
        for child in tuple(self._living):
            os.kill(child, signal.SIGKILL)
            self.wait(child)


@pytest.fixture
def forks() -> Iterator[Forks]:
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    made = Forks()
    yield made
    made.kill()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The ids that each call of the pipeline made."""
    made: list[list[str]] = []
    make = Session.make

    def spy(self: Session, tasks: Any, **options: Any) -> Any:
        made.append([task.job.output.stem for task in tasks])
        return make(self, tasks, **options)

    monkeypatch.setattr(Session, "make", spy)
    return made


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts with "poison" in them become not-a-number, alone and in company."""
    encode = StableDiffusionPipeline.encode_prompt

    def encoded(self: Any, prompt: Any, *rest: Any, **named: Any) -> Any:
        positive, negative = encode(self, prompt, *rest, **named)
        for index, text in enumerate([prompt] if isinstance(prompt, str) else prompt):
            if "poison" in text:
                positive[index] = float("nan")
        return positive, negative

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", encoded)
