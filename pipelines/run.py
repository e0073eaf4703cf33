"""What pictures and clips share: a pipeline called for a job, with what goes wrong on the way said in one line."""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from tqdm import tqdm

from . import guidance, image_input
from .errors import BadInput, JobFailed
from .job import Job
from .routes import Stage

if TYPE_CHECKING:
    from .stage_methods import StageMethods

# How pipelines say, mostly by accident, that they cannot use what they are given.
UNFIT = (ValueError, TypeError, AttributeError, AssertionError, LookupError, OverflowError)
READABLE = 400
# Shown the latents of a stage after each of its steps.
Look = Callable[[Stage, torch.Tensor], None]
OURS = __name__.partition(".")[0]
# Of a picture's aspect ratio; rounding to a model's multiples stays below.
STRETCHED = 0.1


class Watch(Protocol):
    """Is told how far a run has come."""

    def begin(self, stage: Stage) -> None: ...

    def reach(self, stage: Stage, step: int) -> None:
        """May raise: the run ends with it, within a step."""

    def frame_done(self, total: int) -> None: ...

    def close(self) -> None: ...


class Progress:
    """One bar over the denoising steps of all stages, drawn where the whole takes more than two seconds."""

    def __init__(self, stages: tuple[Stage, ...], shown: bool) -> None:
        self._stages = stages
        self._bar = tqdm(total=sum(stage.steps for stage in stages), disable=not shown, delay=2)
        self._frames: tqdm[Any] | None = None

    def begin(self, stage: Stage) -> None:
        if stage.total > 1:
            self._bar.set_description(str(stage), refresh=False)
        self.reach(stage, 0)

    def reach(self, stage: Stage, step: int) -> None:
        before = sum(other.steps for other in self._stages[: stage.number - 1])
        # Schedulers of second order call twice for most steps.
        self._bar.update(before + min(step, stage.steps) - self._bar.n)

    def frame_done(self, total: int) -> None:
        """Another bar, over the frames of a clip, takes the place of that over the steps."""
        if self._frames is None:
            self._bar.close()
            self._frames = tqdm(total=total, unit="frame", desc="frames", disable=self._bar.disable, delay=2)
        self._frames.update()

    def close(self) -> None:
        self._bar.close()
        if self._frames is not None:
            self._frames.close()


class Runner:
    """Calls the pipeline of a job, or of several jobs at once.

    Args:
        pipe: placed where it is to run.
        jobs: that differ in their prompts, negative prompts and seeds at most.
        prepare: is given a pipeline made from `pipe`, before it runs; places it.
        methods: that a stage is to run with, if any.
        say: is told what the user did not ask for.
        look: is shown the latents after each step; may raise.

    Attributes:
        job: the first; what it says beside its prompts and seed goes for all.
        seconds: spent in denoising and decoding so far, without what `look` took.
    """

    def __init__(
        self,
        pipe: Any,
        jobs: Sequence[Job],
        device: torch.device,
        *,
        progress: Watch,
        prepare: Callable[[Any], None] = lambda pipe: None,
        methods: StageMethods | None = None,
        say: Callable[[str], None] = lambda text: None,
        look: Look | None = None,
    ) -> None:
        self.seconds = 0.0
        self._pipe, self._jobs, self._device = pipe, jobs, device
        self.job = jobs[0]
        self._progress, self._prepare, self._methods, self._say = progress, prepare, methods, say
        self._look = look
        self._steps_run = 0
        self._latents: torch.Tensor | None = None

    def _call(self, pipe: Any, stage: Stage, **more: Any) -> Any:
        """The output of `pipe`, its pictures as tensors; `more` counts before what the job says."""
        job = self.job

        def after_step(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self._after_step(stage, step + 1, tensors["latents"])
            return {}

        guided = [guidance.arguments(job, pipe) for job in self._jobs]
        wanted = {
            "prompt": self._each([job.prompt for job in self._jobs]),
            "width": stage.width,
            "height": stage.height,
            # The size is to be the one that is run: FLUX.1 Kontext would make a megapixel of any, PixArt, Sana and
            # HunyuanDiT one of a list of theirs, and enlarge that.
            "max_area": stage.width * stage.height,
            "use_resolution_binning": False,
            "num_inference_steps": job.steps,
            "max_sequence_length": job.max_sequence_length,
            **guided[0],
            "negative_prompt": self._each([one["negative_prompt"] for one in guided]),
            "generator": self._each([generator(job.seed) for job in self._jobs]),
            "callback_on_step_end": after_step,
            **more,
        }
        accepted = inspect.signature(pipe.__call__).parameters
        given = {name: value for name, value in wanted.items() if name in accepted and value is not None}
        with ExitStack() as stack:
            if "callback_on_step_end" not in accepted:
                stack.enter_context(
                    _watched(pipe.scheduler, lambda step, latents: self._after_step(stage, step, latents))
                )
            return pipe(**given, output_type="pt")

    def _made(self, output: Any, name: str) -> torch.Tensor:
        """The pixels in what a pipeline gives."""
        pixels = getattr(output, name, None)
        if not isinstance(pixels, torch.Tensor):
            what = f"{name} as {type(pixels).__name__}" if pixels is not None else f"no {name}"
            raise JobFailed(f"{type(self._pipe).__name__} gives {what}; of that nothing can be written.")
        return pixels

    def _begin_with(self, pipe: Any, stage: Stage) -> Image.Image:
        """The job's picture, as `pipe` takes it."""
        assert self.job.image is not None
        image = image_input.read(self.job.image)
        given = image_input.argument(image, pipe, stage.width, stage.height)
        if given.size != image.size and abs(image.width * given.height / (image.height * given.width) - 1) > STRETCHED:
            self._say(f"{self.job.image} is {image.width}x{image.height}, stretched to {given.width}x{given.height}.")
        return given

    def _each(self, values: list[Any]) -> Any:
        """One argument of a call: a list only where there are several jobs, and something to say of them."""
        if len(values) == 1:
            return values[0]
        return None if values[0] is None else values

    def _after_step(self, stage: Stage, step: int, latents: torch.Tensor) -> None:
        self._steps_run += 1
        if not torch.isfinite(latents).all():
            raise JobFailed(
                f"not-a-number in the latents after step {step} of {stage.steps} in {self.job.dtype}.{self._try()}"
            )
        self._latents = latents
        self._progress.reach(stage, step)
        if self._look:
            start = time.perf_counter()
            self._look(stage, latents)
            self.seconds -= time.perf_counter() - start

    @contextmanager
    def _failures(self, stage: Stage) -> Iterator[None]:
        try:
            yield
        except (BadInput, JobFailed):
            raise
        except NameError as error:
            if self._steps_run or type(error) is not NameError or _is_ours(error):
                raise
            # What they import only where it is installed, such as ftfy.
            raise BadInput(f"{type(self._pipe).__name__} needs {error.name}: pip install {error.name}") from error
        except UNFIT as error:
            if self._steps_run == 0 and (isinstance(error, ValueError | TypeError) or not _is_ours(error)):
                said = " ".join(str(error).split())[:READABLE] or type(error).__name__
                raise BadInput(f"{type(self._pipe).__name__} stopped before its first step: {said}") from error
            raise
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                frames = f", {self.job.frames} frames," if self.job.frames else ""
                raise JobFailed(
                    f"out of memory at {stage.width}x{stage.height}{frames} on {self._device} after {self._steps_run} "
                    f"steps. Try a smaller size{', fewer frames' if frames else ''}, --low-memory, --vae-tiling or "
                    "--cpu-offload model."
                ) from error
            if self.job.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
                said = " ".join(str(error).split())[:READABLE]
                raise JobFailed(f"--compile failed; without it the job may run: {said}") from error
            raise

    def _try(self) -> str:
        return " Try --dtype float32." if self.job.dtype != "float32" else ""


@contextmanager
def _watched(scheduler: Any, tell: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Tells of each step in the block, by its number and latents, for pipelines that have no callback."""
    step, count = scheduler.step, itertools.count(1)

    @functools.wraps(step)  # pipelines look at its arguments
    def watched(*arguments: Any, **named: Any) -> Any:
        output = step(*arguments, **named)
        tell(next(count), output[0])
        return output

    vars(scheduler)["step"] = watched
    try:
        yield
    finally:
        del vars(scheduler)["step"]


def _is_ours(error: BaseException) -> bool:
    """Whether it was raised in this package: then it is a defect, and its traceback is to be seen."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and str(place.tb_frame.f_globals.get("__name__")).startswith(f"{OURS}.")


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def reset_peak(device: torch.device) -> bool:
    """Begin to measure `peak_bytes` anew; returns whether that is possible here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int | None:
    """The most memory held since `reset_peak`, or ever where that is not possible: of the accelerator where there is
    one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        # Not `ru_maxrss`: a process inherits that from the one that started it.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
