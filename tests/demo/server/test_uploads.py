"""What visitors bring is looked at with care, and nothing else is opened."""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
from attnswap.demo.server import uploads as module
from attnswap.demo.server.uploads import Room, made_here, picture
from attnswap.pipelines import save, video_writer
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.job import Job
from PIL import Image, PngImagePlugin


@pytest.fixture
def into(tmp_path: Path) -> Path:
    folder = tmp_path / "visitor"
    folder.mkdir()
    return folder


def drawn(width: int = 40, height: int = 20) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, width // 2, height))
    return image


def record() -> dict[str, Any]:
    job = Job("a fox", width=64, height=64, steps=2, guidance=2.0, dtype="float32")
    return job.to_record() | {"asked": job.to_record()}


def refused(act: Callable[[], Any], *words: str) -> None:
    """By a line that holds `words` and no folder."""
    with pytest.raises(BadInput) as said:
        act()
    assert "\n" not in str(said.value)
    assert "/" not in str(said.value)
    for word in words:
        assert word in str(said.value)


def bomb(path: Path, width: int, height: int) -> Path:
    """A PNG of some bytes that says it is huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


class TestPictures:
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_a_picture_is_written_anew(self, uploads: Path, into: Path, kind: str) -> None:
        drawn().save(uploads / f"a.{kind.lower()}", kind)
        made = picture(str(uploads / f"a.{kind.lower()}"), into)
        assert made.parent == into
        with Image.open(made) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (40, 20))
            assert image.getpixel((5, 5))[0] > 200  # type: ignore[index]

    def test_it_is_upright(self, uploads: Path, into: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        drawn().save(uploads / "a.jpg", exif=exif, quality=95)
        with Image.open(picture(str(uploads / "a.jpg"), into)) as image:
            assert image.size == (20, 40)
            assert image.getpixel((10, 2))[0] > 200  # type: ignore[index]

    def test_nothing_is_left_in_it_but_its_pixels(self, uploads: Path, into: Path) -> None:
        text = PngImagePlugin.PngInfo()
        text.add_text("place", "at home")
        exif = Image.Exif()
        exif[0x010F] = "a camera"
        drawn().save(uploads / "a.png", pnginfo=text, exif=exif, icc_profile=b"a profile")
        with Image.open(picture(str(uploads / "a.png"), into)) as image:
            image.load()
            assert image.info == {}

    def test_one_that_a_long_comparison_reads_stays_while_some_others_are_chosen(
        self, uploads: Path, into: Path
    ) -> None:
        made = []
        for side in range(8, 20):
            drawn(side).save(uploads / "a.png")
            made.append(picture(str(uploads / "a.png"), into))
        assert all(path.exists() for path in made)

    def test_several_can_be_chosen_at_once(self, uploads: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "KEPT", 1)
        for number in range(24):
            drawn(8 + number).save(uploads / f"{number}.png")
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda number: picture(str(uploads / f"{number}.png"), into), range(24)))
        assert len(set(made)) == 24
        assert len(list(into.iterdir())) == 1

    def test_the_same_picture_is_the_same_file_and_the_last_few_stay(
        self, uploads: Path, into: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "KEPT", 2)
        made = []
        for side in (8, 16, 24):
            drawn(side).save(uploads / "a.png")
            made.append(picture(str(uploads / "a.png"), into))
            os.utime(made[-1], (side, side))
        again = picture(str(uploads / "a.png"), into)
        assert again == made[-1]
        assert sorted(into.iterdir()) == sorted(made[1:])

    def test_it_is_decoded_once(self, uploads: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn().save(uploads / "a.png")
        made = picture(str(uploads / "a.png"), into)
        monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was read again"))
        assert picture(str(uploads / "a.png"), into) == made

    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    def test_a_larger_one_than_is_ever_made_is_made_smaller(
        self, uploads: Path, into: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        monkeypatch.setattr(module, "SIDE", 50)
        exif = Image.Exif()
        exif[0x0112] = 6
        drawn(400, 200).save(uploads / "a.png", kind, exif=exif)
        with Image.open(picture(str(uploads / "a.png"), into)) as image:
            assert image.size == (25, 50)

    def test_one_that_moves_is_refused(self, uploads: Path, into: Path) -> None:
        drawn().save(uploads / "a.png", save_all=True, append_images=[drawn().rotate(90)])
        refused(lambda: picture(str(uploads / "a.png"), into), "a.png is an animation")

    def test_more_pixels_than_any_use_are_refused_before_they_are_read(self, uploads: Path, into: Path) -> None:
        file = bomb(uploads / "a.png", 10_000, 5_001)
        refused(lambda: picture(str(file), into), "a.png", "10000x5001", "50 million")

    def test_so_are_those_that_pillow_itself_would_refuse(self, uploads: Path, into: Path) -> None:
        file = bomb(uploads / "a.png", 60_000, 60_000)
        refused(lambda: picture(str(file), into), "a.png", "50 million")

    def test_a_damaged_one_is_a_line(self, uploads: Path, into: Path) -> None:
        drawn(400, 400).save(uploads / "a.png")
        data = (uploads / "a.png").read_bytes()
        (uploads / "a.png").write_bytes(data[: len(data) // 2])
        refused(lambda: picture(str(uploads / "a.png"), into), "a.png is damaged")

    @pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
    def test_other_kinds_are_refused_whatever_they_are_called(self, uploads: Path, into: Path, kind: str) -> None:
        drawn().save(uploads / "a.png", kind)
        refused(lambda: picture(str(uploads / "a.png"), into), "a.png is no PNG, JPEG or WebP")

    def test_what_is_refused_leaves_nothing(self, uploads: Path, into: Path) -> None:
        (uploads / "a.png").write_bytes(b"")
        refused(lambda: picture(str(uploads / "a.png"), into))
        assert list(into.iterdir()) == []


class TestFilesMadeEarlier:
    def test_the_record_of_a_picture(self, uploads: Path) -> None:
        save.write_png(drawn(), uploads / "a.png", record())
        assert made_here(str(uploads / "a.png")) == json.loads(json.dumps(record()))

    @pytest.mark.parametrize("suffix", [".mp4", ".gif"])
    def test_the_record_of_a_clip(self, uploads: Path, suffix: str) -> None:
        from fractions import Fraction

        with video_writer.writers(uploads / f"a{suffix}", None, fps=Fraction(8), record=record()) as writers:
            for writer in writers:
                writer.add(np.zeros((32, 32, 3), dtype=np.uint8) + 99)
        assert made_here(str(uploads / f"a{suffix}"))["prompt"] == "a fox"

    def test_a_huge_one_made_here_is_not_decoded(self, uploads: Path) -> None:
        """A command makes larger pictures than visitors may bring, and says first how."""
        save.write_png(Image.new("RGB", (8, 8)), uploads / "small.png", record())
        data = (uploads / "small.png").read_bytes()
        huge = bomb(uploads / "huge.png", 16_000, 16_000).read_bytes()
        text = data[33 : data.index(b"IDAT") - 4]
        (uploads / "a.png").write_bytes(huge[:33] + text + huge[33:])
        assert made_here(str(uploads / "a.png"))["prompt"] == "a fox"

    def test_a_huge_one_of_another_program_is_refused(self, uploads: Path) -> None:
        file = bomb(uploads / "a.png", 16_000, 16_000)
        refused(lambda: made_here(str(file)), "a.png", "50 million")

    def test_one_of_another_program(self, uploads: Path) -> None:
        drawn().save(uploads / "a.png")
        refused(lambda: made_here(str(uploads / "a.png")), "a.png", "no attnswap metadata")

    def test_a_record_that_is_none(self, uploads: Path) -> None:
        save.write_png(drawn(), uploads / "a.png", {**record(), "steps": "many"})
        refused(lambda: made_here(str(uploads / "a.png")), "steps is 'many'")

    @pytest.mark.parametrize("name", ["a.txt", "a", "a.safetensors"])
    def test_another_kind(self, uploads: Path, name: str) -> None:
        (uploads / name).write_bytes(b"abc")
        refused(lambda: made_here(str(uploads / name)), f"{name} is no PNG, MP4 or GIF")

    @pytest.mark.parametrize("name", ["a.png", "a.mp4", "a.gif"])
    def test_a_damaged_one(self, uploads: Path, name: str) -> None:
        (uploads / name).write_bytes(b"abc")
        refused(lambda: made_here(str(uploads / name)), name)

    def test_a_playlist_that_is_called_a_clip_is_not_followed(self, uploads: Path, tmp_path: Path) -> None:
        from fractions import Fraction

        with video_writer.writers(tmp_path / "a.mp4", None, fps=Fraction(8), record=record()) as writers:
            for writer in writers:
                writer.add(np.zeros((32, 32, 3), dtype=np.uint8))
        (uploads / "a.mp4").write_text(f"ffconcat version 1.0\nfile {tmp_path / 'a.mp4'}\n")
        refused(lambda: made_here(str(uploads / "a.mp4")), "not a readable MP4")

    def test_a_huge_one_with_an_empty_record_is_not_decoded(self, uploads: Path) -> None:
        text = b"attnswap\0\0\0\0\0"
        chunk = struct.pack(">I", len(text)) + b"iTXt" + text + struct.pack(">I", zlib.crc32(b"iTXt" + text))
        huge = bomb(uploads / "a.png", 16_000, 16_000).read_bytes()
        (uploads / "a.png").write_bytes(huge[:33] + chunk + huge[33:])
        refused(lambda: made_here(str(uploads / "a.png")), "a.png", "50 million")

    def test_one_that_moves_is_not_decoded(self, uploads: Path) -> None:
        drawn().save(uploads / "a.png", save_all=True, append_images=[drawn().rotate(90)])
        refused(lambda: made_here(str(uploads / "a.png")), "a.png is an animation")

    @pytest.mark.parametrize("value", [10**4000, 2**64, "\ud800"])
    def test_what_a_page_cannot_show_of_other_programs_is_text(self, uploads: Path, value: Any) -> None:
        found = stored(uploads, extra=value, more="of theirs")
        assert isinstance(found["extra"], str)
        assert len(found["extra"]) <= 101
        assert found["more"] == "of theirs"
        orjson.dumps(found)

    def test_a_setting_that_no_page_can_show_is_refused(self, uploads: Path) -> None:
        refused(lambda: stored(uploads, seed=10**4000), "a.png: seed is out of range")

    def test_a_record_of_a_megabyte_is_refused(self, uploads: Path) -> None:
        refused(lambda: stored(uploads, extra="x" * 10**6), "a.png says 1000", "characters")


def stored(uploads: Path, **more: Any) -> dict[str, Any]:
    """What is read of a picture whose record says more, or otherwise."""
    text = PngImagePlugin.PngInfo()
    text.add_text("attnswap", json.dumps({**record(), **more}), zip=True)
    drawn().save(uploads / "a.png", pnginfo=text)
    return made_here(str(uploads / "a.png"))


class TestRoom:
    def test_is_for_so_many_bytes(self, uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MOST", 1000)
        (uploads / "a").mkdir()
        (uploads / "a" / "b.png").write_bytes(bytes(400))
        room = Room(uploads)
        assert room.take(500)
        assert not room.take(101)
        assert room.take(100)

    def test_is_counted_again_after_a_while(self, uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MOST", 1000)
        room = Room(uploads)
        assert room.take(1000)
        room.release(1000)
        assert not room.take(1)
        monkeypatch.setattr(module, "RECOUNT", -1.0)
        assert room.take(1)

    def test_is_kept_for_what_is_still_on_its_way(self, uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MOST", 1000)
        monkeypatch.setattr(module, "RECOUNT", -1.0)
        room = Room(uploads)
        assert room.take(600)
        assert not room.take(600)
        room.release(600)
        assert room.take(600)

    def test_is_made_by_removing_what_is_old(self, uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of each kind alone: what was never finished, and what was; Gradio forgets some of both."""
        monkeypatch.setattr(module, "MOST", 1000)
        (uploads / "a").mkdir()
        finished, unfinished = uploads / "a" / "b.png", uploads / "tmp1"
        for file in (finished, unfinished):
            file.write_bytes(bytes(450))
        assert not Room(uploads).take(500)
        monkeypatch.setattr(module, "UNFINISHED", -1.0)
        assert Room(uploads).take(500)
        assert (finished.exists(), unfinished.exists()) == (True, False)
        assert not Room(uploads).take(600)
        monkeypatch.setattr(module, "LATE", -1.0)
        assert Room(uploads).take(600)
        assert not finished.exists()

    def test_is_made_sooner_where_there_is_little(self, uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The oldest go, and no more than need to."""
        monkeypatch.setattr(module, "MOST", 1000)
        monkeypatch.setattr(module, "SOON", -1.0)
        (uploads / "a").mkdir()
        files = [uploads / "a" / f"{number}.png" for number in range(3)]
        for file in files:
            file.write_bytes(bytes(300))
            time.sleep(0.02)
        assert Room(uploads).take(400)
        assert [file.exists() for file in files] == [False, False, True]

    def test_is_none_where_the_disk_is_nearly_full(self, uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=module.SPARE + 10))
        assert Room(uploads).take(10)
        assert not Room(uploads).take(11)


@pytest.mark.parametrize("read", [lambda path, into: picture(path, into), lambda path, into: made_here(path)])
class TestWhatWasNotUploaded:
    @pytest.mark.parametrize(
        "path", ["/etc/passwd", "a.png", "", "\0", "http://example.com/a.png", "x" * 5000, None, 7]
    )
    def test_a_path_of_this_machine_is_not_opened(
        self, uploads: Path, into: Path, read: Any, path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was opened"))
        refused(lambda: read(path, into), "not uploaded here")

    def test_nor_is_one_that_goes_out_of_the_folder(self, uploads: Path, into: Path, read: Any) -> None:
        save.write_png(drawn(), uploads.parent / "secret.png", record())
        refused(lambda: read(str(uploads / ".." / "secret.png"), into), "not uploaded here")
        (uploads / "a.png").symlink_to(uploads.parent / "secret.png")
        refused(lambda: read(str(uploads / "a.png"), into), "not uploaded here")

    def test_nor_is_any_where_there_are_no_uploads(
        self, uploads: Path, into: Path, read: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save.write_png(drawn(), uploads / "a.png", record())
        monkeypatch.delenv("GRADIO_TEMP_DIR")
        refused(lambda: read(str(uploads / "a.png"), into), "not uploaded here")
