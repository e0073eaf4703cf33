"""One job: a prompt and what goes with it → a picture or a clip on disk.

What can be refused is refused before step 1.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from pathlib import Path

from . import load, provenance, recorded, run, save, task, video_writer
from .job import Job
from .session import Result, Session

__all__ = ["Result", "generate"]


def generate(
    job: Job,
    *,
    like: recorded.Original | None = None,
    progress: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Result:
    """Makes the picture or clip and writes it to `job.output`.

    Args:
        like: one that is to be made again; what it asks for, and what is otherwise here and now, is said.
        progress: draw a bar.
        say: is told each notice as it comes up.

    Raises:
        BadInput, UnsupportedModel: the job cannot be done as written; no step was run.
        JobFailed: something broke on the way; nothing was written but finished stages, from which the job goes on.
    """
    if job.output is not None:
        save.check_writable(job.output, ".png", *video_writer.KINDS)
    task.check(job)  # a wrong setting is said before the model is read
    if like is None:
        model = load.find(job.model, variant=job.variant)
    else:
        job, model, asks = recorded.find(job, like)
        if asks:
            say(asks)
    if job.output is None and job.frames_dir is None:
        name = f"attnswap-{datetime.datetime.now():%Y%m%d-%H%M%S}-{job.seed}{task.extension(model)}"
        job = dataclasses.replace(job, output=Path(name))
    task.check_output(job, model)
    with Session(job, model=model) as session:
        planned = session.plan(job)
        for difference in provenance.differences(like.record, planned.record) if like else ():
            say(f"not as it was made: {difference}.")
        bar = run.Progress(planned.stages, progress)
        try:
            [result] = session.make([planned], watch=bar, say=say)
        finally:
            bar.close()
    return result
