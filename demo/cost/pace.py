"""How fast this machine is with a model, from what has run on it."""

from __future__ import annotations

import dataclasses
import math
import statistics
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...pipelines import attention_cost, clip
from ...pipelines.routes import windows
from .counts import Counts

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ...accel.methods.base import Config
    from ...pipelines.routes import Stage
    from ...pipelines.task import Task
    from ..server.live import Live
    from ..server.shelf import Offer

# Kinds of steps and of runs that are remembered, and runs of each of which the middle counts.
KINDS, RUNS = 256, 3


@dataclass(frozen=True)
class Kind:
    """What the time of a step depends on.

    Attributes:
        methods: in place, with their settings, as text; "" for dense attention.
        guidance: whether it may take a second call, as `true_cfg`.
        branches: that a step has in this stage.
        configs: of the methods.
        steps: that the stage has.
    """

    model: str
    width: int
    height: int
    frames: int | None
    window: int | None
    overlap: int | None
    guidance: bool
    true_cfg: bool
    branches: int
    methods: str
    configs: tuple[Config, ...] = field(compare=False, repr=False)
    steps: int = field(compare=False)

    def __str__(self) -> str:
        frames = "" if self.frames is None else f", {self.frames} frames"
        return f"{self.width}×{self.height}{frames}"


@dataclass(frozen=True)
class _Measured:
    """Seconds a step, in the mean over so many."""

    seconds: float
    steps: int


class Pace:
    """Learns from every run; can be asked from any thread.

    Attributes:
        counts: of what runs compute, by which times are told from those at other sizes.
    """

    def __init__(self) -> None:
        self.counts = Counts()
        self._lock = threading.Lock()
        self._steps: OrderedDict[Kind, deque[_Measured]] = OrderedDict()
        self._runs: OrderedDict[tuple[Any, ...], deque[float]] = OrderedDict()
        # Of each model: seconds until the first step, and pixels with the seconds they took after the last.
        self._before: dict[str, deque[float]] = {}
        self._after: dict[str, deque[tuple[int, float]]] = {}

    def knows(self, offer: Offer) -> bool:
        """Whether anything has run with the model."""
        with self._lock:
            return any(kind.model == offer.label for kind in self._steps)

    def learn(self, task: Task, live: Live, seconds: float) -> None:
        """From a run that has just ended.

        Args:
            live: watched it; of several runs it is the last.
            seconds: spent in denoising and decoding.
        """
        reached = _last_run(live.steps)
        with self._lock:
            spent = 0.0
            for stage, times in reached.items():
                kind = _kind(task, stage)
                (first_step, first), (last_step, last) = times[0], times[-1]
                each = (last - first) / (last_step - first_step) if last_step > first_step else first / first_step
                _keep(self._steps, kind, _Measured(each, last_step))
                spent += last
                if stage.number == 1:
                    before = max(0.0, first - each * first_step)
                    self._before.setdefault(task.job.model, deque(maxlen=RUNS)).append(before)
            if len(reached) == len(task.stages):  # else some were taken from an earlier run
                _keep(self._runs, _whole(task), seconds)
                after = _pixels(task), max(0.0, seconds - spent)
                self._after.setdefault(task.job.model, deque(maxlen=KINDS)).append(after)

    def predict(self, offer: Offer, task: Task) -> tuple[float | None, str]:
        """Seconds that denoising and decoding will take, and what this is told from; None before anything has run."""
        with self._lock:
            if runs := self._runs.get(_whole(task)):
                return statistics.median_low(runs), "as the last run of this kind"
            known = {kind: _middle(found) for kind, found in self._steps.items() if kind.model == task.job.model}
            before = statistics.median_low(self._before.get(task.job.model, [0.0]))
            after = list(self._after.get(task.job.model, ()))
        if not known:
            return None, ""
        seconds, said = before + _decoding(after, _pixels(task)), ""
        for stage in task.stages:
            kind = _kind(task, stage)
            nearest, ratio = self._nearest(offer, kind, known)
            seconds += known[nearest].seconds * ratio * stage.steps
            count = known[nearest].steps
            other = ""
            if nearest.methods != kind.methods:
                other = f" with {' + '.join(config.name for config in nearest.configs) or 'dense attention'}"
            said = f"from {count} step{'s' if count > 1 else ''}{other} at {nearest}"
        return seconds, said

    def _nearest(self, offer: Offer, kind: Kind, known: Iterable[Kind]) -> tuple[Kind, float]:
        """Of what is known, and how many times as long a step of `kind` is expected to take."""
        work = self._work(offer, kind)
        ratios = {other: work / self._work(offer, other) for other in known}

        def distance(other: Kind) -> tuple[bool, bool, float]:
            return other.methods != kind.methods, other.methods != "", abs(math.log(ratios[other]))

        nearest = min(ratios, key=distance)
        return nearest, ratios[nearest]

    def _work(self, offer: Offer, kind: Kind) -> float:
        """Operations of a step; tokens, for all of a model, where they cannot be counted."""
        frames = kind.window or kind.frames
        call = self.counts.call(offer, kind.width, kind.height, frames, kind.steps, kind.configs)
        return _calls(kind, offer.pipe) * float(call.operations or call.tokens)


def _kind(task: Task, stage: Stage) -> Kind:
    job, configs = task.job, task.configs
    if stage.total > 1 and stage.number == 1:
        configs = tuple(config for config in configs if config.for_native_size)
    return Kind(
        model=job.model,
        width=stage.width,
        height=stage.height,
        frames=job.frames,
        window=job.window,
        overlap=job.overlap,
        guidance=(job.guidance or 0) > 1,
        true_cfg=(job.true_cfg or 0) > 1,
        branches=1 if stage.scale == 1 else 2,
        methods=repr(configs) if configs else "",
        configs=configs,
        steps=stage.steps,
    )


def _whole(task: Task) -> tuple[Any, ...]:
    """What the time of a run depends on."""
    kinds = tuple((_kind(task, stage), stage.steps) for stage in task.stages)
    return (*kinds, task.job.image is not None, task.job.scheduler)


def _calls(kind: Kind, pipe: Any) -> int:
    """Of the denoiser in a step, for one picture or clip."""
    embedded = getattr(attention_cost.denoiser_of(pipe).config, "guidance_embeds", False)
    guided = kind.true_cfg if embedded else kind.guidance
    return (2 if guided else 1) * kind.branches * _windows(kind, pipe)


def _windows(kind: Kind, pipe: Any) -> int:
    if kind.window is None or kind.overlap is None or kind.frames is None or kind.frames <= kind.window:
        return 1
    frames, window = (clip.latent_frames(count, pipe) for count in (kind.frames, kind.window))
    return len(windows.spans(frames, window, kind.overlap // clip.temporal_factor(pipe)))


def _pixels(task: Task) -> int:
    """That are decoded."""
    return sum(stage.width * stage.height for stage in task.stages) * (task.job.frames or 1)


def _decoding(known: Sequence[tuple[int, float]], pixels: int) -> float:
    """Seconds, by the latest of those that come nearest."""
    if not known:
        return 0.0
    nearest = min(reversed(known), key=lambda one: abs(math.log(one[0] / pixels)))
    return nearest[1] * pixels / nearest[0]


def _last_run(steps: Sequence[tuple[Stage, int, float]]) -> dict[Stage, list[tuple[int, float]]]:
    """Of each of its stages, step and seconds since the stage began."""
    found: dict[Stage, list[tuple[int, float]]] = {}
    place = (0, 0)
    for stage, step, seconds in steps:
        if (stage.number, step) <= place:
            found = {}
        place = stage.number, step
        found.setdefault(stage, []).append((step, seconds))
    return found


def _middle(found: Sequence[_Measured]) -> _Measured:
    seconds = statistics.median_low(one.seconds for one in found)
    return dataclasses.replace(found[-1], seconds=seconds)


def _keep(known: OrderedDict[Any, deque[Any]], key: Any, value: Any) -> None:
    """Adds to the last few of `key`, and forgets the key that was longest unused."""
    known.setdefault(key, deque(maxlen=RUNS)).append(value)
    known.move_to_end(key)
    if len(known) > KINDS:
        known.popitem(last=False)
