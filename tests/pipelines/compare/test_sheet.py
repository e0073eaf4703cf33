"""The contact sheet shows every picture whole, unchanged up to a limit, with its caption below."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from attnswap.accel.heat_map import PAPER, font
from attnswap.pipelines.compare import sheet, stitch, text
from attnswap.pipelines.compare.figures import Outcome
from PIL import Image

from .cases import comparison, noise

NAMES = ("hidiffusion", "linfusion", "hidiffusion+linfusion t1=0.5 hidiffusion.windows=2,2", "clear", "adaspa")
LONG = "狐 and مرحبا " + "word " * 2000 + "x" * 3000


def find(sheet_: Image.Image, picture: Image.Image) -> list[tuple[int, int]]:
    """Where `picture` is, unchanged."""
    whole, wanted = (np.asarray(image.convert("RGBA")).view(np.uint32)[..., 0] for image in (sheet_, picture))
    height, width = wanted.shape
    corners = np.argwhere(whole == wanted[0, 0])
    return [(x, y) for y, x in corners.tolist() if np.array_equal(whole[y : y + height, x : x + width], wanted)]


@pytest.mark.parametrize("size", [(256, 256), (320, 192), (224, 400)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (6, 6)])
def test_every_picture_is_there_once_and_unchanged(size: tuple[int, int], rows: int, columns: int) -> None:
    found = comparison([f"prompt {row}" for row in range(rows)], NAMES[: columns - 1], size)
    pictures = {
        outcome.file: noise(size, number) for number, outcome in enumerate(found.outcomes.values()) if outcome.file
    }
    drawn = sheet.draw(found, pictures.get)
    places = [find(drawn, pictures[outcome.file]) for outcome in found.outcomes.values() if outcome.file]
    assert all(len(place) == 1 for place in places)
    flat = [place[0] for place in places]
    grid = [flat[row * columns : (row + 1) * columns] for row in range(rows)]
    assert all(len({y for _, y in row}) == 1 for row in grid)
    assert all(len({row[column][0] for row in grid}) == 1 for column in range(columns))


def test_a_small_picture_is_enlarged_by_a_whole_number() -> None:
    found = comparison(size=(32, 16))
    drawn = sheet.draw(found, lambda file: noise((32, 16), len(file)))
    assert len(find(drawn, noise((32, 16), 7).resize((224, 112), Image.Resampling.NEAREST))) == 2


@pytest.mark.parametrize("size", [(2048, 1024), (512, 4096)])
def test_a_large_picture_is_reduced_to_the_limit(size: tuple[int, int]) -> None:
    layout = sheet.Layout.of(comparison(size=size), 1)
    assert max(layout.picture) == sheet.LARGEST_CELL
    assert layout.picture[0] / layout.picture[1] == pytest.approx(size[0] / size[1], rel=0.01)


@pytest.mark.parametrize("rows", [30, 120])
def test_a_sheet_stays_a_picture_that_programs_open(rows: int) -> None:
    found = comparison([f"prompt {row}" for row in range(rows)], NAMES, (1024, 1024))
    drawn = sheet.draw(found, lambda file: None)
    assert max(drawn.size) <= sheet.LONGEST_SIDE * 1.01
    assert drawn.width * drawn.height <= sheet.MOST_PIXELS * 1.02


def test_nothing_is_written_over_a_picture_or_beyond_its_column() -> None:
    found = comparison([LONG], NAMES, (64, 64), about={"model": LONG})
    found.outcomes[1, "clear"] = Outcome(error=LONG)
    white = Image.new("RGB", (64, 64), "white")
    drawn = np.asarray(sheet.draw(found, lambda file: white))
    layout = sheet.Layout.of(found, 1)
    ink = (drawn != np.array(PAPER)).any(-1)
    assert ink.any()
    gaps = [sheet.GAP * (column + 1) + layout.column * column - sheet.GAP // 2 for column in range(layout.columns + 1)]
    figures = drawn.shape[0] - sheet.GAP - layout.row_height + layout.top
    assert not ink[figures:, gaps].any()


def test_letters_grow_with_the_pictures() -> None:
    sizes = [sheet.Layout.of(comparison(size=(side, side)), 1).letters for side in (64, 512, 1024)]
    assert sizes == sorted(set(sizes))
    assert sizes[0] >= 12


def test_a_picture_that_is_missing_is_grey_and_says_why() -> None:
    found = comparison(("a fox", "an owl"), size=(256, 256))
    found.outcomes[1, "adaspa"] = Outcome(error="out of memory")
    del found.outcomes[2, "adaspa"]
    drawn = sheet.draw(found, lambda file: noise((256, 256)))
    colours = {colour for _, colour in drawn.getcolors(1 << 24) or ()}
    assert {sheet.EMPTY, sheet.FAILED} <= colours


def test_a_text_is_cut_where_it_does_not_fit() -> None:
    face = font(16)
    lines = sheet.fitted(LONG, face, 200, 2)
    assert len(lines) == 2
    assert lines[1].endswith("…")
    assert all(face.getlength(line) <= 200 for line in lines)
    assert sheet.fitted("a fox", face, 200, 2) == ["a fox"]


def test_what_the_font_lacks_is_written_in_letters_it_has() -> None:
    face = font(20)
    unknown = bytes(face.getmask("\uffff"))
    said = "".join(text.caption(comparison().outcomes[1, "dense"], None)) + text.NONE + "é ü ñ ß × — …"
    assert not [letter for letter in sheet.drawable(said) if bytes(face.getmask(letter)) == unknown]
    assert sheet.drawable("한국 狐") == "한국 狐"


class TestStitched:
    def test_shows_the_frames_of_all_variants_side_by_side_in_scenes_of_one_size(self, tmp_path: Path) -> None:
        found = comparison(("a fox", LONG), size=(240, 240), frames=3, fps="8")
        for number, outcome in enumerate(found.outcomes.values()):
            folder = tmp_path / Path(outcome.file or "").stem
            folder.mkdir()
            for frame in range(1, 4):
                noise((240, 240), 10 * number + frame).save(folder / f"frame-{frame:05}.png")
        scenes = [list(stitch.scene(found, shot, lambda file: tmp_path / Path(file).stem)) for shot in found.shots]
        assert {frame.shape for scene in scenes for frame in scene} == {scenes[0][0].shape}
        for shot, scene in enumerate(scenes):
            assert len(scene) == 3
            for frame, drawn in enumerate(scene, 1):
                for variant in range(2):
                    number = 10 * (2 * shot + variant) + frame
                    assert len(find(Image.fromarray(drawn), noise((240, 240), number))) == 1

    def test_is_no_wider_than_players_take(self) -> None:
        found = comparison(names=NAMES, size=(1280, 720), frames=3, fps="8")
        assert sheet.Layout.of(found, 1, stitch.WIDEST).width <= stitch.WIDEST

    def test_leaves_out_a_scene_without_a_clip(self, tmp_path: Path) -> None:
        found = comparison(frames=3, fps="8")
        found.outcomes.update(dict.fromkeys(found.outcomes, Outcome(error="out of memory")))
        assert list(stitch.scene(found, found.shots[0], lambda file: tmp_path)) == []


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.0, "0 %"), (0.0001, "less than 0.1 %"), (0.0188, "1.9 %"), (0.0999, "10 %"), (0.372, "37 %"), (1.0, "100 %")],
)
def test_a_share_in_percent(share: float, said: str) -> None:
    assert text.percent(share) == said
