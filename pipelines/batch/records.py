"""The text of a manifest → its rows, as values by the names of fields that nobody has looked at yet."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import BadInput, near

FIELDS = (
    "prompt", "negative", "seed", "width", "height", "frames", "fps", "steps", "guidance", "method", "settings",
    "image", "strength", "id",
)  # fmt: skip
MAX_ROWS = 100_000
SHOWN = 200
# The longer first, as they begin like the shorter.
OTHER_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


@dataclass(frozen=True)
class Problem:
    """What is wrong in the row that begins at `line`, counted from 1."""

    line: int
    text: str


@dataclass(frozen=True)
class Record:
    """A row as it is written; `problem` says why it cannot be read."""

    line: int
    values: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def read_records(path: Path) -> tuple[list[Record], list[Problem]]:
    """The rows of a manifest, and what is wrong with the header of a CSV.

    Raises:
        BadInput: no such file, of another kind, not UTF-8, without rows or with too many of them.
    """
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".csv", ".txt"):
        raise BadInput(f"{path}: the name of a manifest must end in .jsonl, .csv or .txt.")
    text = _text(path)
    problems: list[Problem] = []
    rows = _csv(path, text, problems) if kind == ".csv" else _lines(text, as_json=kind == ".jsonl")
    records = list(islice(rows, MAX_ROWS + 1))
    if not records:
        raise BadInput(f"{path} has no rows: nothing to make.")
    if len(records) > MAX_ROWS:
        raise BadInput(f"{path} has more than {MAX_ROWS} rows: split it.")
    return records, problems


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist.") from None
    except IsADirectoryError:
        raise BadInput(f"{path} is a folder.") from None
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        raise BadInput(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    for mark, name in OTHER_ENCODINGS:
        if data.startswith(mark):
            raise BadInput(f"{path} is {name}: save it as UTF-8.")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        line, place = before.count(b"\n") + 1, len(before) - before.rfind(b"\n")
        raise BadInput(
            f"{path}:{line}: byte {place} of the line, 0x{data[error.start]:02X}, is not UTF-8: "
            "save the manifest as UTF-8."
        ) from None


def _lines(text: str, *, as_json: bool) -> Iterator[Record]:
    # Not str.splitlines, which also ends lines where a prompt may have a form feed or a Unicode line separator.
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if not line.strip():
            continue
        if not as_json:
            yield Record(number, {"prompt": line.removesuffix("\n")})
            continue
        try:
            yield Record(number, _object(line.rstrip()))
        except json.JSONDecodeError as error:
            yield Record(number, problem=f"no JSON, at column {error.colno}: {error.msg}.")
        except (ValueError, RecursionError) as error:
            yield Record(number, problem=f"not readable: {error}.")


def _object(line: str) -> dict[str, Any]:
    values = json.loads(line, object_pairs_hook=_once)
    if not isinstance(values, dict):
        raise ValueError('a line must be an object, such as {"prompt": "a fox"}')
    # `null` is: not given.
    return {name: value for name, value in values.items() if value is not None}


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name!r} is there twice")
        values[name] = value
    return values


def _csv(path: Path, text: str, problems: list[Problem]) -> Iterator[Record]:
    """The rows below the header, as RFC 4180 quotes them; what is wrong with the header goes to `problems`.

    Raises:
        BadInput: there is no header.
    """
    # Where the comma is for decimals, spreadsheets write semicolons between the cells.
    first = text.lstrip().partition("\n")[0]
    delimiter = next((sign for sign in ",;\t" if sign in first), ",")
    rows = _cells(text, delimiter)
    line, cells, wrong = next(rows, (1, [], ""))
    names = [name.strip() for name in cells]
    if "prompt" not in names:
        found = wrong or f"found {', '.join(repr(name) for name in names) or 'nothing'}"[:SHOWN]
        raise BadInput(f"{path}:{line}: the first line of a CSV names the fields, prompt among them; {found}.")
    for name in dict.fromkeys(names):
        if name and name not in FIELDS:
            problems.append(Problem(line, f"unknown field {name!r}.{near(name, FIELDS)}"))
        elif name and names.count(name) > 1:
            problems.append(Problem(line, f"{name!r} is there {names.count(name)} times."))
    for line, cells, wrong in rows:
        wrong = wrong or _misfit(cells, names, delimiter)
        known = [(name, cell) for name, cell in zip(names, cells, strict=False) if name in FIELDS and cell.strip()]
        yield Record(line, dict(known), wrong and f"{wrong}.")


def _cells(text: str, delimiter: str) -> Iterator[tuple[int, list[str], str]]:
    """The line where each row begins, its cells, and what is wrong with it; rows of blank cells are left out."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line, cells, wrong = reader.line_num + 1, [""], ""
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            until = f", up to line {reader.line_num}" if reader.line_num > line else ""
            wrong = f"no CSV{until}: {error}"
        if wrong or any(cell.strip() for cell in cells):
            yield line, cells, wrong


def _misfit(cells: Sequence[str], names: Sequence[str], delimiter: str) -> str:
    """Why the cells do not fit below the header; fewer do, as programs leave out empty ones at the end."""
    names = [*names, *[""] * (len(cells) - len(names))]
    if all(name or not cell.strip() for name, cell in zip(names, cells, strict=False)):
        return ""
    sign = {"\t": "tab", ",": "comma", ";": "semicolon"}[delimiter]
    return (
        f"{len(cells)} cells, but the header names {sum(map(bool, names))} fields: "
        f"a cell with a {sign} in it needs quotes around it"
    )
