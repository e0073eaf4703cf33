"""At which denoising steps AdaSpa searches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Published, for a run of 50 steps; as fractions for a run of any other length.
PUBLISHED = (10, 30)
_PUBLISHED_FRACTIONS = (0.2, 0.6)


class UnknownSteps(Exception):
    """Steps that depend on the length of a run, which nothing tells; the message says so."""


def check_search_steps(search_steps: Sequence[int | float]) -> None:
    """Raises `ValueError` for what no run of any length could have."""
    if not search_steps:
        raise ValueError("search_steps is empty: without a search there is no mask")
    for step in search_steps:
        whole = isinstance(step, int) and not isinstance(step, bool) and step >= 1
        if not whole and not (isinstance(step, float) and 0 <= step <= 1):
            raise ValueError(
                f"search_steps has {step!r}: each is a step, counted from 1, or a fraction of the run from 0.0 to 1.0"
            )


def steps_of_run(search_steps: Sequence[int | float], steps: int | None) -> tuple[int, ...]:
    """The steps, counted from 1, at which a run searches, ascending.

    A fraction f of N steps is step max(1, round(f * N)). The published setting is for 50 steps and scaled to others.

    Args:
        search_steps: whole steps or fractions.
        steps: of the run; None where nothing tells.

    Raises:
        ValueError: for a step beyond the run.
        UnknownSteps: for fractions, or the published setting, in a run of unknown length.
    """
    if tuple(search_steps) == PUBLISHED:
        if steps is None:
            raise UnknownSteps(
                f"search_steps {PUBLISHED} are scaled to the number of steps, which nothing tells: "
                "call handle.set_timesteps(timesteps), or give other whole steps"
            )
        search_steps = _PUBLISHED_FRACTIONS
    found = set()
    for step in search_steps:
        if isinstance(step, float):
            if steps is None:
                raise UnknownSteps(
                    f"search_steps {tuple(search_steps)} are fractions of a run whose number of steps nothing tells: "
                    "call handle.set_timesteps(timesteps), or give whole steps"
                )
            step = max(1, round(step * steps))
        elif steps is not None and step > steps:
            raise ValueError(
                f"search_steps {tuple(search_steps)}: step {step} is beyond the run of {steps} steps; give steps from "
                f"1 to {steps}, or fractions of the run such as 0.2"
            )
        found.add(step)
    return tuple(sorted(found))


@dataclass(frozen=True)
class Phase:
    """What a step is to a run.

    Attributes:
        step: counted from 1.
        due: the latest step of a search so far, this one included; None before the first, when attention is dense.
        ends_warm_up: it is the one before the first search.
        searches_again: a later step searches.
    """

    step: int
    due: int | None
    ends_warm_up: bool
    searches_again: bool

    @classmethod
    def of(cls, step: int, search_at: Sequence[int]) -> Phase:
        return cls(
            step=step,
            due=max((at for at in search_at if at <= step), default=None),
            ends_warm_up=step == search_at[0] - 1,
            searches_again=step < search_at[-1],
        )
