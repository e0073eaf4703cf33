"""Two files are the same picture or clip, or it is said how far they are apart."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from attnswap.pipelines import save, video_writer
from attnswap.pipelines.pixels import compare_pixels
from PIL import Image

CLIPS = [pytest.param(kind, marks=pytest.mark.skipif(kind == ".mp4" and not save.has_av(), reason="no PyAV"))
         for kind in (".gif", ".mp4")]  # fmt: skip


def picture(path: Path, *, side: int = 300, changed: int = 0, by: int = 7) -> Path:
    """A grey square with the first `changed` pixels of the last row brighter."""
    pixels = np.full((side, side, 3), 100, np.uint8)
    pixels[-1, :changed, 1] += by
    save.write_png(Image.fromarray(pixels), path, {"seed": 1})
    return path


def clip(path: Path, *, frames: int = 5, changed: tuple[int, ...] = (), side: int = 32) -> Path:
    with video_writer.writers(path, None, fps=Fraction(8), record={"seed": 1}) as writers:
        for number in range(frames):
            frame = np.full((side, side, 3), 40 * number, np.uint8)
            if number in changed:
                frame[:, : side // 2] = 255
            writers[0].add(frame)
    return path


class TestPictures:
    def test_of_the_same_pixels(self, tmp_path: Path) -> None:
        found = compare_pixels(picture(tmp_path / "a.png"), picture(tmp_path / "b.png"))
        assert found.same is True
        assert str(found) == f"the same pixels as {tmp_path / 'b.png'}"

    def test_one_pixel_is_enough_to_differ(self, tmp_path: Path) -> None:
        found = compare_pixels(picture(tmp_path / "a.png", changed=1, by=1), picture(tmp_path / "b.png"))
        assert found.same is False
        assert found.text.startswith("less than 0.01 % of the pixels differ from ")
        assert found.text.endswith(", by at most 1 of 255")

    @pytest.mark.parametrize(("one", "other"), [(90, 0), (0, 90)])
    def test_that_differ_a_little(self, tmp_path: Path, one: int, other: int) -> None:
        found = compare_pixels(picture(tmp_path / "a.png", changed=one), picture(tmp_path / "b.png", changed=other))
        assert found.text == f"0.1 % of the pixels differ from {tmp_path / 'b.png'}, by at most 7 of 255"

    def test_that_differ_everywhere(self, tmp_path: Path) -> None:
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        Image.new("RGB", (8, 8), "white").save(tmp_path / "b.png")
        found = compare_pixels(tmp_path / "a.png", tmp_path / "b.png")
        assert found.text == f"100 % of the pixels differ from {tmp_path / 'b.png'}, by at most 255 of 255"

    def test_of_another_size(self, tmp_path: Path) -> None:
        found = compare_pixels(picture(tmp_path / "a.png"), picture(tmp_path / "b.png", side=64))
        assert found.same is False
        assert found.text == f"its size is 300x300, that of {tmp_path / 'b.png'} 64x64"

    def test_saved_in_another_mode_are_the_same(self, tmp_path: Path) -> None:
        with Image.open(picture(tmp_path / "a.png")) as image:
            image.quantize(2).save(tmp_path / "b.png")
        assert compare_pixels(tmp_path / "a.png", tmp_path / "b.png").same is True


@pytest.mark.parametrize("kind", CLIPS)
class TestClips:
    def test_of_the_same_pixels(self, tmp_path: Path, kind: str) -> None:
        found = compare_pixels(clip(tmp_path / f"a{kind}"), clip(tmp_path / f"b{kind}"))
        assert (found.same, found.text) == (True, f"the same pixels as {tmp_path / f'b{kind}'}")

    def test_tell_in_how_many_frames_they_differ(self, tmp_path: Path, kind: str) -> None:
        found = compare_pixels(clip(tmp_path / f"a{kind}", changed=(0,)), clip(tmp_path / f"b{kind}"))
        assert found.same is False
        if kind == ".gif":  # of an MP4, later frames are made of earlier ones
            assert found.text.startswith("10 % of the pixels differ from ")
            assert found.text.endswith(", in 1 of 5 frames, by at most 255 of 255")

    def test_of_another_length(self, tmp_path: Path, kind: str) -> None:
        found = compare_pixels(clip(tmp_path / f"a{kind}"), clip(tmp_path / f"b{kind}", frames=7))
        assert (found.same, found.text) == (False, f"it has 5 frames, {tmp_path / f'b{kind}'} has 7")

    def test_of_another_size(self, tmp_path: Path, kind: str) -> None:
        found = compare_pixels(clip(tmp_path / f"a{kind}"), clip(tmp_path / f"b{kind}", side=16))
        assert found.text == f"its size is 32x32, that of {tmp_path / f'b{kind}'} 16x16"


COARSE = video_writer.ENCODER | {"crf": "19"}


@pytest.mark.skipif(not save.has_av(), reason="no PyAV")
class TestClipsEncodedOtherwise:
    @pytest.fixture
    def other(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
        """Writes a clip of the frames of `noise`, as another version of the encoder would."""

        def write(name: str, **changed: object) -> Path:
            with monkeypatch.context() as patch:
                for what, value in changed.items():
                    patch.setattr(video_writer, what, value)
                with video_writer.writers(tmp_path / name, None, fps=Fraction(8), record={}) as (writer,):
                    for number in range(4):
                        writer.add(np.random.default_rng(number).integers(0, 256, (96, 96, 3), np.uint8))
            return tmp_path / name

        return write

    def test_are_said_to_be_of_the_same_frames(self, other: Callable[..., Path]) -> None:
        found = compare_pixels(other("a.mp4"), theirs := other("b.mp4", ENCODER=COARSE))
        assert found.same is False
        assert found.text.startswith(f"the same frames as {theirs}, encoded otherwise: ")
        assert f" % of the pixels differ from {theirs}, in 4 of 4 frames, by at most " in found.text

    def test_but_not_where_they_do_not_say(self, other: Callable[..., Path]) -> None:
        for mine in ("attnswap_frames", "nothing"):
            found = compare_pixels(other("a.mp4", FRAMES=mine), other("b.mp4", ENCODER=COARSE, FRAMES="nothing"))
            assert found.same is False
            assert "same frames" not in found.text


class TestNotCompared:
    def test_with_a_file_that_it_has_replaced(self, tmp_path: Path) -> None:
        path = picture(tmp_path / "a.png")
        found = compare_pixels(path, tmp_path / "." / "a.png")
        assert found.same is None
        assert "which is now this file itself" in found.text

    def test_with_a_file_of_another_kind(self, tmp_path: Path) -> None:
        found = compare_pixels(picture(tmp_path / "a.png"), clip(tmp_path / "b.gif"))
        assert found.same is None
        assert "a file of another kind" in found.text

    def test_with_a_file_that_has_gone(self, tmp_path: Path) -> None:
        found = compare_pixels(picture(tmp_path / "a.png"), tmp_path / "b.png")
        assert found.same is None
        assert "No such file" in found.text

    @pytest.mark.parametrize("kind", [".png", *CLIPS])
    def test_with_a_damaged_file(self, tmp_path: Path, kind: str) -> None:
        made = picture(tmp_path / "a.png") if kind == ".png" else clip(tmp_path / f"a{kind}")
        (tmp_path / f"b{kind}").write_bytes(made.read_bytes()[:12])
        found = compare_pixels(made, tmp_path / f"b{kind}")
        assert found.same is None
        assert found.text.startswith(f"not compared with {tmp_path / f'b{kind}'}: ")

    def test_and_the_name_of_the_file_cannot_steer_the_terminal(self, tmp_path: Path) -> None:
        found = compare_pixels(picture(tmp_path / "a.png"), tmp_path / "\x1b[2J.png")
        assert "\x1b" not in found.text
        assert r"\x1b[2J.png" in found.text
