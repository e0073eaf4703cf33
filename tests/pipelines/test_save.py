"""Pictures are written whole or not at all, and tell how they were made."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path

import pytest
from attnswap.pipelines import save
from attnswap.pipelines.errors import BadInput
from PIL import Image, PngImagePlugin

RECORD = {"prompt": 'ein Füchslein 🦊 "in" quotes\nand lines', "seed": 1}


@pytest.fixture
def picture() -> Image.Image:
    return Image.linear_gradient("L")


def test_a_record_survives_the_file(picture: Image.Image, tmp_path: Path) -> None:
    save.write_png(picture, tmp_path / "a.png", RECORD)
    assert save.read_record(tmp_path / "a.png") == RECORD
    assert Image.open(tmp_path / "a.png").tobytes() == picture.tobytes()


def test_other_programs_can_read_the_record(picture: Image.Image, tmp_path: Path) -> None:
    save.write_png(picture, tmp_path / "a.png", RECORD)
    chunk = Image.open(tmp_path / "a.png").info["attnswap"]
    assert isinstance(chunk, PngImagePlugin.iTXt)


def test_a_failed_write_leaves_the_old_picture_and_nothing_else(picture: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save.write_png(picture, path, RECORD)
    before = path.read_bytes()

    def interrupted() -> None:
        with save.atomic(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


def test_the_picture_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    with save.atomic(tmp_path / "a.png") as file:
        file.write(b"half")
        assert not (tmp_path / "a.png").exists()
    assert (tmp_path / "a.png").exists()


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_the_picture_has_the_permissions_of_any_other_new_file(picture: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    save.write_png(picture, tmp_path / "a.png", RECORD)
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    save.check_writable(tmp_path / "a.png", ".png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "reason"), [("no/a.png", "does not exist"), ("a.gif", r"end in \.png"), ("folder.png", "is a folder")]
)
def test_a_place_that_cannot_be_written(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(BadInput, match=reason):
        save.check_writable(tmp_path / name, ".png")


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_a_record_that_is_none(picture: Image.Image, tmp_path: Path, text: str) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("attnswap", text)
    picture.save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(BadInput, match=r"a\.png"):
        save.read_record(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_picture(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(BadInput, match="not a readable PNG"):
        save.read_record(tmp_path / "a.png")


def test_a_picture_cut_off_in_its_record(picture: Image.Image, tmp_path: Path) -> None:
    save.write_png(picture, tmp_path / "a.png", RECORD)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: whole.index(b"iTXt") + 20])
    with pytest.raises(BadInput, match="not a readable PNG"):
        save.read_record(tmp_path / "a.png")


def test_a_picture_cut_off_behind_its_record_still_tells_it(picture: Image.Image, tmp_path: Path) -> None:
    save.write_png(picture, tmp_path / "a.png", RECORD)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: whole.index(b"IDAT") + 20])
    assert save.read_record(tmp_path / "a.png") == RECORD


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def claiming(width: int, height: int) -> bytes:
    """A PNG of that size with `{"seed": 1}` as its record and hardly a pixel."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    text = b"attnswap\0\0\0\0\0" + b'{"seed": 1}'
    chunks = [chunk(b"IHDR", header), chunk(b"iTXt", text), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("size", [(16384, 16384), (16384, 8192)])
def test_the_largest_pictures_tell_their_record_without_a_warning(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "a.png").write_bytes(claiming(*size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert save.read_record(tmp_path / "a.png") == {"seed": 1}
        with save.open_png(tmp_path / "a.png") as image:
            assert image.size == size


def test_a_picture_larger_than_any_of_ours_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(claiming(16385, 16384))
    with pytest.raises(BadInput, match="16385x16384 are more pixels than 16384x16384"):
        save.read_record(tmp_path / "a.png")


def test_a_record_behind_the_pixels_is_found(picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    text = chunk(b"iTXt", b'attnswap\0\0\0\0\0{"seed": 1}')
    (tmp_path / "a.png").write_bytes(whole[:-12] + text + whole[-12:])
    assert save.read_record(tmp_path / "a.png") == {"seed": 1}


def test_a_file_of_another_kind_that_is_called_an_mp4_is_not_read(tmp_path: Path) -> None:
    """FFmpeg would go by what is in it, and a playlist would have it open others."""
    import av

    with av.open(str(tmp_path / "a.mp4"), "w", format="matroska") as container:
        container.metadata["attnswap"] = '{"seed": 1}'
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(stream.encode(None))
    with pytest.raises(BadInput, match="not a readable MP4"):
        save.read_record(tmp_path / "a.mp4")
