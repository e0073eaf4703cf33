"""Pictures on disk: written whole or not at all, and carrying all that is needed to make them again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from PIL import Image, PngImagePlugin

from .errors import BadInput
from .job import MAX_SIDE

KEY = "attnswap"


def check_writable(path: Path, kind: str) -> None:
    """Says now what would fail after the work: a folder that is not there or not writable, another kind of file.

    Raises:
        BadInput: with the path in it.
    """
    if path.suffix.lower() != kind:
        raise BadInput(f"{path}: the name must end in {kind}.")
    if not path.parent.is_dir():
        raise BadInput(f"{path}: the folder {path.parent} does not exist.")
    if path.is_dir():
        raise BadInput(f"{path} is a folder.")
    # Asking the system (os.access) is wrong on Windows and network shares; only trying tells.
    try:
        with atomic(path, replace=False):
            pass
    except OSError as error:
        raise BadInput(f"{path}: the folder {path.parent} is not writable ({error.strerror}).") from error


@contextmanager
def atomic(path: Path, *, replace: bool = True) -> Iterator[IO[bytes]]:
    """A file that becomes `path` when the block ends well, and leaves nothing behind when it does not."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        if replace:
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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


def read_record(path: Path) -> dict[str, Any]:
    """What `write_png` stored in the picture at `path`; its pixels are not looked at.

    Raises:
        BadInput: no such file, no PNG, or one that another program made.
    """
    try:
        with open_png(path) as image:
            # Where another program has saved the file again, the text may stand behind the pixels.
            text = image.info.get(KEY) or image.text.get(KEY)
        record = json.loads(text) if text else None
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist.") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise BadInput(f"{path} is not a readable PNG: {error}") from error
    if not isinstance(record, dict):
        raise BadInput(f"{path} does not say how it was made: it has no attnswap metadata.")
    return record


def write_json(data: dict[str, Any], path: Path) -> None:
    with atomic(path) as file:
        file.write((json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())
