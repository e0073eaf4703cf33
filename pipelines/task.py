"""A job with all that is known of it before anything runs: what it fills in, which stages, what its record says."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import auto_method, clip, load, presets, provenance, render, resolve, save, settings, video_writer
from .errors import BadInput
from .job import Job
from .routes import Stage

if TYPE_CHECKING:
    from ..accel.methods.base import Config


@dataclasses.dataclass(frozen=True)
class Task:
    """
    Attributes:
        job: with every field given.
        configs: of its methods.
        record: what the file is to remember.
        remarks: what a report is to say of how the job came to be, such as why `auto` chose what it did.
    """

    job: Job
    stages: tuple[Stage, ...]
    configs: tuple[Config, ...]
    record: dict[str, Any]
    remarks: tuple[str, ...] = ()


def check(job: Job) -> None:
    """What can be said without the model.

    Raises:
        BadInput: with the number or the name that is wrong.
    """
    for name, text in (("prompt", job.prompt), ("negative", job.negative)):
        if text and any("\ud800" <= sign <= "\udfff" for sign in text):
            raise BadInput(f"{name} holds what is no text: half of a surrogate pair, or bytes that are not UTF-8.")
    resolve.check_numbers(job)
    settings.build(job.methods)


def extension(model: load.Model) -> str:
    """How the name of what the model makes usually ends."""
    return video_writer.KINDS[0] if makes_clips(model) else ".png"


def makes_clips(model: load.Model) -> bool:
    pipeline = load.pipeline_class(model)
    return pipeline is not None and clip.frames_argument(pipeline) is not None


def check_output(job: Job, model: load.Model) -> None:
    """
    Raises:
        BadInput: the file is of another kind than the model makes, or could not be written.
    """
    allowed, what = (video_writer.KINDS, "clips") if makes_clips(model) else ((".png",), "pictures")
    if job.output is not None:
        if load.pipeline_class(model) is not None and job.output.suffix.lower() not in allowed:
            raise BadInput(f"{job.output}: {job.model} makes {what}; the name must end in {' or '.join(allowed)}.")
        save.check_writable(job.output, ".png", *video_writer.KINDS)
    if makes_clips(model):
        video_writer.check(job.output, job.frames_dir)


def plan(job: Job, model: load.Model, pipe: Any, preset: presets.Preset, device: torch.device) -> Task:
    """
    Args:
        pipe: of the model; one without weights (`skeleton.skeleton_pipe`) will do.

    Raises:
        BadInput: the model cannot do the job.
        UnsupportedModel: nor can the method.
    """
    check(job)
    asked = job.to_record() if job.asked is None else job.asked
    dtype = load.pick_dtype(job.dtype, device, model)
    remarks: tuple[str, ...] = ()
    if settings.AUTO in job.methods:
        job, why = _chosen(job, pipe, preset, device)
        remarks = (why,)
    size = (job.width, job.height)
    merged = {name: {**preset.settings_of(name, *size), **values} for name, values in job.methods.items()}
    configs = settings.build(merged)
    methods = {name: config.to_dict() for name, config in zip(merged, configs, strict=True)}
    job = dataclasses.replace(job, methods=methods, asked=asked)
    job, stages = resolve.complete(job, pipe, preset, dtype, configs)
    render.check_route(pipe, job.route)
    if job.fps is not None:
        video_writer.check_fps(job.output, job.fps)
    record = job.to_record() | {"asked": asked, **provenance.surroundings(model, job, device)}
    if remarks:
        record["remarks"] = list(remarks)
    return Task(job, stages, tuple(configs), record, remarks)


def batch_key(task: Task) -> Hashable | None:
    """Equal for tasks that can share a call of the pipeline; None where a task needs one of its own."""
    job = task.job
    if len(task.stages) > 1 or job.route != "direct" or job.image is not None or job.batch is not None:
        return None
    own: dict[str, Any] = {"prompt": "", "seed": 0, "negative": job.negative and "", "output": None, "asked": None}
    return repr((dataclasses.replace(job, **own), task.configs))


def _chosen(job: Job, pipe: Any, preset: presets.Preset, device: torch.device) -> tuple[Job, str]:
    """`job` with the methods that `auto` chooses for it, and why."""
    open_job = dataclasses.replace(job, methods={})
    dtype = torch.float32  # the size does not depend on it
    sized, _ = resolve.complete(open_job, pipe, preset, dtype)
    assert sized.width is not None
    assert sized.height is not None
    methods, why = auto_method.choose(
        pipe,
        preset,
        width=sized.width,
        height=sized.height,
        frames=sized.window or sized.frames,
        steps=sized.steps,
        device=device,
    )
    return dataclasses.replace(job, methods=methods), why


def files_of(job: Job) -> tuple[Path, ...]:
    """What the job writes."""
    return tuple(path for path in (job.output, job.frames_dir) if path)
