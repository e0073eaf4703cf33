"""Files on disk: written whole or not at all, and the record in them by which they are made again."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from PIL import GifImagePlugin, Image, PngImagePlugin

from .errors import BadInput
from .job import MAX_SIDE

KEY = "attnswap"
_PART = re.compile(r"\.(.+?)(\.\d+(-[0-9a-f]+)?)?\.part")
# What is raised for a file that is damaged, or written to do harm.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    RecursionError,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
)


def check_writable(path: Path, *kinds: str) -> None:
    """Says now what would fail after the work: a folder that is not there or not writable, another kind of file.

    Raises:
        BadInput: with the path in it.
    """
    if path.suffix.lower() not in kinds:
        raise BadInput(f"{path}: the name must end in {' or '.join(kinds)}.")
    if path.is_dir():
        raise BadInput(f"{path} is a folder.")
    check_folder(path)


def check_folder(path: Path) -> None:
    """
    Raises:
        BadInput: the folder that `path` is to be in is not there, or not writable.
    """
    if not path.parent.is_dir():
        raise BadInput(f"{path}: the folder {path.parent} does not exist.")
    # Asking the system (os.access) is wrong on Windows and network shares; only trying tells.
    try:
        with atomic(path, replace=False):
            pass
    except OSError as error:
        raise BadInput(f"{path}: the folder {path.parent} is not writable ({error.strerror}).") from error


@contextmanager
def atomic(path: Path, *, replace: bool = True) -> Iterator[IO[bytes]]:
    """A file that becomes `path` when the block ends well, and leaves nothing behind when it does not."""
    with atomic_path(path, replace=replace) as part, part.open("wb") as file:
        yield file


@contextmanager
def atomic_path(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """The same for what is written by name."""
    # On a shared folder, processes of two containers often have the same number.
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield part
        if replace:
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: Collection[str]) -> None:
    """What processes that were killed have left of files in `folder`; nobody else may be writing one of `names`."""
    for name in os.listdir(folder):
        if (part := _PART.fullmatch(name)) and part[1] in names:
            (folder / name).unlink(missing_ok=True)


def write_png(image: Image.Image, path: Path, record: dict[str, Any]) -> None:
    """Writes `image` with `record` as JSON in an iTXt chunk named "attnswap"."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt(KEY, json.dumps(record, ensure_ascii=False))
    with atomic(path) as file:
        image.save(file, format="PNG", pnginfo=text)


def open_png(path: Path) -> PngImagePlugin.PngImageFile:
    """The PNG at `path`, of any size that can be asked for; no pixel is read yet.

    `Image.open` would warn from 89 megapixels on and refuse from 179; its limit can only be moved for all threads.

    Raises:
        OSError, SyntaxError: no such file, no PNG, or one with more pixels than any picture of ours.
    """
    image = PngImagePlugin.PngImageFile(path)
    if image.width * image.height > MAX_SIDE**2:
        image.close()
        raise OSError(f"{image.width}x{image.height} are more pixels than {MAX_SIDE}x{MAX_SIDE}")
    return image


@contextmanager
def open_mp4(path: Path) -> Iterator[Any]:
    """PyAV's container of the MP4 at `path`.

    Raises:
        UNREADABLE: no such file, no MP4, or a damaged one.
    """
    import av

    try:
        # Said, as FFmpeg goes by what is in a file: a playlist by this name would have it open others.
        with av.open(str(path), format="mov") as container:
            yield container
    except av.FFmpegError as error:
        if isinstance(error, UNREADABLE):
            raise
        raise OSError(str(error)) from error


def read_record(path: Path) -> dict[str, Any]:
    """What `write_png` or a writer of clips stored in the file at `path`; its pixels are not looked at.

    Raises:
        BadInput: no such file, none of these kinds, or one that another program made.
    """
    kind = path.suffix.lower()
    if kind == ".mp4":
        require_av(path)
    read = {".mp4": _mp4_text, ".gif": _gif_text}.get(kind, _png_text)
    try:
        text = read(path)
        record = json.loads(text) if text else None
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist.") from None
    except UNREADABLE as error:
        name = kind[1:].upper() if kind in (".mp4", ".gif") else "PNG"
        raise BadInput(f"{path} is not a readable {name}: {error}") from error
    if not isinstance(record, dict):
        raise BadInput(f"{path} does not say how it was made: it has no attnswap metadata.")
    return record


def _png_text(path: Path) -> str | None:
    image = open_png(path)
    with image:
        # Where another program has saved the file again, the text may stand behind the pixels.
        return image.info.get(KEY) or image.text.get(KEY)


def _gif_text(path: Path) -> str | None:
    with GifImagePlugin.GifImageFile(path) as image:
        comment = image.info.get("comment", b"")
    return comment.decode() if comment.startswith(b"{") else None


def _mp4_text(path: Path) -> str | None:
    with open_mp4(path) as container:
        text: str | None = container.metadata.get(KEY)
        return text


def has_av() -> bool:
    return importlib.util.find_spec("av") is not None


def require_av(path: Path, instead: str = "") -> None:
    """
    Args:
        instead: what else would do, as the end of the message.

    Raises:
        BadInput: PyAV, which reads and writes MP4, is not installed.
    """
    if not has_av():
        raise BadInput(f'{path}: MP4 needs PyAV, which is not installed: pip install "attnswap[video]"{instead}.')


def write_json(data: dict[str, Any], path: Path) -> None:
    with atomic(path) as file:
        file.write((json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())
