"""Makes the pictures and clips of a comparison one at a time, and measures each."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from ...accel.errors import UnsupportedModel, WeightsError
from .. import save, settings, task
from ..diffusers_log import heard_from_diffusers
from ..errors import BadInput, JobFailed
from ..job import Job
from ..routes import Stage
from ..run import Watch
from ..session import Result, Session
from ..stage_methods import StageMethods
from ..task import Task
from . import metrics, text
from .figures import Comparison, Outcome, Shot
from .variants import DENSE, Variant, ids, slug

# Columns of what Diffusers says; it quotes what it cuts off a prompt, which may be long.
LONGEST_HEARD = 300
# Of the user's making, so that the message says it all.
SAID = (BadInput, JobFailed, UnsupportedModel, WeightsError)


class Watcher(Watch, Protocol):
    """Is told how far a comparison has come; by a `KeyboardInterrupt` from any of these it ends within a step."""

    def next_run(self, name: str) -> None:
        """The next run that counts begins, of the variant of that name."""

    def say(self, text: str) -> None:
        """What is done meanwhile that is none of the runs."""


class Studio:
    """
    Args:
        job: what all pictures have in common.
        folder: for the pictures; it need not be there yet.
        work: for what is needed meanwhile.
        made: is given each picture or clip that is kept.
    """

    def __init__(
        self,
        session: Session,
        job: Job,
        folder: Path,
        work: Path,
        made: Callable[[Result], Any] = lambda result: None,
    ) -> None:
        self.session, self.folder, self.work, self._made = session, folder, work, made
        self._job = job
        kind = task.extension(session.model)
        self._kind = ".gif" if kind == ".mp4" and not save.has_av() else kind
        self._ids: dict[str, str] = {}

    def plans(self, dense: Task, variants: Sequence[Variant]) -> dict[Variant, Task | str]:
        """The plan of dense attention and of each variant, `auto` by what it chose, or why there is none.

        Raises:
            BadInput: two variants are the same, but for their names.
            BadInput, UnsupportedModel, WeightsError: none of the variants can be had; the first says why.
        """
        found: dict[Variant, Task | str] = {DENSE: dense}
        refused: list[Exception] = []
        for variant in variants:
            try:
                plan = self.checked(variant)
            except (BadInput, UnsupportedModel, WeightsError) as error:
                found[variant] = str(error)
                refused.append(error)
            else:
                if settings.AUTO in variant.methods:
                    variant = dataclasses.replace(variant, name=f"auto: {'+'.join(plan.job.methods) or 'dense'}")
                found[variant] = plan
        if len(refused) == len(variants):
            raise refused[0]
        _check_different(found)
        self._ids = ids(tuple(found))
        return found

    def checked(self, variant: Variant) -> Task:
        """Its plan, after its methods were put in place once: what they lack, such as weights, shows only there.

        Raises:
            BadInput, UnsupportedModel, WeightsError: it cannot be had.
        """
        plan = self.plan(variant)
        StageMethods(self.session.pipe, plan.configs, lambda text: None).close()
        return plan

    def plan(self, variant: Variant, **own: Any) -> Task:
        """Of the job with the methods of a variant, and what is its own.

        Raises:
            BadInput, UnsupportedModel: the model cannot do it.
        """
        return self.session.plan(dataclasses.replace(self._job, methods=variant.methods, **own))

    def warm_up(self, variant: Variant, plan: Task, steps: int, watch: Watcher) -> None:
        """A run that is not timed, nor kept. What is said, or goes wrong, will be so again when it counts."""
        picture, frames = self.work / f"warm-up{self._kind}", self.work / "warm-up"
        own: dict[str, Any] = {"output": None if self._makes_clips else picture, "frames_dir": self._clip(frames)}
        with suppress(Exception), heard_from_diffusers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            job = dataclasses.replace(self._job, methods=plan.job.methods, steps=steps, **own)
            self.session.make([self.session.plan(job)], watch=WarmUp(watch, variant.name))
        picture.unlink(missing_ok=True)
        shutil.rmtree(frames, ignore_errors=True)
        _let_go()

    def make(
        self, comparison: Comparison, shot: Shot, variant: Variant, watch: Watcher, say: Callable[[str], None]
    ) -> Outcome:
        """Makes one picture or clip; what goes wrong is an outcome."""
        output = self.folder / f"{self._name(shot, variant)}{self._kind}"
        with heard_from_diffusers() as heard:
            try:
                frames = self._clip(self.frames(output.name))
                plan = self.plan(variant, output=output, frames_dir=frames, prompt=shot.prompt, seed=shot.seed)
                [result] = self.session.make([plan], watch=watch)
                outcome = self._passed_on(result, _outcome(result))
            except Exception as error:
                outcome = _failed(error, say)
        if outcome.error is not None:
            _let_go()
        # Mostly of the prompt, and so of all variants.
        said = [text.shortened(line, LONGEST_HEARD) for line in heard]
        comparison.notes += [line for line in dict.fromkeys(said) if line not in comparison.notes]
        return outcome

    def _passed_on(self, result: Result, outcome: Outcome) -> Outcome:
        """A run that went well has, also where nobody can take what it made, for want of space on the disk."""
        try:
            self._made(result)
        except OSError as error:
            return dataclasses.replace(
                outcome, notes=(*outcome.notes, f"no copy of it was kept: {error.strerror or error}")
            )
        return outcome

    def liken(self, comparison: Comparison, shot: Shot, say: Callable[[str], None]) -> None:
        """Compares all there is of a shot with what dense attention made of it, as soon as that is there."""
        dense = comparison.outcome(shot, DENSE)
        if dense is None or dense.file is None:
            return
        for variant in comparison.variants[1:]:
            outcome = comparison.outcome(shot, variant)
            if outcome is None or outcome.file is None or outcome.likeness is not None:
                continue
            try:
                outcome = dataclasses.replace(outcome, likeness=self._likeness(outcome.file, dense.file))
            except Exception as error:
                outcome = _failed(error, say)
            comparison.outcomes[shot.number, variant.name] = outcome

    def frames(self, file: str) -> Path:
        """The folder with the frames of a clip, lossless."""
        return self.work / Path(file).stem

    def _likeness(self, file: str, dense: str) -> metrics.Likeness:
        if self._makes_clips:
            return metrics.of_clips(self.frames(file), self.frames(dense))
        return metrics.of_pictures(*(np.asarray(metrics.read_picture(self.folder / name)) for name in (file, dense)))

    @property
    def _makes_clips(self) -> bool:
        return self._kind != ".png"

    def _clip(self, frames: Path) -> Path | None:
        return frames if self._makes_clips else None

    def _name(self, shot: Shot, variant: Variant) -> str:
        return "-".join(
            filter(None, (str(shot.number), slug(shot.prompt), f"seed-{shot.seed}", self._ids[variant.name]))
        )


def _check_different(plans: Mapping[Variant, Task | str]) -> None:
    """
    Raises:
        BadInput: two have the same methods and settings. What `auto` chose is its own affair.
    """
    asked = {
        variant.name: plan.job.methods
        for variant, plan in plans.items()
        if isinstance(plan, Task) and settings.AUTO not in variant.methods
    }
    for (one, methods), (other, others) in combinations(asked.items(), 2):
        if methods == others:
            raise BadInput(f"{one!r} and {other!r} have the same settings; variants must differ in theirs (--set).")


def _outcome(result: Result) -> Outcome:
    assert result.job.output is not None
    report = result.report.summary() if result.report else None
    return Outcome(
        file=result.job.output.name,
        seconds=result.seconds,
        peak_bytes=result.peak_bytes,
        peak_since_start=result.peak_since_start,
        density=report["density"] if report else None,
        report=report,
        notes=(*result.notices, *(report["notes"] if report else ())),
    )


def _failed(error: Exception, say: Callable[[str], None]) -> Outcome:
    """A defect in one variant must not take the others with it, but is told with its place."""
    if isinstance(error, SAID):
        said = str(error)
    else:
        say("".join(traceback.format_exception(error)))
        said = f"{type(error).__name__}: {error}"
    return Outcome(error=said)


class WarmUp:
    """Watches a run that does not count for another, which may end it."""

    def __init__(self, watch: Watcher, name: str) -> None:
        self._watch, self._name = watch, name

    def begin(self, stage: Stage) -> None:
        self.reach(stage, 0)

    def reach(self, stage: Stage, step: int) -> None:
        self._watch.say(f"warm-up of {self._name}, step {min(step, stage.steps)} of {stage.steps}")

    def frame_done(self, total: int) -> None:
        self._watch.say(f"warm-up of {self._name}")

    def close(self) -> None:
        """There is nothing to."""


class Bar:
    """One bar over the denoising steps of all runs, drawn where the whole takes more than two seconds.

    Attributes:
        stop: whether to end after the next step, by `KeyboardInterrupt`.
    """

    def __init__(self, runs: int, stages: Sequence[Stage], shown: bool) -> None:
        self.stop: Callable[[], bool] = lambda: False
        self._steps = [stage.steps for stage in stages]
        self._runs, self._run = runs, 0
        self._bar = tqdm(total=runs * sum(self._steps), disable=not shown, delay=2)

    def next_run(self, name: str) -> None:
        self._run += 1
        self._bar.set_description(f"{self._run} of {self._runs}, {name}", refresh=False)
        self._to(0)

    def begin(self, stage: Stage) -> None:
        self.reach(stage, 0)

    def reach(self, stage: Stage, step: int) -> None:
        self._to(sum(self._steps[: stage.number - 1]) + min(step, stage.steps))

    def frame_done(self, total: int) -> None:
        self._check()

    def say(self, text: str) -> None:
        self._check()

    def close(self) -> None:
        self._bar.close()

    def _to(self, step: int) -> None:
        self._bar.update((self._run - 1) * sum(self._steps) + step - self._bar.n)
        self._check()

    def _check(self) -> None:
        if self.stop():
            raise KeyboardInterrupt


def _let_go() -> None:
    """Frees what a run that failed has left on the accelerator; its error must be gone by then."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
