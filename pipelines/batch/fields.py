"""A row's values → the job it asks for, with everything that is wrong in it."""

from __future__ import annotations

import dataclasses
import json
import re
import reprlib
import unicodedata
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from .. import clip, resolve, settings
from ..errors import BadInput, near
from ..image_input import PICTURES
from ..job import Job
from .records import FIELDS

DENSE = ("none", "dense")
# 2^63 has 19 digits; spreadsheets and data frames write 12.0 for 12.
WHOLE = re.compile(r"[-+]?\d{1,20}(\.0+)?")
# A file name with its ending and the marks of a part being written must stay below the 255 bytes of file systems.
MAX_ID_BYTES = 120
NOT_IN_IDS = '/\\:*?"<>|'
WINDOWS_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
OWN_NAMES = re.compile(r"results(\..*)?", re.IGNORECASE)


class RowReader:
    """Reads the rows of one manifest.

    Args:
        defaults: for what a row does not say.
        folder: of the manifest, where the paths of pictures begin.
    """

    def __init__(self, defaults: Job, folder: Path) -> None:
        self._defaults, self._folder = defaults, folder
        # Most rows say of methods and pictures what others say.
        self._seen: dict[Path, str] = {}
        self._chosen: dict[str, dict[str, dict[str, Any]]] = {}

    def read(self, values: Mapping[str, Any]) -> tuple[Job, list[str]]:
        """The job of a row, and what is wrong with it; with anything wrong, the job is not to be used.

        Args:
            values: by field, without those not given. `id` is not looked at; see `read_id`.
        """
        problems = [f"unknown field {_shown(name)}.{near(name, FIELDS)}" for name in values if name not in FIELDS]
        fields: dict[str, Any] = {}
        readers: dict[str, Callable[[str, Any], Any]] = {
            "prompt": _prompt,
            "negative": _text,
            "fps": _rate,
            "image": self._picture,
            **dict.fromkeys(("seed", "width", "height", "frames", "steps"), _whole),
            **dict.fromkeys(("guidance", "strength"), _number),
        }
        for name, reader in readers.items():
            if name in values:
                try:
                    fields[name] = reader(name, values[name])
                except BadInput as error:
                    problems.append(str(error))
        if "prompt" not in values:
            problems.append("no prompt.")
        if self._defaults.image is None and "image" not in values:
            fields["strength"] = None
            if "strength" in values:
                problems.append("strength is for rows with an image.")
        try:
            fields["methods"] = self._methods(values)
        except BadInput as error:
            problems.append(str(error))
        job = dataclasses.replace(self._defaults, **fields)
        try:
            resolve.check_numbers(job)
        except BadInput as error:
            problems.append(str(error))
        return job, problems

    def _methods(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """As `--method` and `--set` do; the settings of a method that is a default, too, are changes to it."""
        method, given = values.get("method"), values.get("settings")
        if method is None and given is None:
            return self._defaults.methods
        try:
            asked = repr((method, given))
            if asked not in self._chosen:
                self._chosen[asked] = _methods(method, given, self._defaults.methods)
            return self._chosen[asked]
        except (RecursionError, MemoryError):  # of what reads and writes literals, where one is nested deeply
            raise BadInput(f"settings {_shown(given)} cannot be read.") from None

    def _picture(self, name: str, value: Any) -> Path:
        path = self._folder / _text(name, value)
        if path not in self._seen:
            self._seen[path] = why_no_picture(path)
        if self._seen[path]:
            raise BadInput(f"{name} {_shown(value)} {self._seen[path]}.")
        return path


def read_id(value: Any) -> str:
    """A row's id, from text or a number, as the name of a file on any system.

    Raises:
        BadInput: it cannot be one.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadInput(f"id {_shown(value)} is no text.")
    text = str(value)
    if reason := _why_no_name(text):
        raise BadInput(f"id {_shown(value)} cannot name a file: {reason}.")
    return text


def why_no_picture(path: Path) -> str:
    """What keeps the file from being read as a picture, as far as its header tells; '' where nothing does."""
    try:
        if not path.is_file():
            return "is no file" if path.exists() else "does not exist"
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=PICTURES) as image:
                image.verify()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return f"has more than {Image.MAX_IMAGE_PIXELS} pixels"
    except Image.UnidentifiedImageError:
        return "is no readable PNG, JPEG or WebP"
    except Exception as error:  # whatever a damaged file makes its reader stumble over
        return f"cannot be read: {getattr(error, 'strerror', None) or error or type(error).__name__}"
    return ""


def _why_no_name(text: str) -> str:
    if not text.strip():
        return "it is blank"
    if found := [sign for sign in NOT_IN_IDS if sign in text]:
        return f"{' and '.join(found)} cannot be in one"
    if any(unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") for sign in text):
        return "it has a control character"
    if ".." in text or text.startswith("."):
        return "it begins with a dot, or has two in a row"
    if text != text.strip() or text.endswith("."):
        return "it begins or ends with a space, or ends with a dot"
    if (size := len(text.encode())) > MAX_ID_BYTES:
        return f"{size} bytes are more than {MAX_ID_BYTES}"
    if WINDOWS_DEVICES.fullmatch(text):
        return "it is a device on Windows"
    if OWN_NAMES.fullmatch(text):
        return "the batch's own files are called so"
    return ""


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{name} {_shown(value)} is no text.")
    if "\0" in value:
        raise BadInput(f"{name} has a NUL character: is the manifest UTF-8, and whole?")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{name} has half a character (a lone surrogate).") from None
    return value


def _prompt(name: str, value: Any) -> str:
    text = _text(name, value)
    if not text.strip():
        raise BadInput("the prompt is blank.")
    return text


def _whole(name: str, value: Any) -> int:
    if isinstance(value, str) and WHOLE.fullmatch(value.strip()):
        return int(value.strip().partition(".")[0])
    # Above 2^53, floating point leaves whole numbers out.
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise BadInput(f"{name} {_shown(value)} is no whole number.")


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        raise BadInput(f"{name} {_shown(value)} is no number.") from None
    return number


def _rate(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadInput(f"{name} {_shown(value)} is no number such as 16, 23.976 or 24000/1001.")
    return clip.parse_fps(str(value))


def _methods(method: Any, given: Any, defaults: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    names = list(defaults) if method is None else _names(method)
    texts = [] if given is None else _settings(given)
    try:
        chosen = settings.parse(names, texts)
        methods = {name: {**defaults.get(name, {}), **changes} for name, changes in chosen.items()}
        settings.build(methods)
    except BadInput as error:
        raise BadInput(str(error).replace("--set ", "settings: ").replace("--method", "method")) from error
    return methods


def _names(value: Any) -> list[str]:
    names = [name.strip() for name in _text("method", value).split(",") if name.strip()]
    if not names:
        raise BadInput("method is blank: dense attention is called none.")
    dense = [name for name in names if name in DENSE]
    if dense and len(names) > 1:
        raise BadInput(f"method {_shown(value)}: {dense[0]} goes with no other.")
    return [] if dense else names


def _settings(value: Any) -> list[str]:
    """`KEY=VALUE` each, from an object or from text with `;` between them."""
    if isinstance(value, Mapping):
        texts = [f"{key}={given if isinstance(given, str) else json.dumps(given)}" for key, given in value.items()]
    else:
        texts = [part.strip() for part in _text("settings", value).split(";") if part.strip()]
    return [_text("settings", text) for text in texts]


def _shown(value: Any) -> str:
    """The value on a line, however long or deep it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    return short.repr(value)
