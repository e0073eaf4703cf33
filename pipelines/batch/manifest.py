"""What a batch is to make: a prompt a line, or rows of fields as JSON lines or CSV."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadInput
from ..job import Job
from .fields import RowReader, read_id
from .records import FIELDS, Problem, read_records

__all__ = ["FIELDS", "BadManifest", "Problem", "Row", "parse", "read"]

SHOWN, LONGEST = 50, 300


@dataclass(frozen=True)
class Row:
    """A picture or clip to make.

    Attributes:
        line: Where the row begins in the manifest, from 1.
        id: The name of its file, without the ending.
        job: Without `output`.
    """

    line: int
    id: str
    job: Job


class BadManifest(BadInput):
    """Everything that is wrong in a manifest, a line each.

    Args:
        rows: those that `parse` found nothing wrong with.
    """

    def __init__(self, path: Path, problems: Sequence[Problem], rows: Sequence[Row]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line))
        lines = [f"{path}:{problem.line}: {_on_a_line(problem.text)}" for problem in self.problems[:SHOWN]]
        if more := len(self.problems) - SHOWN:
            lines += [f"and {more} more."] if more > 0 else []
        bad = {problem.line for problem in self.problems}
        good = len({row.line for row in rows} - bad)
        lines.append(f"{len(bad)} {'line is' if len(bad) == 1 else 'lines are'} wrong, {good} right.")
        super().__init__("\n".join(lines))


def read(path: Path, defaults: Job) -> tuple[Row, ...]:
    """The rows of the manifest at `path`.

    Args:
        defaults: for what a row does not say.

    Raises:
        BadManifest: with all that can be seen without the model.
        BadInput: the file cannot be read at all.
    """
    rows, problems = parse(path, defaults)
    if problems:
        raise BadManifest(path, problems, rows)
    return tuple(rows)


def parse(path: Path, defaults: Job) -> tuple[list[Row], list[Problem]]:
    """The rows that nothing is wrong with, and what is wrong with the others.

    Raises:
        BadInput: the file cannot be read at all.
    """
    records, problems = read_records(path)
    reader = RowReader(defaults, path.parent)
    digits = max(4, len(str(len(records))))
    rows: list[Row] = []
    taken: dict[str, tuple[str, int]] = {}
    for number, record in enumerate(records, 1):
        if record.problem:
            problems.append(Problem(record.line, record.problem))
            continue
        job, found = reader.read(record.values)
        name = f"{number:0{digits}}"
        try:
            name = read_id(record.values.get("id", name))
        except BadInput as error:
            found.append(str(error))
        else:
            found += _taken(name, record.line, taken)
        if not found:
            rows.append(Row(record.line, name, job))
        problems += [Problem(record.line, text) for text in found]
    return rows, problems


def _taken(name: str, line: int, taken: dict[str, tuple[str, int]]) -> list[str]:
    """Enters the id in `taken`, or says where it was before."""
    # For some file systems Fox and fox are one name, and so are the two ways to write é.
    key = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    other, before = taken.setdefault(key, (name, line))
    if before == line:
        return []
    if other == name:
        return [f"id {name!r} is taken: line {before} has it, too."]
    return [f"id {name!r} is taken: for some file systems it is the same as {other!r} of line {before}."]


def _on_a_line(text: str) -> str:
    """What users wrote may be in it: line breaks, control sequences for terminals, ten thousand words."""
    text = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 100]} … {text[-100:]}"
