"""One job: a prompt and what goes with it → a picture or a clip on disk.

What can be refused is refused before step 1.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from . import clip, load, presets, render, resolve, run, save, settings, video_writer
from .errors import BadInput, JobFailed
from .film import Film
from .job import Job
from .low_memory import low_memory, tiled, untileable
from .render import Painter
from .routes import Stage
from .stage_methods import StageMethods
from .stages import StageFolder

if TYPE_CHECKING:
    from ..accel.report import Report


@dataclass(frozen=True)
class Result:
    """A picture or clip made. `image` is None for a clip, `job.output` for frames alone.

    `seconds` is the denoising and decoding alone, `peak_bytes` the most memory held on `device`. `notices` are what was
    done that the job did not ask for, such as stages taken from an earlier run.
    """

    job: Job
    image: Image.Image | None
    seconds: float
    peak_bytes: int | None
    device: torch.device
    report: Report | None
    record: dict[str, Any]
    stages: tuple[Stage, ...]
    notices: tuple[str, ...] = ()


def generate(job: Job, *, progress: bool = False, say: Callable[[str], None] = lambda text: None) -> Result:
    """Makes the picture or clip and writes it to `job.output`.

    Args:
        progress: draw a bar.
        say: is told each notice as it comes up.

    Raises:
        BadInput, UnsupportedModel: the job cannot be done as written; no step was run.
        JobFailed: something broke on the way; nothing was written but finished stages, from which the job goes on.
    """
    if job.output is not None:
        save.check_writable(job.output, ".png", *video_writer.KINDS)
    resolve.check_numbers(job)
    settings.build(job.methods)  # a wrong setting is said before the model is read
    asked = job.to_record() if job.asked is None else job.asked
    model = load.find(job.model, variant=job.variant)
    job = _named(job, model)
    preset = presets.read(model.folder)
    size = (job.width, job.height)
    merged = {name: {**preset.settings_of(name, *size), **values} for name, values in job.methods.items()}
    configs = settings.build(merged)
    device = load.pick_device(job.device)
    if job.cpu_offload and device.type == "cpu":
        raise BadInput("--cpu-offload: this job runs on the CPU already.")
    dtype = load.pick_dtype(job.dtype, device, model)

    pipe = load.load(model, dtype=dtype, variant=job.variant)
    methods = {name: config.to_dict() for name, config in zip(merged, configs, strict=True)}
    job, stages = resolve.complete(dataclasses.replace(job, methods=methods, asked=asked), pipe, preset, dtype, configs)
    render.check_route(pipe, job.route)
    if job.fps is not None:
        video_writer.check_fps(job.output, job.fps)
    record = job.to_record() | {"asked": asked, "device": str(device), "versions": versions()}

    notices: list[str] = []

    def notice(text: str) -> None:
        notices.append(text)
        say(text)

    with ExitStack() as stack:
        _spare_memory(pipe, job, stack, notice)
        place(pipe, device, job)
        pipe.set_progress_bar_config(disable=True)
        in_place = StageMethods(pipe, configs, notice)
        stack.callback(in_place.close)
        bar = run.Progress(stages, progress)
        stack.callback(bar.close)
        runner = (Painter if job.frames is None else Film)(
            pipe,
            job,
            device,
            progress=bar,
            prepare=lambda made: place_again(made, device, job),
            methods=in_place,
            say=notice,
        )
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        image = None
        if isinstance(runner, Painter):
            image = _picture(runner, stages, record, notice)
        else:
            _clip(runner, stages[0], record)
        report = in_place.report()
    peak = run.peak_bytes(device)
    return Result(job, image, runner.seconds, peak, device, report, record, stages, tuple(notices))


def _named(job: Job, model: load.Model) -> Job:
    """`job` with an output that suits what the model makes, where none is given.

    Raises:
        BadInput: one of another kind is given, or it could not be written.
    """
    pipeline = load.pipeline_class(model)
    makes_clips = pipeline is not None and clip.frames_argument(pipeline) is not None
    kinds, what = (video_writer.KINDS, "clips") if makes_clips else ((".png",), "pictures")
    if job.output is None and job.frames_dir is None:
        name = f"attnswap-{datetime.datetime.now():%Y%m%d-%H%M%S}-{job.seed}{kinds[0]}"
        job = dataclasses.replace(job, output=Path(name))
    elif pipeline is not None and job.output is not None and job.output.suffix.lower() not in kinds:
        raise BadInput(f"{job.output}: {job.model} makes {what}; the name must end in {' or '.join(kinds)}.")
    if makes_clips:
        video_writer.check(job.output, job.frames_dir)
    return job


def _picture(
    painter: Painter, stages: tuple[Stage, ...], record: dict[str, Any], notice: Callable[[str], None]
) -> Image.Image:
    job = painter.job
    assert job.output is not None
    folder = StageFolder(job.output, record)
    image = _climb(painter, stages, folder, notice)
    try:
        save.write_png(image, job.output, record)
    except OSError as error:
        raise JobFailed(f"{job.output} could not be written: {error.strerror or error}") from error
    if not job.keep_stages:
        folder.remove()
    return image


def _clip(film: Film, stage: Stage, record: dict[str, Any]) -> None:
    job = film.job
    assert job.fps is not None
    with video_writer.writers(job.output, job.frames_dir, fps=job.fps, record=record) as writers:
        for frame in film.shoot(stage):
            for writer in writers:
                writer.add(frame)


def versions() -> dict[str, str]:
    """The versions that shape pictures and clips."""
    names = ("attnswap", "torch", "diffusers", "transformers")
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: importlib.metadata.version(name) for name in names},
    }


def _climb(
    painter: Painter, stages: tuple[Stage, ...], folder: StageFolder, notice: Callable[[str], None]
) -> Image.Image:
    """All stages, or those after the last that an earlier run has left; each begins with what the file holds."""
    image: Image.Image | None = None
    carried: dict[str, Any] = {}
    done = 0
    if found := folder.latest(stages):
        stage, image, carried = found
        done = stage.number
        notice(f"{stage}: taken from {folder.file(stage)}.")
    try:
        for stage in stages[done:]:
            image, carried = painter.paint(stage, image, carried)
            if stage is not stages[-1]:
                folder.keep(stage, image, carried)
                done = stage.number
    except BaseException:
        if done:
            # The output is named: without -o its name holds the time, and the next run would not find these stages.
            notice(
                f"{done} of {len(stages)} stages are kept in {folder.path}; "
                f"the same command with -o {folder.output} goes on from there."
            )
        raise
    assert image is not None
    return image


def _spare_memory(pipe: Any, job: Job, stack: ExitStack, notice: Callable[[str], None]) -> None:
    if job.vae_tiling:
        if reason := untileable(pipe.vae):
            raise BadInput(f"--vae-tiling: {type(pipe.vae).__name__} cannot: {reason}.")
        stack.enter_context(tiled(pipe.vae))
    if job.low_memory:
        notice(f"low memory: {', '.join(stack.enter_context(low_memory(pipe)))}.")


def place(pipe: Any, device: torch.device, job: Job) -> None:
    """Where the job wants the weights: on the device, or there only while they are needed."""
    if job.cpu_offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif job.cpu_offload == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda")
    else:
        pipe.to(device)


def place_again(made: Any, device: torch.device, job: Job) -> None:
    """A pipeline that shares its components with one already placed; only one can move whole models about."""
    if job.cpu_offload == "model":
        place(made, device, job)
