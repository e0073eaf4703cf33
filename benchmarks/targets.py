"""What was aimed at, said of what was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .result import Target

MOST_SHOWN = 4


def target(benchmark: str, aim: str, found: Mapping[str, float], form: str, enough: Callable[[float], bool]) -> Target:
    """Met where every number is `enough`, open where there is none.

    Args:
        found: numbers by case.
        form: of a number, for `str.format`.
    """
    shown = [f"{form.format(value)} ({where})" for where, value in sorted(found.items(), key=lambda item: item[1])]
    text = ", ".join(shown) if len(shown) <= MOST_SHOWN else f"{shown[0]} to {shown[-1]}, cases: {len(shown)}"
    return Target(benchmark, aim, text or "not measured", all(map(enough, found.values())) if found else None)
