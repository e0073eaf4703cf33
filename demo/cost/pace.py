"""How fast this machine is with a model, from what has run on it."""

from __future__ import annotations

import math
import statistics
import threading
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ...pipelines import attention_cost, clip
from ...pipelines.routes import windows
from .counts import Counts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...pipelines.job import Job
    from ...pipelines.routes import Stage
    from ...pipelines.task import Task
    from ..server.live import Live
    from ..server.shelf import Offer

# Runs that are remembered, and those of a kind of which the middle counts.
REMEMBERED, RUNS = 256, 3


@dataclass(frozen=True)
class Kind:
    """What the time of a step depends on.

    Attributes:
        methods: in place, with their settings, as text; "" for dense attention.
        calls: of the denoiser, one after the other.
        guided: whether each of them is of two.
        operations: of each; tokens, for all of a model, where those cannot be counted.
        told: the methods' names.
    """

    width: int
    height: int
    frames: int | None
    window: int | None
    methods: str
    calls: int
    guided: bool
    operations: float = field(compare=False)
    told: str = field(compare=False)

    def __str__(self) -> str:
        frames = "" if self.frames is None else f", {self.frames} frames"
        return f"{self.width}×{self.height}{frames}"


@dataclass(frozen=True)
class Run:
    """One that has ended.

    Attributes:
        steps: seconds of one of each stage that was run.
        seconds: of all of it; None where stages were taken from an earlier run.
    """

    task: Task
    steps: Mapping[Stage, float]
    seconds: float | None


@dataclass(frozen=True)
class Prediction:
    """
    Attributes:
        seconds: of denoising and decoding.
        basis: what it is told from.
        rough: whether that was of another size, or with other methods.
    """

    seconds: float
    basis: str
    rough: bool = False


class Pace:
    """Learns from every run; can be asked from any thread.

    A call of the denoiser takes some time whatever its size, and the more the more it computes. Both are told from the
    sizes that have run.

    Attributes:
        counts: of what runs compute, by which times are told from those at other sizes.
    """

    def __init__(self) -> None:
        self.counts = Counts()
        self._lock = threading.Lock()
        self._past: deque[Run] = deque(maxlen=REMEMBERED)

    def knows(self, offer: Offer) -> bool:
        """Whether anything has run with the model."""
        return bool(self._of(offer))

    def learn(self, task: Task, live: Live, seconds: float) -> None:
        """From a run that has just ended.

        Args:
            live: watched it; of several runs it is the last.
            seconds: spent in denoising and decoding.
        """
        steps = {stage: _of_a_step(times, alike=not task.configs) for stage, times in _last_run(live.steps).items()}
        if steps:
            with self._lock:
                self._past.append(Run(task, steps, seconds if len(steps) == len(task.stages) else None))

    def predict(self, offer: Offer, task: Task) -> Prediction | None:
        """How long denoising and decoding will take; None before anything has run."""
        past = self._of(offer)
        if not past:
            return None
        whole = self._whole(offer, task)
        steps: dict[Kind, list[float]] = {}
        beside: dict[float, list[float]] = {}  # all but steps, by pixels
        same: list[float] = []
        for run in past:
            for stage, seconds in run.steps.items():
                steps.setdefault(self._kind(offer, run.task, stage), []).append(seconds)
            if run.seconds is not None:
                rest = run.seconds - sum(seconds * stage.steps for stage, seconds in run.steps.items())
                beside.setdefault(_pixels(run.task), []).append(max(0.0, rest))
                if self._whole(offer, run.task) == whole:
                    same.append(run.seconds)
        if same:
            return Prediction(_middle(same), "as the last run of this kind")
        known = {kind: _middle(seconds) for kind, seconds in steps.items()}
        found = [(self._step(self._kind(offer, task, stage), known), stage.steps) for stage in task.stages]
        total = sum(step.seconds * count for step, count in found)
        if beside:
            pixels, others = _pixels(task), {pixels: _middle(seconds) for pixels, seconds in beside.items()}
            near = min(others, key=lambda other: abs(math.log(other / pixels)))
            total += others[near] * _growth(others, near, pixels)
        return Prediction(total, found[-1][0].basis, any(step.rough for step, _ in found))

    def _of(self, offer: Offer) -> list[Run]:
        with self._lock:
            return [run for run in self._past if run.task.job.model == offer.label]

    def _step(self, kind: Kind, known: Mapping[Kind, float]) -> Prediction:
        """Of a step, by the one known that computes about as much, with the same methods where there is one."""
        dense = [other for other in known if not other.methods]
        same = [other for other in known if other.methods == kind.methods] or dense or list(known)
        near = min(same, key=lambda other: (other != kind, abs(math.log(other.operations / kind.operations))))
        # How time grows is told from the same methods if they ran at several sizes.
        of_same, of_dense = ({other.operations: known[other] / other.calls for other in of} for of in (same, dense))
        growth = _growth(of_same if len(of_same) > 1 else of_dense, near.operations, kind.operations)
        other = "" if near.methods == kind.methods else f" with {near.told or 'dense attention'}"
        seconds = known[near] * kind.calls / near.calls * growth
        return Prediction(seconds, f"from steps{other} at {near}", rough=near != kind)

    def _kind(self, offer: Offer, task: Task, stage: Stage) -> Kind:
        job, configs = task.job, task.configs
        if stage.total > 1 and stage.number == 1:
            configs = tuple(config for config in configs if config.for_native_size)
        call = self.counts.call(offer, stage.width, stage.height, job.window or job.frames, stage.steps, configs)
        embedded = getattr(attention_cost.denoiser_of(offer.pipe).config, "guidance_embeds", False)
        guided = ((job.true_cfg if embedded else job.guidance) or 0) > 1
        return Kind(
            width=stage.width,
            height=stage.height,
            frames=job.frames,
            window=job.window,
            methods=repr(configs) if configs else "",
            calls=(1 if stage.scale == 1 else 2) * _windows(job, offer.pipe),
            guided=guided,
            operations=(2 if guided else 1) * float(call.operations or call.tokens),
            told=" + ".join(config.name for config in configs),
        )

    def _whole(self, offer: Offer, task: Task) -> tuple[Any, ...]:
        """What the time of a run depends on."""
        kinds = [(self._kind(offer, task, stage), stage.steps) for stage in task.stages]
        return (*kinds, task.job.image is not None, task.job.scheduler)


def _of_a_step(times: Sequence[tuple[int, float]], *, alike: bool) -> float:
    """Seconds, of those at which steps were reached.

    Args:
        alike: as steps of dense attention are: the middle one has not been held up. With a method some compute more
            than others.
    """
    (first_step, first), (last_step, last) = times[0], times[-1]
    if last_step == first_step:
        return first / first_step
    if alike:
        return statistics.median_low((then - now) / (after - step) for (step, now), (after, then) in pairwise(times))
    return (last - first) / (last_step - first_step)


def _windows(job: Job, pipe: Any) -> int:
    if job.window is None or job.overlap is None or job.frames is None or job.frames <= job.window:
        return 1
    frames, window = (clip.latent_frames(count, pipe) for count in (job.frames, job.window))
    return len(windows.spans(frames, window, job.overlap // clip.temporal_factor(pipe)))


def _pixels(task: Task) -> float:
    """That are decoded."""
    return float(sum(stage.width * stage.height for stage in task.stages) * (task.job.frames or 1))


def _growth(known: Mapping[float, float], old: float, new: float) -> float:
    """How many times as long `new` takes as `old`.

    Args:
        known: size → seconds, which have a part that is the same for all, and one that grows as the size does. Of one
            size, or where load has blurred both parts, the second is taken for all.
    """
    constant, rate = 0.0, 1.0
    if len(known) > 1:
        sizes, seconds = np.array([*known]), np.maximum([*known.values()], 1e-6)
        rate, constant = np.polyfit(sizes, seconds, 1, w=1 / seconds)
        if rate <= 0 or constant < 0:
            constant, rate = 0.0, 1.0
    return float((constant + rate * new) / (constant + rate * old))


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


def _middle(seconds: Sequence[float]) -> float:
    """Of the last few."""
    return statistics.median_low(seconds[-RUNS:])
