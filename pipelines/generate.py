"""One job: a prompt and what goes with it → one picture on disk. What can be refused is refused before step 1."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from . import load, presets, render, resolve, save, settings
from .errors import BadInput, JobFailed
from .job import Job
from .low_memory import low_memory, tiled, untileable
from .routes import Stage
from .stage_methods import StageMethods
from .stages import StageFolder

if TYPE_CHECKING:
    from ..accel.report import Report


@dataclass(frozen=True)
class Result:
    """A picture made. `seconds` is the denoising and decoding alone, `peak_bytes` the most memory held on `device`.

    `notices` are what was done that the job did not ask for, such as stages taken from an earlier run.
    """

    job: Job
    image: Image.Image
    seconds: float
    peak_bytes: int | None
    device: torch.device
    report: Report | None
    record: dict[str, Any]
    stages: tuple[Stage, ...]
    notices: tuple[str, ...] = ()


def generate(job: Job, *, progress: bool = False, say: Callable[[str], None] = lambda text: None) -> Result:
    """Makes the picture and writes it to `job.output`.

    Args:
        progress: draw a bar.
        say: is told each notice as it comes up.

    Raises:
        BadInput, UnsupportedModel: the job cannot be done as written; no step was run.
        JobFailed: something broke on the way; nothing was written but finished stages, from which the job goes on.
    """
    save.check_writable(job.output, ".png")
    resolve.check_numbers(job)
    settings.build(job.methods)  # a wrong setting is said before the model is read
    asked = job.to_record() if job.asked is None else job.asked
    model = load.find(job.model, variant=job.variant)
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
        bar = render.Progress(stages, progress)
        stack.callback(bar.close)
        painter = render.Painter(
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
        folder = StageFolder(job.output, record)
        image = _climb(painter, stages, folder, notice)
        report = in_place.report()
    try:
        save.write_png(image, job.output, record)
    except OSError as error:
        raise JobFailed(f"{job.output} could not be written: {error.strerror or error}") from error
    if not job.keep_stages:
        folder.remove()
    peak = render.peak_bytes(device)
    return Result(job, image, painter.seconds, peak, device, report, record, stages, tuple(notices))


def versions() -> dict[str, str]:
    """The versions that shape a picture."""
    names = ("attnswap", "torch", "diffusers", "transformers")
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: importlib.metadata.version(name) for name in names},
    }


def _climb(
    painter: render.Painter, stages: tuple[Stage, ...], folder: StageFolder, notice: Callable[[str], None]
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
