"""Text that anybody may have written, made fit for a terminal."""

from __future__ import annotations

import unicodedata

# They join letters and emoji; everything else of their kind can hide or turn what stands beside it.
JOINERS = "\u200c\u200d"


def printable(text: str, limit: int | None = None) -> str:
    """`text` with control characters, escape sequences and what turns the direction of writing as backslash escapes.

    Args:
        limit: Characters after which it is cut, which "…" shows.
    """
    cut = text if limit is None or len(text) <= limit else text[:limit] + "…"
    return "".join(character if is_printable(character) else _escaped(character) for character in cut)


def printable_lines(text: str) -> str:
    """The same for text of several lines, which stay lines."""
    return "\n".join(printable(line) for line in text.split("\n"))


def is_printable(character: str) -> bool:
    return character.isprintable() or character in JOINERS or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
