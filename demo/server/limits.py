"""How much a visitor may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...pipelines.errors import BadInput

if TYPE_CHECKING:
    from ...pipelines.job import Job


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        max_size: pixels of the width and of the height.
        max_frames: of a clip, and of a window of one.
        max_steps: of denoising.
        max_prompt: characters of the prompt and of the negative prompt.
        max_pixels: width × height × frames that one job makes, or has in a window: what must be in memory at once.

    Raises:
        BadInput: one is no limit.
    """

    max_size: int = 4096
    max_frames: int = 257
    max_steps: int = 100
    max_prompt: int = 2000
    max_pixels: int = 2**26

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise BadInput(f"--{name.replace('_', '-')} {value} is out of range: 1 or more.")

    def check(self, job: Job) -> None:
        """What `job` leaves open passes; a complete one is checked as a whole.

        Raises:
            BadInput: with the number and the limit.
        """
        for name, limit, unit in (
            ("width", self.max_size, " px"),
            ("height", self.max_size, " px"),
            ("frames", self.max_frames, ""),
            ("window", self.max_frames, " frames"),
            ("steps", self.max_steps, ""),
        ):
            value = getattr(job, name)
            if value is not None and value > limit:
                raise BadInput(f"{name} {value} is more than this server allows: at most {limit}{unit}.")
        # What is left open is 1 here at least; the complete job says it.
        width, height, frames = job.width or 1, job.height or 1, max(job.frames or 1, job.window or 1)
        if (pixels := width * height * frames) > self.max_pixels:
            size = f"{width}x{height}" + (f" by {frames} frames" if frames > 1 else "")
            raise BadInput(
                f"{size} are {_million(pixels)} pixels; this server makes {_million(self.max_pixels)} at once."
            )
        self.check_texts(job.prompt, job.negative)

    def check_texts(self, prompt: str, negative: str | None) -> None:
        """
        Raises:
            BadInput: one is too long.
        """
        for what, text in (("prompt", prompt), ("negative prompt", negative or "")):
            if len(text) > self.max_prompt:
                raise BadInput(f"the {what} has {len(text)} characters; this server allows {self.max_prompt} at most.")


def _million(pixels: int) -> str:
    return f"{pixels / 1e6:,.3g} million" if pixels < 1e9 else f"{pixels / 1e6:,.0f} million"
