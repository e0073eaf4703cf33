"""Makes the pictures and clips of a comparison one at a time, and measures each."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ...accel.errors import UnsupportedModel, WeightsError
from .. import save, settings, task
from ..errors import BadInput, JobFailed
from ..job import Job
from ..routes import Stage
from ..session import Result, Session
from ..stage_methods import StageMethods
from ..task import Task
from . import metrics
from .figures import Comparison, Outcome, Shot
from .variants import DENSE, Variant, ids, slug

# Of the user's making, so that the message says it all.
SAID = (BadInput, JobFailed, UnsupportedModel, WeightsError)


class Studio:
    """
    Args:
        job: what all pictures have in common.
        folder: for the pictures; it need not be there yet.
        work: for what is needed meanwhile.
    """

    def __init__(self, session: Session, job: Job, folder: Path, work: Path) -> None:
        self.session, self.folder, self.work = session, folder, work
        self._job = job
        kind = task.extension(session.model)
        self._kind = ".gif" if kind == ".mp4" and not save.has_av() else kind
        self._ids: dict[str, str] = {}

    def plans(self, variants: Sequence[Variant]) -> tuple[Task, dict[Variant, Task | str]]:
        """The plan of dense attention; and of this and the variants, `auto` by what it chose, or why there is none.

        Raises:
            BadInput: dense attention cannot do the job, whatever the method.
            UnsupportedModel, WeightsError: nor can any of the variants, of which the first says why.
        """
        dense = self._plan(DENSE)
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
        self._ids = ids(tuple(found))
        return dense, found

    def checked(self, variant: Variant) -> Task:
        """Its plan, after its methods were put in place once: what they lack, such as weights, shows only there.

        Raises:
            BadInput, UnsupportedModel, WeightsError: it cannot be had.
        """
        plan = self._plan(variant)
        StageMethods(self.session.pipe, plan.configs, lambda text: None).close()
        return plan

    def warm_up(self, variant: Variant) -> None:
        """One run that is not timed, nor kept. What goes wrong will go wrong again when it counts."""
        picture, frames = self.work / f"warm-up{self._kind}", self.work / "warm-up"
        output = None if self._makes_clips else picture
        with suppress(Exception):
            self.session.make([self._plan(variant, output=output, frames_dir=self._clip(frames))])
        picture.unlink(missing_ok=True)
        shutil.rmtree(frames, ignore_errors=True)
        _let_go()

    def make(
        self, comparison: Comparison, shot: Shot, variant: Variant, bar: Bar, say: Callable[[str], None]
    ) -> Outcome:
        """Makes one picture or clip, and compares it with that of dense attention; what goes wrong is an outcome."""
        dense = comparison.outcome(shot, DENSE)
        output = self.folder / f"{self._name(shot, variant)}{self._kind}"
        try:
            plan = self._plan(variant, shot, output=output, frames_dir=self._clip(self.frames(output.name)))
            [result] = self.session.make([plan], watch=bar)
            return self._outcome(result, dense.file if dense else None)
        except SAID as error:
            outcome = Outcome(error=str(error))
        except Exception as error:  # a defect in one variant must not take the others with it
            say(traceback.format_exc())
            outcome = Outcome(error=f"{type(error).__name__}: {error}")
        _let_go()
        return outcome

    def frames(self, file: str) -> Path:
        """The folder with the frames of a clip, lossless."""
        return self.work / Path(file).stem

    def _outcome(self, result: Result, dense: str | None) -> Outcome:
        assert result.job.output is not None
        file = result.job.output.name
        report = result.report.summary() if result.report else None
        return Outcome(
            file=file,
            seconds=result.seconds,
            peak_bytes=result.peak_bytes,
            peak_since_start=result.peak_since_start,
            density=report["density"] if report else None,
            likeness=self._likeness(file, dense) if dense else None,
            report=report,
            notes=(*result.notices, *(report["notes"] if report else ())),
        )

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

    def _plan(
        self, variant: Variant, shot: Shot | None = None, *, output: Path | None = None, frames_dir: Path | None = None
    ) -> Task:
        own = {"prompt": shot.prompt, "seed": shot.seed} if shot else {}
        job = dataclasses.replace(
            self._job,
            methods=variant.methods,
            output=output,
            frames_dir=frames_dir,
            **own,  # type: ignore[arg-type]
        )
        return self.session.plan(job)


class Bar:
    """One bar over the denoising steps of all runs, drawn where the whole takes more than two seconds."""

    def __init__(self, runs: int, stages: Sequence[Stage], shown: bool) -> None:
        self._steps = [stage.steps for stage in stages]
        self._runs, self._run = runs, 0
        self._bar = tqdm(total=runs * sum(self._steps), disable=not shown, delay=2)

    def start(self, name: str) -> None:
        self._run += 1
        self._bar.set_description(f"{self._run} of {self._runs}, {name}", refresh=False)
        self._to(0)

    def begin(self, stage: Stage) -> None:
        self.reach(stage, 0)

    def reach(self, stage: Stage, step: int) -> None:
        self._to(sum(self._steps[: stage.number - 1]) + min(step, stage.steps))

    def frame_done(self, total: int) -> None:
        pass

    def close(self) -> None:
        self._bar.close()

    def _to(self, step: int) -> None:
        self._bar.update((self._run - 1) * sum(self._steps) + step - self._bar.n)


def _let_go() -> None:
    """Frees what a run that failed has left on the accelerator; its error must be gone by then."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
