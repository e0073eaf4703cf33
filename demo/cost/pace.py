"""How fast this machine is with a model, from what has run on it."""

from __future__ import annotations

import math
import statistics
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ...pipelines import attention_cost, clip
from ...pipelines.routes import windows
from .counts import Counts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
        guidance: whether it may take a second call, as `true_cfg`.
        branches: that a step has in this stage.
        methods: in place, with their settings, as text; "" for dense attention.
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
        # Seconds of a step; of a whole run; of all but its steps, by model and pixels.
        self._steps: OrderedDict[Kind, deque[float]] = OrderedDict()
        self._runs: OrderedDict[tuple[Any, ...], deque[float]] = OrderedDict()
        self._beside: OrderedDict[tuple[str, int], deque[float]] = OrderedDict()

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
            beside = seconds
            for stage, times in reached.items():
                (first_step, first), (last_step, last) = times[0], times[-1]
                mean = (last - first) / (last_step - first_step) if last_step > first_step else first / first_step
                beside -= mean * last_step
                each = [(after[1] - before[1]) / (after[0] - before[0]) for before, after in pairwise(times)] or [mean]
                # Steps of dense attention are all alike: the middle one has not been held up. With a method some
                # compute more than others.
                _keep(self._steps, _kind(task, stage), mean if task.configs else statistics.median_low(each))
            if len(reached) == len(task.stages):  # else some were taken from an earlier run
                _keep(self._runs, _whole(task), seconds)
                _keep(self._beside, (task.job.model, _pixels(task)), max(0.0, beside))

    def predict(self, offer: Offer, task: Task) -> Prediction | None:
        """How long denoising and decoding will take; None before anything has run."""
        model = task.job.model
        with self._lock:
            if runs := self._runs.get(_whole(task)):
                return Prediction(statistics.median_low(runs), "like the last such run")
            known = {kind: statistics.median_low(found) for kind, found in self._steps.items() if kind.model == model}
            beside = {
                float(pixels): statistics.median_low(found)
                for (name, pixels), found in self._beside.items()
                if name == model
            }
        if not known:
            return None
        pixels = float(_pixels(task))
        seconds = 0.0
        if beside:
            near = min(beside, key=lambda known: abs(math.log(known / pixels)))
            seconds = beside[near] * _growth(beside, near, pixels)
        steps = []
        for stage in task.stages:
            step = self._step(offer, _kind(task, stage), known)
            seconds += step.seconds * stage.steps
            steps.append(step)
        return Prediction(seconds, steps[-1].basis, any(step.rough for step in steps))

    def _step(self, offer: Offer, kind: Kind, known: Mapping[Kind, float]) -> Prediction:
        """Of a step, by the one known that computes about as much, with the same methods where there is one."""
        calls, operations = self._work(offer, kind)
        works = {other: self._work(offer, other) for other in known}
        dense = [other for other in known if not other.methods]
        same = [other for other in known if other.methods == kind.methods] or dense or list(known)
        near = kind if kind in known else min(same, key=lambda other: abs(math.log(works[other][1] / operations)))
        # How time grows is told from the same methods if they ran at several sizes.
        of_same, of_dense = ({works[o][1]: known[o] / works[o][0] for o in kinds} for kinds in (same, dense))
        growth = _growth(of_same if len(of_same) > 1 else of_dense, works[near][1], operations)
        other = ""
        if near.methods != kind.methods:
            other = f" with {' + '.join(config.name for config in near.configs) or 'dense attention'}"
        seconds = known[near] * calls / works[near][0] * growth
        return Prediction(seconds, f"from earlier steps{other} at {near}", rough=near != kind)

    def _work(self, offer: Offer, kind: Kind) -> tuple[int, float]:
        """Calls one after the other in a step, and operations of each; tokens, for all of a model, where those cannot
        be counted."""
        frames = kind.window or kind.frames
        call = self.counts.call(offer, kind.width, kind.height, frames, kind.steps, kind.configs)
        embedded = getattr(attention_cost.denoiser_of(offer.pipe).config, "guidance_embeds", False)
        guided = kind.true_cfg if embedded else kind.guidance
        return kind.branches * _windows(kind, offer.pipe), (2 if guided else 1) * float(call.operations or call.tokens)


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


def _windows(kind: Kind, pipe: Any) -> int:
    if kind.window is None or kind.overlap is None or kind.frames is None or kind.frames <= kind.window:
        return 1
    frames, window = (clip.latent_frames(count, pipe) for count in (kind.frames, kind.window))
    return len(windows.spans(frames, window, kind.overlap // clip.temporal_factor(pipe)))


def _pixels(task: Task) -> int:
    """That are decoded."""
    return sum(stage.width * stage.height for stage in task.stages) * (task.job.frames or 1)


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


def _keep(known: OrderedDict[Any, deque[Any]], key: Any, value: Any) -> None:
    """Adds to the last few of `key`, and forgets the key that was longest unused."""
    known.setdefault(key, deque(maxlen=RUNS)).append(value)
    known.move_to_end(key)
    if len(known) > KINDS:
        known.popitem(last=False)
