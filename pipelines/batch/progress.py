"""How far a batch has come: two bars where somebody looks, a line a row where nobody does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from ..printable import printable
from ..routes import Stage
from .plan import Planned

REFRESH_SECONDS = 0.5
SHOWN_OF_ID = 24


class Stopped(Exception):
    """The batch was asked to stop, and the step that ran is done."""


class Progress:
    """The `Watch` of a batch.

    Args:
        rows: those to be made.
        bars: whether to draw them.
        print_line: is given a line a row, and what else is to be said.
        stop: whether to raise `Stopped` after the next step.
        check: is called after every step and once more right before a file is put in its place; may raise.
    """

    def __init__(
        self,
        rows: Sequence[Planned],
        *,
        bars: bool,
        print_line: Callable[[str], None],
        stop: Callable[[], bool],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._bars, self._print_line, self._stop, self._check = bars, print_line, stop, check
        self._total, self._done, self._failed = len(rows), 0, 0
        # Of all rows, done and left; and the seconds it took to do what is done.
        self._work_done, self._work_left, self._seconds = 0.0, float(sum(row.work for row in rows)), 0.0
        self._group: Sequence[Planned] = ()
        self._begun = self._shown = time.monotonic()
        self._part = 0.0  # of the group, done
        self._steps_done = 0
        self._rows = tqdm(
            total=self._total,
            disable=not bars,
            position=0,
            dynamic_ncols=True,
            bar_format="{n_fmt} of {total_fmt} rows |{bar}| {desc}",
        )
        self._lower: tqdm[Any] = tqdm(disable=True)
        self._frames = False  # counted by the lower bar, in place of steps

    def begin_group(self, group: Sequence[Planned]) -> None:
        """`group` runs now, in one call."""
        if self._stop():
            raise Stopped
        self._group, self._begun, self._part = group, time.monotonic(), 0.0
        self._steps_done, self._frames = 0, False
        self._draw_lower(total=self._steps, unit="step")

    def begin(self, stage: Stage) -> None:
        if self._stop():
            raise Stopped
        self.reach(stage, 0)

    def reach(self, stage: Stage, step: int) -> None:
        self._check()
        before = sum(other.steps for other in self._group[0].task.stages[: stage.number - 1])
        # Schedulers of second order call twice for most steps.
        reached = before + min(step, stage.steps)
        if reached == self._steps_done:
            return
        # What is finished but for the file, where this is called once more, is not thrown away.
        self._lower.update(reached - self._steps_done)
        self._steps_done = reached
        self._move(reached / self._steps)

    def frame_done(self, total: int) -> None:
        self._check()
        if not self._frames:
            self._frames = True
            self._draw_lower(total=total, unit="frame")
        self._lower.update()
        self._move(1.0)

    def end_group(self, made: Sequence[Planned]) -> None:
        """`made`, of the group, are made; the others are to be tried again, or have failed."""
        self._lower.close()
        self._seconds += time.monotonic() - self._begun
        self._work_done += sum(row.work for row in made)
        self._work_left -= sum(row.work for row in made)
        self._group = ()

    def row_done(self, row: Planned, seconds: float) -> None:
        self._count()
        if not self._bars:
            self._print_line(f"{self._number()} {row.id}: {seconds:.1f} s{self._comma_left()}")

    def row_failed(self, row: Planned, why: str) -> None:
        self._failed += 1
        self._work_left -= row.work
        self._count()
        self.say(f"{self._number()} {row.id} failed: {why}{'' if self._bars else self._comma_left()}")

    def drop(self, rows: Sequence[Planned]) -> None:
        """Others have made `rows`: in the same time, as far as the rest is concerned."""
        if not rows:
            return
        self._total -= len(rows)
        work = sum(row.work for row in rows)
        self._work_left -= work
        self._work_done += work
        self._rows.total = self._total
        self._refresh()

    def wait(self, seconds: float) -> None:
        """For others, unless the batch is asked to stop."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._stop():
                raise Stopped
            time.sleep(0.1)

    def say(self, text: str) -> None:
        """A line that the bars do not overwrite."""
        if self._bars:
            with tqdm.external_write_mode():
                self._print_line(text)
        else:
            self._print_line(text)

    def close(self) -> None:
        self._lower.close()
        self._rows.close()

    @property
    def _steps(self) -> int:
        return sum(stage.steps for stage in self._group[0].task.stages)

    def _move(self, part: float) -> None:
        self._part = part
        if time.monotonic() - self._shown > REFRESH_SECONDS:
            self._refresh()
        if self._stop():
            raise Stopped

    def _count(self) -> None:
        self._done += 1
        self._rows.update()
        self._refresh()

    def _refresh(self) -> None:
        self._shown = time.monotonic()
        failed = f"{self._failed} failed" if self._failed else ""
        self._rows.set_description_str(", ".join(filter(None, [failed, self._left()])))

    def _number(self) -> str:
        return f"[{self._done}/{self._total}]"

    def _comma_left(self) -> str:
        left = self._left()
        return left and f", {left}"

    def _left(self) -> str:
        """By the time that what is done took, the part of the group that runs included."""
        running = self._part * sum(row.work for row in self._group)
        seconds = self._seconds + (time.monotonic() - self._begun if self._group else 0.0)
        done, left = self._work_done + running, self._work_left - running
        if not done or self._done >= self._total:
            return ""
        return f"about {_duration(seconds * left / done)} left"

    def _draw_lower(self, *, total: int, unit: str) -> None:
        self._lower.close()
        more = f" and {len(self._group) - 1} more" if len(self._group) > 1 else ""
        self._lower = tqdm(
            total=total,
            unit=unit,
            desc=f"{printable(self._group[0].id, SHOWN_OF_ID)}{more}",
            disable=not self._bars,
            position=1,
            leave=False,
            dynamic_ncols=True,
            bar_format="  {desc} |{bar}| {n_fmt}/{total_fmt} {unit}s [{elapsed}, {rate_fmt}]",
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
