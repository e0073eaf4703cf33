"""A manifest is checked against its model, all of it, and a row is known again by what it asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attnswap.pipelines.batch import plan
from attnswap.pipelines.batch.manifest import BadManifest
from PIL import Image

Make = Callable[..., Any]


def read(given: Any) -> tuple[plan.Planned, ...]:
    return plan.read(given.manifest, given.defaults, given.folder)[0]


def test_reads_no_weights(batch: Make, tiny_sd: Path, copy_of: Callable[[Path], Path]) -> None:
    model = copy_of(tiny_sd)
    (model / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    [row] = read(batch("a fox", fields={"model": str(model)}))
    assert (row.file.name, row.task.job.width) == ("0001.png", 64)


def test_names_what_only_the_model_knows_along_with_the_rest(batch: Make) -> None:
    rows = ["a fox", {"prompt": "a cat", "width": 100}, {"prompt": "a dog", "seed": -1}, {"prompt": "b", "frames": 5}]
    with pytest.raises(BadManifest) as caught:
        read(batch(*rows))
    assert [problem.line for problem in caught.value.problems] == [2, 3, 4]


def test_clips_are_named_as_such(batch: Make, tiny_wan: Path) -> None:
    pytest.importorskip("av")
    [row] = read(batch("a fox", fields={"model": str(tiny_wan)}))
    assert row.file.name == "0001.mp4"


def test_work_grows_with_size_steps_and_frames(batch: Make) -> None:
    rows = read(batch("a", {"prompt": "b", "width": 128}, {"prompt": "c", "steps": 3}))
    assert [row.work / rows[0].work for row in rows] == [1, 2, 3]


class TestAsked:
    def asked(self, batch: Make, row: Any, **changes: Any) -> str:
        return read(replace(batch(row), **changes))[0].asked

    @pytest.mark.parametrize(
        "change", [{"seed": 1}, {"prompt": "a cat"}, {"width": 72}, {"method": "hidiffusion"}, {"negative": ""}]
    )
    def test_changes_with_the_row(self, batch: Make, change: dict[str, Any]) -> None:
        assert self.asked(batch, {"prompt": "a fox"}) != self.asked(batch, {"prompt": "a fox"} | change)

    def test_does_not_change_with_the_place_of_the_files(self, batch: Make, tmp_path: Path) -> None:
        before = self.asked(batch, "a fox")
        assert self.asked(batch, "a fox", folder=tmp_path / "elsewhere") == before

    def test_goes_by_the_contents_of_an_image_and_not_by_its_name(self, batch: Make, tmp_path: Path) -> None:
        for name, colour in {"a.png": "red", "b.png": "red", "c.png": "blue"}.items():
            Image.new("RGB", (64, 64), colour).save(tmp_path / name)
        a, b, c = (
            self.asked(batch, {"prompt": "a fox", "image": name, "strength": 1}) for name in ("a.png", "b.png", "c.png")
        )
        assert a == b != c
