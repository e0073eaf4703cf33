"""What visitors bring: pictures to begin with, and files made earlier. Nothing is opened but uploads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ...pipelines import job, save
from ...pipelines.errors import BadInput
from ...pipelines.image_input import PICTURES
from .live import without_folders

MAX_PIXELS = 50_000_000
#: Bytes of any file, for Gradio, which counts while it receives.
MAX_BYTES = 100 * 2**20
# Of one visitor, in one folder.
KEPT = 8
BEGIN = "picture-"


def picture(path: str, into: Path) -> Path:
    """The uploaded picture as a PNG in `into`: upright, in RGB, with nothing in it but its pixels.

    The folder keeps the last `KEPT` of them.

    Raises:
        BadInput: no upload, no PNG, JPEG or WebP, damaged, or of more than `MAX_PIXELS`.
    """
    file = _uploaded(path)
    with _in_a_line(file), Image.open(file, formats=PICTURES) as opened:
        _check_pixels(file, opened)
        image = ImageOps.exif_transpose(opened).convert("RGB")
    image.info = {}
    # Of the same name for the same picture: then nothing is made of it twice.
    target = into / f"{BEGIN}{hashlib.sha256(image.tobytes()).hexdigest()[:16]}.png"
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
                if save.KEY not in image.info:  # then it is looked for behind the pixels
                    _check_pixels(file, image)
        elif kind == ".mp4":
            _check_mp4(file)
        elif kind != ".gif":
            raise BadInput(f"{file.name} is no PNG, MP4 or GIF.")
        record = save.read_record(file)
        if "compare" in record:
            raise BadInput(f"{file.name} is a comparison; any one of its pictures or clips will do.")
        job.from_record(record)
    return record


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
    if image.width * image.height > MAX_PIXELS:
        raise BadInput(
            f"{file.name} has {image.width}x{image.height} pixels; {MAX_PIXELS // 1_000_000} million are the most."
        )


def _check_mp4(file: Path) -> None:
    """FFmpeg goes by what is in a file, not by its name, and a playlist would have it open others.

    Raises:
        BadInput: it does not begin as an MP4 does.
    """
    with file.open("rb") as opened:
        if opened.read(8)[4:] != b"ftyp":
            raise BadInput(f"{file.name} is not a readable MP4.")


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
