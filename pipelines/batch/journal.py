"""What has become of the rows of a batch: JSON lines that only ever grow, and one file of them at the end."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"
_OF_WORKER = re.compile(r"results\..+\.jsonl")
_ROUNDS = 50


class Journal:
    """The journals in `folder`, one of which this worker writes.

    Args:
        worker: Writes results.WORKER.jsonl, which no other process writes; "" writes results.jsonl itself, and must
            be alone.

    Attributes:
        path: The file that `append` writes.
    """

    def __init__(self, folder: Path, worker: str = "") -> None:
        self._folder = folder
        self.path = folder / (f"results.{worker}.jsonl" if worker else RESULTS)
        self._files: dict[Path, _Lines] = {}
        self._entries: dict[str, dict[str, Any]] = {}

    @property
    def skipped(self) -> int:
        """How many lines, as of the last look, were no entries. A last one that a kill has cut off is not counted."""
        return sum(file.skipped for file in self._files.values())

    def append(self, entry: dict[str, Any]) -> None:
        """Adds a line, which is on the disk when this returns.

        Its "time" is made later than that of every entry of the id so far, so that it counts: clocks are set back, and
        those of several machines disagree.

        Raises:
            OSError: as the system says, when the disk is full, say. A part of the line may be there; it is skipped.
        """
        known = self.latest().get(entry["id"])
        if known is not None and entry["time"] <= known["time"]:
            entry = entry | {"time": _just_after(known["time"]) or entry["time"]}
        # An error's text can hold half characters, of file names that are no UTF-8: they become \udc80, which is JSON.
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        # Opened each time, since a merge puts another file in this one's place.
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size:
                os.lseek(descriptor, size - 1, os.SEEK_SET)
                if os.read(descriptor, 1) != b"\n":  # its writer was killed
                    line = b"\n" + line
            # In one piece. A disk that fills up takes a part without an error; only the next write tells.
            while line:
                line = line[os.write(descriptor, line) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def latest(self) -> dict[str, dict[str, Any]]:
        """The last entry of each id in all journals of the folder: the last line of each journal, of those the latest
        by "time".

        Raises:
            OSError: a journal cannot be read.
        """
        known, self._files = self._files, {}  # where reading fails, the next look begins anew
        files = {path: known.get(path) or _Lines() for path in self._paths()}
        added = [file.read(path) for path, file in files.items()]
        if files.keys() != known.keys() or None in added:
            self._entries = {}
            added = [list(file.entries.values()) for file in files.values()]
        for entry in chain.from_iterable(entries or () for entries in added):
            _add(self._entries, entry)
        self._files = files
        return self._entries

    def _paths(self) -> list[Path]:
        try:
            names = os.listdir(self._folder)  # not glob, which is slow where there are ten thousand pictures
        except FileNotFoundError:
            names = []
        # results.jsonl first: of equal times, the entry of a worker counts.
        return [self._folder / name for name in (RESULTS, *sorted(filter(_OF_WORKER.fullmatch, names)))]

    def merge(self, order: Sequence[str]) -> None:
        """Makes results.jsonl hold the last entry of each id: those of `order` first, then the others as found.

        Lines that are no entries are not kept. Where there are no entries, nothing is written.

        Every worker does this at its end, several at once perhaps, and no lock is needed: results.jsonl is replaced by
        a whole file made of itself and all journals, and everyone looks again after that and starts over until it finds
        the file as it should be. So whoever wrote last has seen all that there was. The journals of workers stay: a
        kill at any moment loses nothing, and the next merge makes up for one that was cut short.

        Raises:
            OSError: results.jsonl cannot be written.
        """
        results = self._folder / RESULTS
        for _ in range(_ROUNDS):  # where others merge all the time, one of them is the last
            entries = self.latest()
            first = {id: entries[id] for id in order if id in entries}
            lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in (first | entries).values()]
            data = "".join(lines).encode("utf-8", "backslashreplace")
            if not data or _bytes_of(results) == data:
                return
            self._replace(results, data)

    def _replace(self, results: Path, data: bytes) -> None:
        # Not by `save.atomic`: on several machines, or in containers, processes with equal numbers may merge at once.
        part = self.path.with_name(f".{self.path.name}.part")
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                # Else a power cut may leave an empty file under the name, and for a batch without others this is all.
                os.fsync(file.fileno())
            os.replace(part, results)
        finally:
            part.unlink(missing_ok=True)


class _Lines:
    """The entries of one file, of which only what is new is read."""

    def __init__(self) -> None:
        self._forget(None)

    def _forget(self, inode: int | None) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.skipped = 0
        self._inode = inode
        self._end = 0
        self._last = b""

    def read(self, path: Path) -> list[dict[str, Any]] | None:
        """Reads on; gives the entries that are new, or None where what was read before counts no more."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            gone = bool(self.entries)
            self._forget(None)
            return None if gone else []
        anew = False
        with file:
            inode = os.fstat(file.fileno()).st_ino
            file.seek(self._end - len(self._last))
            # A merge may have put another file there, and a system gives inodes of deleted files again: the last line
            # that was read must be where it was.
            if inode != self._inode or file.read(len(self._last)) != self._last:
                anew = bool(self.entries)
                self._forget(inode)
                file.seek(0)
            *lines, cut_off = file.read().split(b"\n")
        added = []
        for line in lines:
            if entry := _entry(line):
                added.append(entry)
            elif line.strip():
                self.skipped += 1
            self._last = line + b"\n"
            self._end += len(self._last)
        # A line without its end is looked at again next time; it may be an entry that lacks nothing else.
        if entry := _entry(cut_off):
            added.append(entry)
        for entry in added:
            # Of a line that says to be later than this one, others must not be outdone any more.
            anew = anew or entry["time"] < self.entries.get(entry["id"], entry)["time"]
            self.entries[entry["id"]] = entry
        return None if anew else added


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("id", "status", "time")):
        return None
    return entry


def _just_after(time: str) -> str | None:
    """A microsecond later; None where that cannot be said."""
    try:
        later = datetime.datetime.fromisoformat(time) + datetime.timedelta(microseconds=1)
    except (ValueError, OverflowError):
        return None
    return later.isoformat(timespec="microseconds")


def _add(entries: dict[str, dict[str, Any]], entry: dict[str, Any]) -> None:
    known = entries.get(entry["id"])
    if known is None or entry["time"] >= known["time"]:
        entries[entry["id"]] = entry


def _bytes_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def sha256_of(path: Path) -> str:
    """The SHA-256 of the file at `path`, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
