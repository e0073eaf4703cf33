"""A model in memory, and what is made with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from . import compilation, load, lora, presets, run, save, scheduler, video_writer
from .errors import BadInput, NotWritten
from .film import Film
from .job import Companions, Job
from .low_memory import low_memory, tiled, untileable
from .render import Painter
from .routes import Stage
from .run import Look, Watch
from .stage_methods import StageMethods
from .stages import StageFolder
from .task import Task, plan

if TYPE_CHECKING:
    from ..accel.report import Report

Say = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """A picture or clip made. `image` is None for a clip, `job.output` for frames alone.

    `seconds` is the denoising and decoding alone, shared out evenly where several were made in one call, `peak_bytes`
    the most memory held on `device` meanwhile, or ever where `peak_since_start`. `notices` are what was done that the
    job did not ask for, such as stages taken from an earlier run.
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
    peak_since_start: bool = False


class Session:
    """Loads the model that a job names, as the job wants it; then makes jobs that want the same.

    Args:
        job: its model, variant, dtype, device, offloading, tiling, adapters, scheduler and compilation count.

    Raises:
        BadInput, UnsupportedModel: there is no such model, or it cannot be had so.
        JobFailed: it could not be read.
    """

    def __init__(self, job: Job, *, model: load.Model | None = None) -> None:
        self.model = model or load.find(job.model, variant=job.variant)
        self.preset = presets.read(self.model.folder)
        self.device = load.pick_device(job.device)
        if job.cpu_offload and self.device.type == "cpu":
            raise BadInput("--cpu-offload: this job runs on the CPU already.")
        if job.compile:
            compilation.check_compiler(self.device)
        for adapter in job.loras:
            lora.lora_file(adapter)  # before the model is read
        dtype = load.pick_dtype(job.dtype, self.device, self.model)
        self._job, self._placed = job, False
        self._methods: StageMethods | None = None
        self._notices: list[str] = []
        self._stack = ExitStack()
        self.pipe = load.load(self.model, dtype=dtype, variant=job.variant)
        if job.scheduler:
            scheduler.use_scheduler(self.pipe, job.scheduler)
        self._unused = lora.load_loras(self.pipe, job.loras, job.model)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._methods is not None:
            self._methods.close()
        self._stack.close()

    def plan(self, job: Job) -> Task:
        """What `make` takes.

        Raises:
            BadInput, UnsupportedModel: the model cannot do it.
        """
        return plan(job, self.model, self.pipe, self.preset, self.device)

    def make(
        self,
        tasks: Sequence[Task],
        *,
        watch: Watch | None = None,
        say: Say = lambda text: None,
        look: Look | None = None,
    ) -> tuple[Result, ...]:
        """Makes the pictures or clips in one call of the pipeline, and writes them.

        Args:
            tasks: one, or several of the same `task.batch_key`.
            watch: is told of each step and frame; by raising it ends the run.
            say: is told each notice as it comes up.
            look: is shown the latents after each step; what it does is not timed.

        Raises:
            BadInput, UnsupportedModel: before any step.
            JobFailed: something broke on the way; nothing was written but clips that were whole, and finished stages.
        """
        self._place(say)
        notices = [*self._notices]

        def notice(text: str) -> None:
            notices.append(text)
            say(text)

        first = tasks[0]
        for remark in first.remarks:
            notice(f"{remark}.")
        jobs, own = _company(tasks)
        tasks = [
            dataclasses.replace(task, record=_record(task, jobs, index)) for task, index in zip(tasks, own, strict=True)
        ]
        methods = self._in_place(first, notice)
        measured = run.reset_peak(self.device)
        runner = (Painter if first.job.frames is None else Film)(
            self.pipe,
            jobs,
            self.device,
            progress=watch or run.Progress(first.stages, shown=False),
            prepare=lambda made: place_again(made, self.device, first.job),
            methods=methods,
            say=notice,
            look=look,
        )
        images: Sequence[Image.Image | None] = [None] * len(tasks)
        try:
            if isinstance(runner, Film):
                _shoot(runner, tasks, own)
            elif len(first.stages) > 1:
                images = [_climb(runner, first, notice)]
            else:
                images = _paint(runner, tasks, own)
        except BaseException:
            # What a whole run does at its end; without, offloaded models would stay on the device.
            self.pipe.maybe_free_model_hooks()
            raise
        report, peak = methods.report(), run.peak_bytes(self.device)
        return tuple(
            Result(
                job=task.job,
                image=image,
                seconds=runner.seconds / len(tasks),
                peak_bytes=peak,
                device=self.device,
                report=report,
                record=task.record,
                stages=task.stages,
                notices=tuple(notices),
                peak_since_start=not measured,
            )
            for task, image in zip(tasks, images, strict=True)
        )

    def _in_place(self, task: Task, notice: Say) -> StageMethods:
        """The methods of `task`. Where they are in place already, nothing is read or compiled again."""
        if self._methods is None or not self._methods.again(task.configs, task.remarks, notice):
            if self._methods is not None:
                self._methods.close()
            self._methods = None  # what follows may fail
            self._methods = StageMethods(self.pipe, task.configs, notice, remarks=task.remarks)
        return self._methods

    def _place(self, say: Say) -> None:
        """Once, before the first run: what a job is refused for comes before weights are moved."""
        if self._placed:
            return

        def notice(text: str) -> None:
            self._notices.append(text)
            say(text)

        for text in self._unused:
            notice(text)
        _spare_memory(self.pipe, self._job, self._stack, notice)
        place(self.pipe, self.device, self._job)
        if self._job.compile:
            notice(f"compiled, {compilation.compile_denoisers(self.pipe)}: the first steps are slow.")
        self.pipe.set_progress_bar_config(disable=True)
        self._placed = True


def _company(tasks: Sequence[Task]) -> tuple[list[Job], list[int]]:
    """The jobs that go through the pipeline in one call, and which of them are those of `tasks`."""
    job = tasks[0].job
    if job.batch is None:
        return [task.job for task in tasks], list(range(len(tasks)))
    jobs = [
        dataclasses.replace(job, prompt=prompt, negative=negative, seed=seed, batch=None)
        for prompt, negative, seed in job.batch.of
    ]
    jobs[job.batch.index] = job
    return jobs, [job.batch.index]


def _record(task: Task, jobs: Sequence[Job], index: int) -> dict[str, Any]:
    if len(jobs) == 1:
        return task.record
    company = Companions(index, tuple((job.prompt, job.negative, job.seed) for job in jobs))
    return task.record | {"batch": company.to_record()}


def _paint(painter: Painter, tasks: Sequence[Task], own: Sequence[int]) -> list[Image.Image]:
    images, _ = painter.paint(tasks[0].stages[0], None, {})
    mine = [images[index] for index in own]
    for task, image in zip(tasks, mine, strict=True):
        _write(image, task)
    return mine


def _climb(painter: Painter, task: Task, notice: Say) -> Image.Image:
    """All stages, or those after the last that an earlier run has left; each begins with what the file holds."""
    assert task.job.output is not None
    folder = StageFolder(task.job.output, task.record)
    stages = task.stages
    image: Image.Image | None = None
    carried: dict[str, Any] = {}
    done = 0
    if found := folder.latest(stages):
        stage, image, carried = found
        done = stage.number
        notice(f"{stage}: taken from {folder.file(stage)}.")
    try:
        for stage in stages[done:]:
            [image], carried = painter.paint(stage, image, carried)
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
    _write(image, task)
    if not task.job.keep_stages:
        folder.remove()
    return image


def _write(image: Image.Image, task: Task) -> None:
    path = task.job.output
    assert path is not None
    try:
        save.write_png(image, path, task.record)
    except OSError as error:
        raise NotWritten(path, error) from error


def _shoot(film: Film, tasks: Sequence[Task], own: Sequence[int]) -> None:
    wanted = dict(zip(own, tasks, strict=True))
    for index, frames in enumerate(film.shoot(tasks[0].stages[0])):
        if (task := wanted.get(index)) is None:
            continue
        job = task.job
        assert job.fps is not None
        with video_writer.writers(job.output, job.frames_dir, fps=job.fps, record=task.record) as writers:
            for frame in frames:
                for writer in writers:
                    writer.add(frame)


def _spare_memory(pipe: Any, job: Job, stack: ExitStack, notice: Say) -> None:
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
