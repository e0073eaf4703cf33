"""One stage of a job → one picture, with what goes wrong on the way said in one line."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from . import guidance
from .errors import BLACKED_OUT, BadInput, JobFailed
from .job import Job
from .low_memory import has_tile_side, tiled, untileable
from .routes import Stage, superres

if TYPE_CHECKING:
    from .stage_methods import StageMethods

# From this side a stage's autoencoder works in tiles by itself, and where they can be set in tiles of this side: few,
# so few seams.
TILING_SIDE, TILE_SIDE = 4096, 2048


class Progress:
    """One bar over the denoising steps of all stages, drawn where the whole takes more than two seconds."""

    def __init__(self, stages: tuple[Stage, ...], shown: bool) -> None:
        self._stages = stages
        self._bar = tqdm(total=sum(stage.steps for stage in stages), disable=not shown, delay=2)

    def begin(self, stage: Stage) -> None:
        if stage.total > 1:
            self._bar.set_description(str(stage), refresh=False)
        self.reach(stage, 0)

    def reach(self, stage: Stage, step: int) -> None:
        before = sum(other.steps for other in self._stages[: stage.number - 1])
        # Schedulers of second order call twice for most steps.
        self._bar.update(before + min(step, stage.steps) - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class Painter:
    """Paints the stages of a job.

    Args:
        pipe: the text-to-image pipeline, placed where it is to run.
        prepare: is given a pipeline made from `pipe`, before it runs; places it.
        methods: that a stage is to run with, if any.
        say: is told what the user did not ask for.

    Attributes:
        seconds: spent in stages so far.
    """

    def __init__(
        self,
        pipe: Any,
        job: Job,
        device: torch.device,
        *,
        progress: Progress,
        prepare: Callable[[Any], None] = lambda pipe: None,
        methods: StageMethods | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.seconds = 0.0
        self._pipe, self._job, self._device = pipe, job, device
        self._progress, self._prepare, self._methods, self._say = progress, prepare, methods, say
        self._steps_run = 0
        self._latents: torch.Tensor | None = None

    def paint(
        self, stage: Stage, before: Image.Image | None, carried: dict[str, Any]
    ) -> tuple[Image.Image, dict[str, Any]]:
        """The picture of `stage`, and what later stages must know beside it.

        Args:
            before: the picture of the stage before.
            carried: what that stage gave; JSON can hold it.

        Raises:
            BadInput: the pipeline refuses the first stage before any step.
            JobFailed: out of memory, not-a-number, a black picture.
        """
        self._progress.begin(stage)
        start = time.perf_counter()
        if self._methods:
            self._methods.enter(stage)
        with self._failures(stage), self._tiles(stage):
            if before is None:
                pixels = self._text_to_image(stage)
                if self._job.route == "superres-ladder" and self._latents is not None:
                    mean, std = superres.moments_of(self._latents)
                    carried = {"mean": mean.flatten().tolist(), "std": std.flatten().tolist()}
            elif stage.scale > 1:
                pixels = self._two_branch(stage, _resized(before, stage), carried)
            else:
                pixels = self._image_to_image(stage, _resized(before, stage))
        self.seconds += time.perf_counter() - start
        self._progress.reach(stage, stage.steps)
        return self._checked(pixels), carried

    def _text_to_image(self, stage: Stage) -> torch.Tensor:
        return self._call(self._pipe, stage)

    def _image_to_image(self, stage: Stage, image: Image.Image) -> torch.Tensor:
        pipe = image_to_image(self._pipe)
        pipe.set_progress_bar_config(disable=True)
        self._prepare(pipe)
        return self._call(pipe, stage, image=image, strength=stage.strength)

    def _two_branch(self, stage: Stage, image: Image.Image, carried: dict[str, Any]) -> torch.Tensor:
        job, moments = self._job, None
        if carried:
            mean, std = (torch.tensor(carried[name], device=self._device).view(1, -1, 1, 1) for name in ("mean", "std"))
            moments = mean, std

        def begin(timesteps: torch.Tensor) -> None:
            if self._methods and self._methods.handle:
                self._methods.handle.set_timesteps(timesteps)

        assert job.steps is not None
        assert job.guidance is not None
        assert stage.strength is not None
        return superres.upscale(
            self._pipe,
            image,
            prompt=job.prompt,
            negative=job.negative,
            steps=job.steps,
            strength=stage.strength,
            guidance=job.guidance,
            scale=stage.scale,
            generator=self._generator(),
            moments=moments,
            on_begin=begin,
            on_step=lambda step, latents: self._after_step(stage, step, latents),
        )[0]

    def _call(self, pipe: Any, stage: Stage, **more: Any) -> torch.Tensor:
        job = self._job

        def after_step(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self._after_step(stage, step + 1, tensors["latents"])
            return {}

        wanted = {
            "prompt": job.prompt,
            "width": stage.width,
            "height": stage.height,
            "num_inference_steps": job.steps,
            "max_sequence_length": job.max_sequence_length,
            **guidance.arguments(job, pipe),
            "generator": self._generator(),
            "callback_on_step_end": after_step,
            **more,
        }
        accepted = inspect.signature(pipe.__call__).parameters
        given = {name: value for name, value in wanted.items() if name in accepted and value is not None}
        output = pipe(**given, output_type="pt")
        if any(getattr(output, "nsfw_content_detected", None) or ()):
            raise JobFailed(BLACKED_OUT)
        pixels: torch.Tensor = output.images[0]
        return pixels

    def _generator(self) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(self._job.seed)

    def _after_step(self, stage: Stage, step: int, latents: torch.Tensor) -> None:
        self._steps_run += 1
        if not torch.isfinite(latents).all():
            raise JobFailed(
                f"not-a-number in the latents after step {step} of {stage.steps} in {self._job.dtype}.{self._try()}"
            )
        self._latents = latents
        self._progress.reach(stage, step)

    @contextmanager
    def _tiles(self, stage: Stage) -> Iterator[None]:
        vae, side = self._pipe.vae, max(stage.width, stage.height)
        asked_for = self._job.vae_tiling or self._job.low_memory
        with ExitStack() as stack:
            if stage.total > 1 and side >= TILING_SIDE and not asked_for:
                if reason := untileable(vae):
                    self._say(f"{stage}: {type(vae).__name__} not in tiles: {reason}.")
                else:
                    size = f"{TILE_SIDE} px" if has_tile_side(vae) else "its own size"
                    self._say(f"{stage}: autoencoder in tiles of {size}, from {TILING_SIDE} px on.")
                    stack.enter_context(tiled(vae, TILE_SIDE))
            yield

    @contextmanager
    def _failures(self, stage: Stage) -> Iterator[None]:
        try:
            yield
        except (BadInput, JobFailed):
            raise
        except (ValueError, TypeError) as error:
            if self._steps_run == 0:
                raise BadInput(f"{type(self._pipe).__name__} refuses: {error}") from error
            raise
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise JobFailed(
                    f"out of memory at {stage.width}x{stage.height} on {self._device} after {self._steps_run} steps. "
                    "Try a smaller size, --low-memory, --vae-tiling or --cpu-offload model."
                ) from error
            raise

    def _checked(self, pixels: torch.Tensor) -> Image.Image:
        pixels = pixels.float().cpu()
        if not torch.isfinite(pixels).all():
            raise JobFailed(f"not-a-number in the decoded picture in {self._job.dtype}.{self._try()}")
        # The rounding of Diffusers' own image processor.
        array = (pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        if not array.any():
            raise JobFailed(f"the picture is black all over.{self._try()}")
        return Image.fromarray(array)

    def _try(self) -> str:
        return " Try --dtype float32." if self._job.dtype != "float32" else ""


def image_to_image(pipe: Any) -> Any:
    """The image-to-image pipeline that shares every component with `pipe`.

    Raises:
        BadInput: Diffusers has none for it, or one that knows no strength.
    """
    from diffusers import AutoPipelineForImage2Image

    name = type(pipe).__name__
    try:
        made = AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError as error:
        raise BadInput(f"--route ladder: {name} has no image-to-image form in Diffusers.") from error
    if "strength" not in inspect.signature(made.__call__).parameters:
        raise BadInput(f"--route ladder: {name}'s image-to-image form, {type(made).__name__}, takes no strength.")
    return made


def check_route(pipe: Any, route: str) -> None:
    """Says before any step that `pipe` cannot go a route.

    Raises:
        BadInput: no image-to-image form, or no U-Net that super-resolution knows.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    if route == "ladder":
        image_to_image(pipe)
    elif route != "direct" and not isinstance(pipe, StableDiffusionPipeline | StableDiffusionXLPipeline):
        denoiser = getattr(pipe, "unet", None) or pipe.transformer
        raise BadInput(
            f"--route {route} dilates the convolutions of a Stable Diffusion 1.5, 2.1 or XL U-Net; this is a "
            f"{type(pipe).__name__} with a {type(denoiser).__name__}. Try --route ladder."
        )


def peak_bytes(device: torch.device) -> int | None:
    """The most memory held so far, on the accelerator where there is one, else by the process."""
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


def _resized(image: Image.Image, stage: Stage) -> Image.Image:
    return image.resize((stage.width, stage.height), Image.Resampling.BICUBIC)
