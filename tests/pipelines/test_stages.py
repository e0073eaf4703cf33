"""A finished stage is found again by the same job, and by no other."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from attnswap.pipelines import save
from attnswap.pipelines.routes import Stage
from attnswap.pipelines.stages import StageFolder
from PIL import Image

STAGES = tuple(Stage(number, 3, 8 * number, 8, 1) for number in (1, 2, 3))
JOB = {"prompt": "a fox", "strengths": (0.4, 0.3), "versions": {"torch": "2"}}
PICTURE = Image.radial_gradient("L").resize((8, 8)).convert("RGB")


@pytest.fixture
def folder(tmp_path: Path) -> StageFolder:
    return StageFolder(tmp_path / "fox.png", JOB)


def test_is_hidden_beside_the_output(folder: StageFolder, tmp_path: Path) -> None:
    folder.keep(STAGES[0], PICTURE, {})
    assert os.listdir(tmp_path) == [".fox.png.stages"]
    assert os.listdir(folder.path) == ["1-8x8.png"]


def test_gives_back_the_latest_to_the_bit(folder: StageFolder) -> None:
    carried = {"mean": [0.1 + 0.2, 1e-30]}
    folder.keep(STAGES[0], Image.new("RGB", (8, 8)), {})
    folder.keep(STAGES[1], picture_of(STAGES[1]), carried)
    found = folder.latest(STAGES)
    assert found is not None
    stage, image, again = found
    assert (stage, again) == (STAGES[1], carried)
    assert np.array_equal(np.asarray(image), np.asarray(picture_of(STAGES[1])))


def test_of_more_pixels_than_pillow_opens_is_found(folder: StageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.keep(STAGES[0], PICTURE, {})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    assert folder.latest(STAGES) is not None


def test_of_another_size_than_its_name_says_is_not_used(folder: StageFolder) -> None:
    folder.keep(STAGES[1], PICTURE, {})
    assert folder.latest(STAGES) is None


def test_finds_nothing_where_there_is_nothing(folder: StageFolder) -> None:
    assert folder.latest(STAGES) is None


@pytest.mark.parametrize(
    "change", [{"prompt": "a dog"}, {"strengths": (0.4, 0.2)}, {"versions": {"torch": "3"}}, {"more": 1}]
)
def test_a_stage_of_another_job_is_not_used(folder: StageFolder, tmp_path: Path, change: dict[str, object]) -> None:
    folder.keep(STAGES[0], PICTURE, {})
    assert StageFolder(tmp_path / "fox.png", dict(JOB)).latest(STAGES) is not None
    assert StageFolder(tmp_path / "fox.png", JOB | change).latest(STAGES) is None


def picture_of(stage: Stage) -> Image.Image:
    return PICTURE.resize((stage.width, stage.height))


@pytest.mark.parametrize("end", [b"iTXt", b"IDAT"])
def test_a_broken_stage_loses_only_itself(folder: StageFolder, end: bytes) -> None:
    for stage in STAGES[:2]:
        folder.keep(stage, picture_of(stage), {})
    whole = folder.file(STAGES[1]).read_bytes()
    folder.file(STAGES[1]).write_bytes(whole[: whole.index(end) + 20])
    found = folder.latest(STAGES)
    assert found is not None
    assert found[0] == STAGES[0]


def test_a_stage_under_the_name_of_another_is_not_used(folder: StageFolder) -> None:
    folder.keep(STAGES[0], PICTURE, {})
    os.replace(folder.file(STAGES[0]), folder.file(STAGES[1]))
    assert folder.latest(STAGES) is None


def test_removes_its_own_files_only(folder: StageFolder, tmp_path: Path) -> None:
    folder.keep(STAGES[0], PICTURE, {})
    folder.remove()
    assert os.listdir(tmp_path) == []
    folder.keep(STAGES[0], PICTURE, {})
    save.write_json({}, folder.path / "notes.json")
    folder.remove()
    assert os.listdir(folder.path) == ["notes.json"]
    folder.remove()


def test_leaves_the_stages_of_another_job_and_what_it_is_writing(folder: StageFolder, tmp_path: Path) -> None:
    other = StageFolder(tmp_path / "fox.png", JOB | {"prompt": "a dog"})
    folder.keep(STAGES[0], PICTURE, {})
    other.keep(STAGES[1], picture_of(STAGES[1]), {})
    part = other.path / ".1-8x8.png.77.part"
    part.touch()
    (other.path / "3-9x9.png").write_text("no picture")
    folder.remove()
    assert sorted(os.listdir(other.path)) == sorted([part.name, "2-16x8.png", "3-9x9.png"])
    assert other.latest(STAGES) is not None
