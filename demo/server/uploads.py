"""What visitors bring: pictures to begin with, and files made earlier. Nothing is opened but uploads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
from PIL import Image, ImageOps

from ...pipelines import job, save
from ...pipelines.errors import BadInput
from ...pipelines.image_input import PICTURES
from ...pipelines.names import SHOWN
from ...pipelines.printable import printable
from .limits import Limits
from .live import without_folders

MAX_PIXELS = 50_000_000
#: Bytes of any file, for Gradio, which counts while it receives.
MAX_BYTES = 100 * 2**20
# Of one visitor, in one folder: many more than anybody chooses during a comparison, which reads its own for every run.
KEPT = 32
BEGIN = "picture-"
# Pixels of a side; a larger picture is made smaller, as nothing larger is made of it.
SIDE = Limits.max_size
# Characters of a record, with the prompts of all that shared a call.
MAX_RECORD = 2**18
# Bytes that a disk keeps free; those that uploads and what Gradio copies beside them take at most; the seconds between
# two looks at how much that is.
SPARE, MOST, RECOUNT = 2 * 2**30, 4 * 2**30, 10.0
# Seconds after which one of these goes that nothing more has come of, any that has not been given out for so long, and
# where more than half of the room is taken.
UNFINISHED, LATE, SOON = 600.0, 24 * 3600.0, 3600.0
# A picture takes some hundred megabytes while it is read, however small its file.
_READING = threading.Lock()


class Room:
    """On the disk.

    Args:
        folder: of Gradio's cache; everything in it counts, and goes when it is old. It need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._counting, self._guard = threading.Lock(), threading.Lock()
        self._held = self._coming = 0
        self._counted: float | None = None

    def take(self, length: int) -> bool:
        """Whether there is room for a file of so many bytes, for which it is kept until `release`."""
        with self._counting:
            if self._counted is None or time.monotonic() - self._counted > RECOUNT:
                held = _cleared(self._folder)
                with self._guard:
                    self._held, self._counted = held, time.monotonic()
        with self._guard:
            wanted = self._coming + length
            if self._held + wanted > MOST or shutil.disk_usage(self._folder).free - wanted < SPARE:
                return False
            self._coming = wanted
            return True

    def release(self, length: int) -> None:
        """The file is there, or will not come. Never waits for a look at the disk."""
        with self._guard:
            self._coming -= length
            self._held += length  # until they are counted


def _cleared(folder: Path) -> int:
    """The bytes in the folder once what is old is removed, of which Gradio forgets some."""
    files: list[tuple[float, int, str]] = []
    now = time.time()
    for where, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(where, name)
            with suppress(OSError):  # gone meanwhile
                found = os.lstat(path)
                # Gradio copies the time of the last change, too, but not this one.
                files.append((now - found.st_ctime, found.st_size, path))
    total = sum(size for _, size, _ in files)
    for age, size, path in sorted(files, reverse=True):
        unfinished = os.path.dirname(path) == str(folder)
        if age > (UNFINISHED if unfinished else SOON if total > MOST / 2 else LATE):
            with suppress(OSError):
                os.unlink(path)
                total -= size
    return total


def picture(path: str, into: Path) -> Path:
    """The uploaded picture as a PNG in `into`: upright, in RGB, with nothing in it but its pixels.

    The folder keeps the last `KEPT` of them.

    Raises:
        BadInput: no upload, no PNG, JPEG or WebP, damaged, or of more than `MAX_PIXELS`.
    """
    file = _uploaded(path)
    found = file.stat()
    # Of the same name for the same upload: then it is read once, and nothing is made of it twice.
    name = hashlib.sha256(
        f"{file}\n{found.st_mtime_ns}\n{found.st_size}".encode("utf-8", "surrogateescape")
    ).hexdigest()
    target = into / f"{BEGIN}{name[:16]}.png"
    with _READING:
        if target.exists():
            os.utime(target)
            return target
        with _in_a_line(file), Image.open(file, formats=PICTURES) as opened:
            _check_pixels(file, opened)
            opened.draft("RGB", (SIDE, SIDE))
            image: Image.Image = opened if opened.mode == "RGB" else opened.convert("RGB")
            image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            image = ImageOps.exif_transpose(image)
        image.info = {}
        with save.atomic(target) as written:
            image.save(written, format="PNG", compress_level=1)
        earlier = sorted(into.glob(f"{BEGIN}*.png"), key=lambda other: other.stat().st_mtime_ns, reverse=True)
        for old in earlier[KEPT:]:
            old.unlink(missing_ok=True)
    return target


def made_here(path: str) -> dict[str, Any]:
    """The record in an uploaded PNG, MP4 or GIF, with all that `job.from_record` asks for.

    Raises:
        BadInput: no upload, no such file, damaged, or made by another program.
    """
    file = _uploaded(path)
    kind = file.suffix.lower()
    with _in_a_line(file):
        if kind == ".png":
            with save.open_png(file) as image:
                if not image.info.get(save.KEY):  # then it is looked for behind the pixels
                    _check_pixels(file, image)
        elif kind not in (".mp4", ".gif"):
            raise BadInput(f"{file.name} is no PNG, MP4 or GIF.")
        record = save.read_record(file)
        if "compare" in record:
            raise BadInput(f"{file.name} is a comparison; any one of its pictures or clips will do.")
        job.from_record(record)
        return _shown(file, record)


def _shown(file: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record as a page can show it: with text in place of what another program has added that JSON cannot say.

    Raises:
        BadInput: it is very long, or one of the settings is a number, or a text, that none of ours is.
    """
    if (length := len(json.dumps(record))) > MAX_RECORD:
        raise BadInput(f"{file.name} says {length} characters of how it was made; {MAX_RECORD} are the most.")
    known = {*job.RECORDED, *job.ADDED, "asked"}
    shown = {}
    for name, value in record.items():
        try:
            orjson.dumps({name: value})  # as Gradio does
            shown[name] = value
        except orjson.JSONEncodeError:
            if name in known:
                raise BadInput(f"{file.name}: {name} is out of range.") from None
            shown[printable(name, SHOWN)] = printable(str(value), SHOWN)
    return shown


def _uploaded(path: str) -> Path:
    """
    Raises:
        BadInput: it does not lie where Gradio keeps uploads.
    """
    folder = os.environ.get("GRADIO_TEMP_DIR")
    try:
        file = Path(path).resolve()
        if folder and file.is_relative_to(Path(folder).resolve()) and file.is_file():
            return file
    except (OSError, ValueError, TypeError, RuntimeError):  # no path at all, a NUL in it, links in a circle
        pass
    raise BadInput("this file was not uploaded here.")


def _check_pixels(file: Path, image: Image.Image) -> None:
    if getattr(image, "is_animated", False):  # the text behind its pixels is read by decoding all of them
        raise BadInput(f"{file.name} is an animation, not a picture.")
    if image.width * image.height > MAX_PIXELS:
        raise BadInput(
            f"{file.name} has {image.width}x{image.height} pixels; {MAX_PIXELS // 1_000_000} million are the most."
        )


@contextmanager
def _in_a_line(file: Path) -> Iterator[None]:
    try:
        yield
    except BadInput as error:
        raise BadInput(without_folders(str(error))) from error
    except Image.DecompressionBombError:
        raise BadInput(f"{file.name} has more pixels than {MAX_PIXELS // 1_000_000} million.") from None
    except Image.UnidentifiedImageError:
        raise BadInput(f"{file.name} is no PNG, JPEG or WebP.") from None
    except save.UNREADABLE as error:
        raise BadInput(f"{file.name} is damaged: {without_folders(str(error))}") from error
