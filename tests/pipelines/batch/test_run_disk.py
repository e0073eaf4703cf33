"""A batch on a disk that is full, read-only or gone, and with a model folder that vanishes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attnswap.pipelines.batch.run import Outcome, run
from attnswap.pipelines.errors import BadInput
from PIL import Image

Make = Callable[..., Any]
Entries = Callable[[], list[dict[str, Any]]]
Whole = Callable[[Iterable[str]], None]
FOUR = ("a fox", "a cat", "a dog", "a cow")
IDS = ("0001", "0002", "0003", "0004")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("this user may not mount")
    yield place
    subprocess.run(["umount", place], check=True)


class TestDisk:
    def test_that_is_full_ends_the_batch_and_it_goes_on_when_there_is_room(self, batch: Make, small_disk: Path) -> None:
        out = small_disk / "out"
        filler = small_disk / "filler"
        rows = [{"prompt": "a fox", "seed": seed} for seed in range(4)]
        filler.write_bytes(bytes(90_000))
        given = replace(batch(*rows), folder=out)
        outcome = run(given)
        assert 0 < outcome.done < 4
        assert outcome.ended is not None
        assert "No space left on device" in outcome.ended
        assert not list(out.glob(".*.part"))
        filler.unlink()
        assert run(replace(given, resume=True)).ended is None
        lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        assert [line["id"] for line in lines] == [f"{number:04}" for number in range(1, 5)]
        for line in lines:
            Image.open(out / line["file"]).load()

    def test_that_is_full_at_the_picture(
        self, batch: Make, out: Path, assert_whole: Whole, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        image_save = Image.Image.save

        def full(self: Image.Image, file: Any, *rest: Any, **named: Any) -> None:
            if "0002" in file.name:
                file.write(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            image_save(self, file, *rest, **named)

        with monkeypatch.context() as broken:
            broken.setattr(Image.Image, "save", full)
            outcome = run(batch(*FOUR))
        assert (outcome.done, outcome.failures, outcome.left) == (1, {}, 3)
        assert outcome.ended == f"{out / '0002.png'} could not be written: No space left on device"
        assert_whole(["0001"])
        run(batch(resume=True))
        assert_whole(IDS)

    def test_that_is_full_at_the_entry(
        self, batch: Make, out: Path, assert_whole: Whole, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = os.write

        def full(descriptor: int, data: bytes) -> int:
            if b'"0002"' in data:
                write(descriptor, data[:20])
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data)

        with monkeypatch.context() as broken:
            broken.setattr(os, "write", full)
            outcome = run(batch(*FOUR))
        assert (outcome.done, outcome.left) == (1, 3)
        assert outcome.ended == f"{out} cannot be written any more: No space left on device"
        run(batch(resume=True))
        assert_whole(IDS)

    def test_that_is_full_at_a_clip(
        self, batch: Make, tiny_wan: Path, out: Path, assert_whole: Whole, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("av")
        from attnswap.pipelines import video_writer

        def full(self: Any, frame: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        small = {"model": str(tiny_wan), "width": 16, "height": 16, "frames": 5}
        with monkeypatch.context() as broken:
            broken.setattr(video_writer._Mp4, "add", full)
            outcome = run(batch("a fox", fields=small))
        assert outcome.ended == f"{out / '0001.mp4'} could not be written: No space left on device"
        assert not list(out.glob("*0001*"))
        run(batch(fields=small, resume=True))
        assert_whole(["0001"])

    def test_that_is_read_only_is_said_at_once(self, batch: Make, out: Path, small_disk: Path, calls: Any) -> None:
        (small_disk / "out").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        with pytest.raises(BadInput, match="not writable"):
            run(replace(batch("a fox"), folder=small_disk / "out"))
        assert calls == []

    def test_folder_that_cannot_be_made_or_is_a_file(self, batch: Make, out: Path, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=r"the folder .*no does not exist"):
            run(replace(batch("a fox"), folder=tmp_path / "no" / "out"))
        out.write_text("")
        with pytest.raises(BadInput, match="is a file"):
            run(batch("a fox"))

    def test_folder_that_vanishes_meanwhile_ends_the_batch(self, batch: Make, out: Path) -> None:
        said: list[str] = []

        def say(text: str) -> None:
            said.append(text)
            if "0002" in text:
                shutil.rmtree(out)

        outcome = run(batch(*FOUR), print_line=say)
        assert (outcome.done, outcome.left) == (2, 2)
        assert outcome.ended == f"{out / '0003.png'} could not be written: No such file or directory"

    def test_a_folder_in_the_place_of_one_file_fails_that_row(self, batch: Make, out: Path, entries: Entries) -> None:
        outcome = run(batch(*FOUR[:3]), print_line=lambda text: (out / "0002.png").mkdir(exist_ok=True))
        assert (outcome.done, list(outcome.failures), outcome.ended) == (2, ["0002"], None)
        assert "Is a directory" in entries()[1]["error"]


class TestModelFolder:
    def test_that_vanishes_meanwhile_is_not_missed(
        self, batch: Make, tiny_sd: Path, copy_of: Callable[[Path], Path], assert_whole: Whole
    ) -> None:
        model = copy_of(tiny_sd)
        rows = [*FOUR[:2], {"prompt": "a dog", "method": "hidiffusion", "width": 128, "height": 128}]

        def say(text: str) -> None:
            if "0001" in text:
                shutil.rmtree(model)

        assert run(batch(*rows, fields={"model": str(model)}), print_line=say) == Outcome(rows=3, done=3)
        assert_whole(IDS[:3])
