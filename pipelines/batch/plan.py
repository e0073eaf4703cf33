"""A manifest, checked against its model to the last row before the first is made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...accel.errors import UnsupportedModel
from .. import load, presets, save, video_writer
from ..errors import BadInput
from ..job import Job
from ..session import Session
from ..skeleton import skeleton_pipe
from ..task import Task, extension, plan
from . import manifest
from .journal import RESULTS
from .manifest import BadManifest, Problem, Row


@dataclass(frozen=True)
class Planned:
    """A row and what it comes to.

    Attributes:
        task: with the file it makes.
        asked: tells whether a result of an earlier run is of what the row asks for.
    """

    row: Row
    task: Task
    asked: str

    @property
    def id(self) -> str:
        return self.row.id

    @property
    def file(self) -> Path:
        assert self.task.job.output is not None
        return self.task.job.output

    @property
    def work(self) -> int:
        """About proportional to the time it takes, for rows of one model."""
        job = self.task.job
        return sum(stage.width * stage.height * stage.steps for stage in self.task.stages) * (job.frames or 1)


def read(path: Path, defaults: Job, folder: Path) -> tuple[tuple[Planned, ...], load.Model, Session | None]:
    """The rows of the manifest at `path`, their model, and that in memory where nothing less could check them.

    Args:
        defaults: for what a row does not say; its model is that of all rows.
        folder: where their files are to be.

    Raises:
        BadManifest: with everything that is wrong in it.
        BadInput, UnsupportedModel: the manifest cannot be read, or there is no such model.
    """
    rows, problems = manifest.parse(path, defaults)
    model = load.find(defaults.model, variant=defaults.variant)
    device = load.pick_device(defaults.device)
    if (kind := extension(model)) in video_writer.KINDS:
        video_writer.check(folder / f"clip{kind}", None)
    session, pipe = _pipe(defaults, model)
    preset = presets.read(model.folder)
    planned = []
    for row in rows:
        job = dataclasses.replace(row.job, output=folder / f"{row.id}{kind}")
        try:
            task = plan(job, model, pipe, preset, device)
        except (BadInput, UnsupportedModel) as error:
            problems.append(Problem(row.line, str(error)))
        else:
            planned.append(Planned(row, task, _asked(row.job, task)))
    if problems:
        raise BadManifest(path, problems, rows)
    return tuple(planned), model, session


def _pipe(job: Job, model: load.Model) -> tuple[Session | None, Any]:
    """A pipeline without weights; where its class does not go without, the real one in its session."""
    try:
        return None, skeleton_pipe(model)
    except UnsupportedModel:
        session = Session(job, model=model)
        return session, session.pipe


def _asked(job: Job, task: Task) -> str:
    """Changes with the row, with the contents of its image wherever that is, and with the files of the model."""
    files = task.record["fingerprints"]
    document = job.to_record() | {"image": files["image"], "model_files": files["model"]}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def check_folder(folder: Path, *, make: bool) -> None:
    """
    Args:
        make: it, where it is not there.

    Raises:
        BadInput: it cannot be made or written, or is a file.
    """
    if not folder.parent.is_dir():
        raise BadInput(f"-o {folder}: the folder {folder.parent} does not exist.")
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"-o {folder} is a file; a batch needs a folder.")
    if not make and not folder.exists():
        return
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise BadInput(f"-o {folder} could not be made: {error.strerror}.") from error
    save.check_folder(folder / RESULTS)
