"""A comparison from beginning to end: what is compared, in which order, and what is written."""

from __future__ import annotations

import dataclasses
import datetime
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from ...accel.errors import UnsupportedModel, WeightsError
from ...accel.methods import methods
from .. import save, settings, task
from ..errors import BadInput, JobFailed
from ..job import Job
from ..routes import Stage
from ..session import Result, Session
from ..task import Task
from . import files, text
from .figures import Comparison, Outcome, Shot
from .studio import Bar, Studio, Watcher
from .variants import DENSE, Variant

WORK = ".work"
# Of each variant before any run that counts, on a CPU: what a process does only once is to be on nobody's account.
WARM_UP_STEPS = 2
# What belongs to a picture and not to the whole.
OWN = ("prompt", "seed", "asked", "methods", "batch", "remarks")

Say = Callable[[str], None]


def compare(
    job: Job,
    variants: Sequence[Variant],
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    command: str = "",
    progress: bool = False,
    say: Say = lambda text: None,
    stopping: AbstractContextManager[Callable[[], bool]] | None = None,
    session: Session | None = None,
    watch: Callable[[int, Sequence[Stage]], Watcher] | None = None,
    work: Path | None = None,
    made: Callable[[Result], Any] = lambda result: None,
) -> Comparison:
    """Makes a picture or clip of every prompt and seed, with dense attention and with every variant.

    A variant that fails is recorded, and the others go on. An interrupt ends the runs, and what there is is written.

    Args:
        job: what they have in common.
        variants: beside dense attention; with none, all methods that apply to the model.
        folder: for everything; it is not there or empty.
        command: for the record.
        progress: draw a bar.
        say: is told of defects.
        stopping: is entered for the runs; gives whether to end after the next step.
        session: of the job, with its model in memory, and left so; without, the model is loaded and let go.
        watch: makes what is told of the runs, in place of the bar and of `stopping`, by how many runs there are and by
            the stages of each.
        work: an empty folder for the frames of clips, each clip's named by its file; they are left there. Without, they
            are not kept.
        made: is given each picture or clip as it is there, with its whole report.

    Raises:
        BadInput, UnsupportedModel, WeightsError: nothing can be compared as asked for; nothing was run or written.
        JobFailed: the model could not be read, or the results not be written.
        KeyboardInterrupt: before the first picture was made; nothing was written.
    """
    check_folder(folder)
    shots = shots_of(prompts, seeds)
    job = dataclasses.replace(job, prompt=prompts[0], seed=seeds[0])
    task.check(job)
    for variant in variants:
        settings.build({name: values for name, values in variant.methods.items() if name != settings.AUTO})
    with nullcontext(session) if session else Session(job) as session:
        studio = Studio(session, job, folder, work or folder / WORK, made)
        dense = studio.plan(DENSE)
        notes = []
        if not variants:
            variants, said = applicable(studio)
            notes.append(said)
        plans = studio.plans(dense, variants)
        comparison = _comparison(dense, plans, shots, command, notes, _warm_up_steps(dense, session))
        runs = len(shots) * len(plans)
        bar = Bar(runs, dense.stages, progress)
        try:
            with _said_in_a_line(folder):
                folder.mkdir(exist_ok=True)
                studio.work.mkdir(exist_ok=True)
            try:
                with stopping or nullcontext(bar.stop) as bar.stop:
                    _run(studio, comparison, plans, watch(runs, dense.stages) if watch else bar, say)
            except KeyboardInterrupt:
                if not comparison.outcomes:
                    raise  # before the first picture
            with _said_in_a_line(folder):
                files.write(comparison, folder, studio.frames)
        finally:
            bar.close()
            # What a route keeps for going on belongs to a picture that nobody will go on with.
            for rest in (folder / WORK, *folder.glob(".*.stages")):
                shutil.rmtree(rest, ignore_errors=True)
            with suppress(OSError):
                folder.rmdir()  # nothing was made
    return comparison


def check_folder(folder: Path) -> None:
    """
    Raises:
        BadInput: a file, a folder with something in it, or one that cannot be made or written in.
    """
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; -o takes a folder.")
    if folder.is_dir():
        if any(folder.iterdir()):
            raise BadInput(f"{folder} is not empty; a comparison needs a folder of its own.")
        save.check_folder(folder / files.JSON)
    else:
        save.check_folder(folder)


def shots_of(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Shot, ...]:
    """Every prompt with every seed.

    Raises:
        BadInput: one is there twice.
    """
    for what, given in (("prompt", prompts), ("seed", seeds)):
        for value in dict.fromkeys(given):
            if (count := list(given).count(value)) > 1:
                raise BadInput(f"{what} {text.shortened(str(value), text.LONGEST_NAME)!r} is there {count} times.")
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    return tuple(Shot(number, prompt, seed) for number, (prompt, seed) in enumerate(pairs, 1))


def applicable(studio: Studio) -> tuple[list[Variant], str]:
    """Every method that this model and size take, as a variant, and a line that says so.

    Raises:
        UnsupportedModel: there is none.
    """
    found, left_out = [], []
    for name in methods():
        variant = Variant(name, {name: {}})
        try:
            studio.checked(variant)
        except UnsupportedModel:
            left_out.append(f"{name} does not work on it")
        except (BadInput, WeightsError) as error:
            left_out.append(f"{name}: {str(error).rstrip('.')}")
        else:
            found.append(variant)
    if not found:
        raise UnsupportedModel(f"no method applies to {studio.session.model.name}: {'; '.join(left_out)}.")
    return found, "; ".join(["no --method given, so all that apply are compared", *left_out]) + "."


def _run(studio: Studio, comparison: Comparison, plans: dict[Variant, Task | str], watch: Watcher, say: Say) -> None:
    shots, variants = comparison.shots, comparison.variants
    cold = {variant: plan for variant, plan in plans.items() if isinstance(plan, Task)}
    if comparison.record["compile"]:
        # It is compiled again whenever its method changes.
        order = [(shot, variant) for variant in variants for shot in shots]
    else:
        # In turn, so that a machine that slows down does so for all, and each is first at some time.
        count = len(variants)
        order = [(shot, variants[(turn + place) % count]) for turn, shot in enumerate(shots) for place in range(count)]
        for variant, ready in cold.items():
            studio.warm_up(variant, ready, comparison.warm_up_steps, watch)
        cold.clear()
    for shot, variant in order:
        watch.next_run(variant.name)
        plan = plans[variant]
        if isinstance(plan, str):
            outcome = Outcome(error=plan)
        else:
            if variant in cold:
                studio.warm_up(variant, cold.pop(variant), comparison.warm_up_steps, watch)
            outcome = studio.make(comparison, shot, variant, watch, say)
        comparison.outcomes[shot.number, variant.name] = outcome
        studio.liken(comparison, shot, say)


def _warm_up_steps(dense: Task, session: Session) -> int:
    """All where kernels are compiled in a first run; else a few, of each stage."""
    assert dense.job.steps is not None
    if session.device.type != "cpu" or dense.job.compile:
        return dense.job.steps
    least = min(stage.strength or 1.0 for stage in dense.stages)
    return min(dense.job.steps, math.ceil(WARM_UP_STEPS / least))


def _comparison(
    dense: Task,
    plans: dict[Variant, Task | str],
    shots: tuple[Shot, ...],
    command: str,
    notes: list[str],
    warm_up_steps: int,
) -> Comparison:
    job = dense.job
    assert job.width is not None
    assert job.height is not None
    return Comparison(
        shots=shots,
        variants=tuple(plans),
        size=(job.width, job.height),
        frames=job.frames,
        fps=str(job.fps) if job.fps else None,
        about=text.about(dense, shots),
        record={name: value for name, value in dense.record.items() if name not in OWN},
        settings={variant.name: plan.record["methods"] for variant, plan in plans.items() if isinstance(plan, Task)},
        command=command,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        notes=notes,
        warm_up_steps=warm_up_steps,
    )


@contextmanager
def _said_in_a_line(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise JobFailed(f"{error.filename or folder} could not be written: {error.strerror or error}") from error
