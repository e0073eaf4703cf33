"""What visitors make is theirs, is kept for a while, and goes."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attnswap.accel.report import Details, Report
from attnswap.demo.server import visitors as module
from attnswap.demo.server.visitors import Visitor, Visitors
from attnswap.kernels.block_sparse.mask import BlockMask
from attnswap.pipelines import save, video_writer
from attnswap.pipelines.job import Job
from attnswap.pipelines.session import Result
from PIL import Image


class Worker:
    """Of whom it is only asked whose work it has."""

    def __init__(self) -> None:
        self.working: set[str] = set()

    def busy(self, visitor: str) -> bool:
        return visitor in self.working


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def visitors(tmp_path: Path, worker: Any) -> Visitors:
    return Visitors(tmp_path, worker)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(module, "time", clock)
    return clock


def result_of(visitor: Visitor, prompt: str = "a fox", side: int = 64, **fields: Any) -> Result:
    """A picture in a file, as a session leaves it."""
    job = Job(prompt, width=side, height=side, steps=2, **fields)
    job = dataclasses.replace(job, output=visitor.new_file(".png", job))
    assert job.output is not None
    image = Image.new("RGB", (side, side), (200, 100, 50))
    save.write_png(image, job.output, {})
    return Result(job, image, 1.0, None, torch.device("cpu"), None, {}, ())


def test_each_has_a_folder_of_which_nothing_can_be_guessed(
    visitors: Visitors, request_of: Callable[[str], Any], tmp_path: Path
) -> None:
    a, b = (visitors.of(request_of(name)) for name in ("../../etc", "b"))
    assert a.folder != b.folder
    assert a.folder.parent == b.folder.parent == tmp_path
    assert visitors.of(request_of("../../etc")) is a


def test_who_asks_without_a_browser_is_one_visitor(visitors: Visitors, request_of: Callable[[Any], Any]) -> None:
    assert visitors.of(request_of(None)) is visitors.of(request_of(""))
    assert visitors.of(request_of(None)).name == "local"


def test_files_are_numbered_and_say_what_they_show(visitors: Visitors, request_of: Callable[[str], Any]) -> None:
    visitor = visitors.of(request_of("a"))
    names = [visitor.new_file(".png", Job("A fox, of course!", seed=seed)).name for seed in (0, 7)]
    assert names == ["1-a-fox-of-course-seed-0.png", "2-a-fox-of-course-seed-7.png"]
    assert visitor.new_file(".mp4", Job("狐")).name == "3-seed-0.mp4"


def test_what_is_kept_has_a_small_picture_and_a_line(visitors: Visitors, request_of: Callable[[str], Any]) -> None:
    visitor = visitors.of(request_of("a"))
    entry = visitor.keep(result_of(visitor, side=512, methods={"hidiffusion": {}}, seed=3))
    assert visitor.entries == [entry]
    assert (entry.number, entry.clip) == (1, False)
    assert Image.open(entry.thumbnail).size == (256, 256)
    assert entry.caption == "a fox, 512x512, hidiffusion, seed 3"
    assert entry.result.image is None


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_of_a_clip_the_first_frame_is_kept(visitors: Visitors, request_of: Callable[[str], Any], suffix: str) -> None:
    import numpy as np

    visitor = visitors.of(request_of("a"))
    job = Job("a fox", width=64, height=32, frames=2, fps=module_fps())
    job = dataclasses.replace(job, output=visitor.new_file(suffix, job))
    assert job.fps is not None
    with video_writer.writers(job.output, None, fps=job.fps, record={}) as writers:
        for value in (250, 0):
            for writer in writers:
                writer.add(np.full((32, 64, 3), value, dtype=np.uint8))
    entry = visitor.keep(Result(job, None, 1.0, None, torch.device("cpu"), None, {}, ()))
    with Image.open(entry.thumbnail) as small:
        assert small.size == (64, 32)
        assert small.convert("L").getpixel((5, 5)) > 200
    assert entry.caption == "a fox, 64x32, 2 frames, dense, seed 0"


def module_fps() -> Any:
    from fractions import Fraction

    return Fraction(8)


def test_of_too_many_the_oldest_goes_with_its_files(
    visitors: Visitors, request_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ENTRIES", 2)
    visitor = visitors.of(request_of("a"))
    first, second, third = (visitor.keep(result_of(visitor)) for _ in range(3))
    assert visitor.entries == [second, third]
    assert sorted(visitor.folder.iterdir()) == sorted([second.file, second.thumbnail, third.file, third.thumbnail])
    assert not first.file.exists()


def test_block_masks_are_kept_of_the_newest_alone_and_figures_of_all(
    visitors: Visitors, request_of: Callable[[str], Any]
) -> None:
    """Nothing else holds on to the masks, nor to the pictures."""
    visitor = visitors.of(request_of("a"))
    held: list[weakref.ref[Any]] = []
    for _ in range(module.WITH_MASKS + 2):
        held += keep_with_mask(visitor)
        visitor.keep(result_of(visitor))
    gc.collect()
    assert [ref() is not None for ref in held] == [False, False] * 2 + [True, False] * module.WITH_MASKS
    reports = [entry.result.report for entry in visitor.entries if entry.result.report]
    assert [len(report.details[1].masks) for report in reports] == [0] * 2 + [1] * module.WITH_MASKS  # type: ignore[union-attr]
    assert {report.details[1].lines for report in reports} == {("recall 0.9",)}  # type: ignore[union-attr]


def keep_with_mask(visitor: Visitor) -> list[weakref.ref[Any]]:
    """The block mask and the picture of a new entry."""
    result = result_of(visitor)
    mask = BlockMask.from_dense(torch.ones(1, 2, 3, 4, dtype=torch.bool))
    details = Details({}, {}, ("recall 0.9",), {("layer", 0): mask})
    visitor.keep(dataclasses.replace(result, report=Report(({"method": ["adaspa"]},), (None, details))))
    return [weakref.ref(each) for each in (mask.bits, result.image)]


def test_all_visitors_together_have_no_more_block_masks_than_one(
    visitors: Visitors, request_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WITH_MASKS", 2)
    masks = [keep_with_mask(visitors.of(request_of(name)))[0] for name in "abc"]
    gc.collect()
    assert [ref() is not None for ref in masks] == [False, True, True]


def test_who_is_forgotten_leaves_no_block_masks(
    visitors: Visitors, request_of: Callable[[str], Any], clock: SimpleNamespace
) -> None:
    mask, _ = keep_with_mask(visitors.of(request_of("a")))
    visitors.gone(request_of("a"))
    clock.now += module.AWAY + 1
    visitors.of(request_of("b"))
    gc.collect()
    assert mask() is None


def test_what_was_compared_outlasts_its_comparison(visitors: Visitors, request_of: Callable[[str], Any]) -> None:
    visitor = visitors.of(request_of("a"))
    folder = visitor.new_folder()
    folder.mkdir()
    result = result_of(visitor)
    assert result.job.output
    compared = result.job.output.rename(folder / "1-a-fox-seed-0-dense.png")
    job = dataclasses.replace(result.job, output=compared)
    entry = visitor.keep_compared(dataclasses.replace(result, job=job))
    before = compared.read_bytes()
    visitor.new_folder()
    assert not compared.exists()
    assert visitor.entries == [entry]
    assert (entry.file.parent, entry.result.job.output) == (visitor.folder, entry.file)
    assert entry.file.read_bytes() == before


def test_of_comparisons_the_last_one_is_kept(visitors: Visitors, request_of: Callable[[str], Any]) -> None:
    visitor = visitors.of(request_of("a"))
    first = visitor.new_folder()
    assert not first.exists()
    first.mkdir()
    visitor.comparison = (SimpleNamespace(), first)  # type: ignore[assignment]
    second = visitor.new_folder()
    assert second != first
    assert not first.exists()
    assert visitor.comparison is None


def test_of_too_many_visitors_the_longest_idle_goes(
    visitors: Visitors, request_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_VISITORS", 2)
    a, b = (visitors.of(request_of(name)) for name in "ab")
    visitors.of(request_of("a"))
    visitors.of(request_of("c"))
    assert a.folder.exists()
    assert not b.folder.exists()
    assert visitors.of(request_of("a")) is a


def test_before_anybody_else_goes_who_has_left_and_then_who_has_made_nothing(
    visitors: Visitors, request_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_VISITORS", 3)
    a, b, c = (visitors.of(request_of(name)) for name in "abc")
    for visitor in (a, c):
        visitor.keep(result_of(visitor))
    visitors.gone(request_of("c"))
    visitors.of(request_of("d"))
    assert [each.folder.exists() for each in (a, b, c)] == [True, True, False]
    visitors.of(request_of("e"))
    assert [each.folder.exists() for each in (a, b)] == [True, False]


def test_nobody_goes_who_has_something_running(
    visitors: Visitors, worker: Worker, request_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_VISITORS", 2)
    a, b = (visitors.of(request_of(name)) for name in "ab")
    worker.working = {"a"}
    visitors.of(request_of("c"))
    assert a.folder.exists()
    assert not b.folder.exists()


def test_who_leaves_is_forgotten_after_a_while_but_not_while_something_runs(
    visitors: Visitors, worker: Worker, request_of: Callable[[str], Any], clock: SimpleNamespace
) -> None:
    a = visitors.of(request_of("a"))
    worker.working = {"a"}
    visitors.gone(request_of("a"))
    clock.now += module.AWAY + 1
    visitors.of(request_of("b"))
    assert a.folder.exists()
    worker.working = set()
    visitors.of(request_of("b"))
    visitors.gone(request_of("b"))
    assert not a.folder.exists()
    assert visitors.of(request_of("a")) is not a


def test_who_is_back_before_that_finds_everything(
    visitors: Visitors, request_of: Callable[[str], Any], clock: SimpleNamespace
) -> None:
    """A phone that is locked closes the connection of a page that is still open."""
    a = visitors.of(request_of("a"))
    a.keep(result_of(a))
    visitors.gone(request_of("a"))
    clock.now += module.AWAY - 1
    assert visitors.of(request_of("a")) is a
    clock.now += module.AWAY
    visitors.of(request_of("b"))
    assert a.folder.exists()
    assert len(a.entries) == 1


def test_somebody_leaves_who_has_never_been_here(visitors: Visitors, request_of: Callable[[str], Any]) -> None:
    visitors.gone(request_of("nobody"))
    assert visitors.of(request_of("nobody")).entries == []
