"""A run that people look at: how far it is, how long it will take, what it looks like, and whether to go on."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from ...accel.errors import UnsupportedModel, WeightsError
from ...pipelines.errors import BadInput, JobFailed

if TYPE_CHECKING:
    from torch import Tensor

    from ...pipelines.preview import Preview
    from ...pipelines.routes import Stage

#: Of the visitor's making or the machine's, so that the message says it all.
SAID = (BadInput, JobFailed, UnsupportedModel, WeightsError)
# Seconds between two events that say nothing but a number.
PAUSE = 0.1
# The folders in front of a file's name; not the "//" of a web address.
FOLDERS = re.compile(r"(?<![\w/.~])~?/(?:[^\s/:;,'\"]+/)+")


class Stop(KeyboardInterrupt):
    """Somebody has asked the run to end. No `Exception`, so that nobody takes it for a failure of the run."""


@dataclass(frozen=True)
class Progress:
    """
    Attributes:
        share: of the whole that is done, 0 to 1.
        text: "step 5 of 12, about 3 s left".
        preview: of the last step; None where there is nothing new to see.
    """

    share: float
    text: str
    preview: Image.Image | None = None


class Live:
    """Watches runs (`pipelines.run.Watch`) and tells of them; raises `Stop` in them once that is asked for.

    Args:
        tell: is given each event.
        stopped: whether to stop.

    Attributes:
        steps: (stage, step, seconds since the stage began, without previews) of every step so far.
        message: how far it came, for somebody who has stopped it.
        what: is being run, in a line for the operator without anything that was typed; to be set, "" for nothing.
    """

    def __init__(self, tell: Callable[[Progress], None], stopped: Callable[[], bool] = lambda: False) -> None:
        self.steps: list[tuple[Stage, int, float]] = []
        self.message = "Stopped before the first step."
        self.what = ""
        self._tell, self._stopped = tell, stopped
        self._stages: tuple[Stage, ...] = ()
        self._runs, self._run, self._name = 1, 1, ""
        self._preview: Preview | None = None
        self._stage: Stage | None = None
        self._step = self._frames = 0
        self._text = ""
        self._told = -PAUSE
        self._looking = 0.0  # seconds that previews have taken since the stage began
        self._began = self._reached = 0.0
        # Seconds and weight of the steps after the first of each stage, and of those first ones: they do more.
        self._paced, self._slow = (0.0, 0.0), (0.0, 0.0)

    def expect(self, stages: Sequence[Stage], *, runs: int = 1, preview: Preview | None = None) -> None:
        """What is to be run, `runs` times; the first of them is ahead."""
        self._stages, self._runs, self._run, self._name = tuple(stages), runs, 1, ""
        self._preview = preview if preview is not None and preview.why_not is None else None
        self._stage, self._step, self._frames = None, 0, 0
        self._paced, self._slow = (0.0, 0.0), (0.0, 0.0)

    def next_run(self, name: str) -> None:
        """Of several; called before each, the first one included."""
        self._run += self._name != ""
        self._name = name
        self._stage, self._step, self._frames = None, 0, 0
        self._check()
        self._say_where(now=True)

    def say(self, text: str) -> None:
        """What is being done, or what a visitor should know. Stops only between runs: they stop by themselves."""
        if not self._stages:
            self._check()
        self._text = without_folders(text)
        self._send(now=True)

    def begin(self, stage: Stage) -> None:
        self._check()
        self._stage, self._step, self._frames = stage, 0, 0
        self._looking, self._began = 0.0, time.perf_counter()
        self._reached = self._began
        self._say_where(now=True)

    def reach(self, stage: Stage, step: int) -> None:
        # Schedulers of second order come here twice for most steps, pictures once more when they are decoded.
        step = min(step, stage.steps)
        if step > self._step:
            self._pass(stage, step)
            self._stage, self._step = stage, step
            self.message = f"Stopped after {self._where()}."
        self._check()
        self._say_where()

    def look(self, stage: Stage, latents: Tensor) -> None:
        """Shows what a step has come to."""
        if self._preview is None:
            return
        start = time.perf_counter()
        picture = self._preview.picture(latents, stage)
        self._looking += time.perf_counter() - start
        if picture is not None:
            self._send(now=True, preview=picture)

    def frame_done(self, total: int) -> None:
        self._frames += 1
        self.message = f"Stopped after frame {self._frames} of {total}."
        self._check()
        self._text = self._of_runs(f"frame {self._frames} of {total}")
        self._send()

    def close(self) -> None:
        pass

    def _check(self) -> None:
        if self._stopped():
            raise Stop

    def _pass(self, stage: Stage, step: int) -> None:
        """Counts a step, or several, that have just been run."""
        now = time.perf_counter()
        seconds, weight = now - self._reached, (step - self._step) * _weight(stage)
        self._reached = now
        self.steps.append((stage, step, now - self._began - self._looking))
        kind = "_slow" if self._step == 0 else "_paced"
        before = getattr(self, kind)
        setattr(self, kind, (before[0] + seconds, before[1] + weight))

    def _say_where(self, now: bool = False) -> None:
        if self._stage is None:
            self._text = self._of_runs("preparing")
        else:
            left = self._seconds_left()
            decoding = self._step == self._stage.steps and self._stage.number == self._stage.total
            about = ", decoding" if decoding else f", about {duration(left)} left" if left is not None else ""
            self._text = self._of_runs(f"{self._where()}{about}")
        self._send(now)

    def _send(self, now: bool = False, preview: Image.Image | None = None) -> None:
        if not now and time.perf_counter() - self._told < PAUSE:
            return
        self._told = time.perf_counter()
        self._tell(Progress(self._share(), self._text, preview))

    def _where(self) -> str:
        assert self._stage is not None
        stage = self._stage
        of_stages = f"stage {stage.number} of {stage.total} ({stage.width}x{stage.height}), " if stage.total > 1 else ""
        return f"{of_stages}step {self._step} of {stage.steps}"

    def _of_runs(self, text: str) -> str:
        return f"{self._name}, {self._run} of {self._runs}: {text}" if self._runs > 1 else text

    def _seconds_left(self) -> float | None:
        seconds, weight = self._paced if self._paced[1] else self._slow
        return seconds / weight * (self._whole() - self._done()) if weight else None

    def _share(self) -> float:
        return min(1.0, self._done() / self._whole()) if self._stages else 0.0

    def _whole(self) -> float:
        return self._runs * self._one()

    def _one(self) -> float:
        """What a run weighs. Decoding, of which nothing is known, is taken for one more step."""
        return sum(stage.steps * _weight(stage) for stage in self._stages) + _weight(self._stages[-1])

    def _done(self) -> float:
        if not self._stages:
            return 0.0
        done = (self._run - 1) * self._one()
        if self._stage is not None:
            past = self._stages[: self._stage.number - 1]
            done += sum(stage.steps * _weight(stage) for stage in past) + self._step * _weight(self._stage)
        return done


def duration(seconds: float) -> str:
    """ "3 s", "2 min", "1.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def without_folders(text: str) -> str:
    """`text` with the files it names by their name alone: where this machine keeps them is nobody's business."""
    return FOLDERS.sub("", text)


def _weight(stage: Stage) -> float:
    """Of one step."""
    return float(stage.width * stage.height)
