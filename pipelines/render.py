"""One stage of a job, or of several jobs at once → its pictures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import image_input
from .errors import BLACKED_OUT, BadInput, JobFailed
from .image_input import image_to_image
from .low_memory import has_tile_side, tiled, untileable
from .routes import Stage, superres, windows
from .run import Runner, generator

# From this side a stage's autoencoder works in tiles by itself, and where they can be set in tiles of this side: few,
# so few seams.
TILING_SIDE, TILE_SIDE = 4096, 2048
LADDER = "--route ladder"


class Painter(Runner):
    """Paints the stages of a picture, or pictures of one stage each."""

    def paint(
        self, stage: Stage, before: Image.Image | None, carried: dict[str, Any]
    ) -> tuple[list[Image.Image], dict[str, Any]]:
        """The picture of each job in `stage`, and what later stages must know beside them.

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
                pixels = self._first(stage)
                if self.job.route == "superres-ladder" and self._latents is not None:
                    mean, std = superres.moments_of(self._latents)
                    carried = {"mean": mean.flatten().tolist(), "std": std.flatten().tolist()}
            elif stage.scale > 1:
                pixels = self._two_branch(stage, _resized(before, stage), carried)
            else:
                pipe = image_to_image(self._pipe, LADDER)
                pixels = self._image_to_image(pipe, stage, _resized(before, stage))
        self.seconds += time.perf_counter() - start
        self._progress.reach(stage, stage.steps)
        return [self._checked(one) for one in pixels], carried

    def _first(self, stage: Stage) -> torch.Tensor:
        """Of the prompt, or of the picture that the job begins with."""
        if self.job.image is None:
            return self._pictures(self._pipe, stage)
        pipe = image_input.taker(self.job, self._pipe)
        return self._image_to_image(pipe, stage, self._begin_with(pipe, stage))

    def _image_to_image(self, pipe: Any, stage: Stage, image: Image.Image) -> torch.Tensor:
        if pipe is not self._pipe:
            pipe.set_progress_bar_config(disable=True)
            self._prepare(pipe)
        return self._pictures(pipe, stage, image=image, strength=stage.strength)

    def _two_branch(self, stage: Stage, image: Image.Image, carried: dict[str, Any]) -> torch.Tensor:
        job, moments = self.job, None
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
            generator=generator(job.seed),
            moments=moments,
            on_begin=begin,
            on_step=lambda step, latents: self._after_step(stage, step, latents),
        )

    def _pictures(self, pipe: Any, stage: Stage, **more: Any) -> torch.Tensor:
        output = self._call(pipe, stage, **more)
        if any(getattr(output, "nsfw_content_detected", None) or ()):
            raise JobFailed(BLACKED_OUT)
        pixels = self._made(output, "images")
        height, width = pixels.shape[-2:]
        if (width, height) != (stage.width, stage.height):
            self._say(f"{type(pipe).__name__} makes {width}x{height} of {stage.width}x{stage.height}.")
        return pixels

    @contextmanager
    def _tiles(self, stage: Stage) -> Iterator[None]:
        vae, side = self._pipe.vae, max(stage.width, stage.height)
        asked_for = self.job.vae_tiling or self.job.low_memory
        with ExitStack() as stack:
            if stage.total > 1 and side >= TILING_SIDE and not asked_for:
                if reason := untileable(vae):
                    self._say(f"{stage}: {type(vae).__name__} not in tiles: {reason}.")
                else:
                    size = f"{TILE_SIDE} px" if has_tile_side(vae) else "its own size"
                    self._say(f"{stage}: autoencoder in tiles of {size}, from {TILING_SIDE} px on.")
                    stack.enter_context(tiled(vae, TILE_SIDE))
            yield

    def _checked(self, pixels: torch.Tensor) -> Image.Image:
        pixels = pixels.float().cpu()
        if not torch.isfinite(pixels).all():
            raise JobFailed(f"not-a-number in the decoded picture in {self.job.dtype}.{self._try()}")
        # The rounding of Diffusers' own image processor.
        array = (pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        if not array.any():
            raise JobFailed(f"the picture is black all over.{self._try()}")
        return Image.fromarray(array)


def check_route(pipe: Any, route: str) -> None:
    """Says before any step that `pipe` cannot go a route.

    Raises:
        BadInput: no image-to-image form, no U-Net that super-resolution knows, no clips in windows.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    if route == "ladder":
        image_to_image(pipe, LADDER)
    elif route == "windows":
        windows.check(pipe)
    elif route != "direct" and not isinstance(pipe, StableDiffusionPipeline | StableDiffusionXLPipeline):
        denoiser = getattr(pipe, "unet", None) or pipe.transformer
        raise BadInput(
            f"--route {route} dilates the convolutions of a Stable Diffusion 1.5, 2.1 or XL U-Net; this is a "
            f"{type(pipe).__name__} with a {type(denoiser).__name__}. Try --route ladder."
        )


def _resized(image: Image.Image, stage: Stage) -> Image.Image:
    return image.resize((stage.width, stage.height), Image.Resampling.BICUBIC)
