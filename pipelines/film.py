"""A job, or several at once → the frames of their clips, one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

from . import clip, decode_video
from .errors import JobFailed
from .routes import Stage, windows
from .run import Runner, generator
from .video_writer import Frame

Made = TypeVar("Made")

# Their last act is to decode all latents at once; so they can be stopped there, and the rest done in chunks.
DECODE_LAST = (
    "CogVideoXImageToVideoPipeline",
    "CogVideoXPipeline",
    "HunyuanVideo15Pipeline",
    "HunyuanVideoPipeline",
    "LTXImageToVideoPipeline",
    "LTXPipeline",
    "MochiPipeline",
    "WanImageToVideoPipeline",
    "WanPipeline",
)


class Film(Runner):
    """Shoots clips."""

    def shoot(self, stage: Stage) -> Iterator[Iterator[Frame]]:
        """Each job's frames as they are decoded, to be taken before the next job's; all denoising comes first.

        Raises:
            BadInput: the pipeline refuses before any step.
            JobFailed: out of memory, not-a-number, black frames only.
        """
        self._progress.begin(stage)
        if self._methods:
            self._methods.enter(stage)
        with self._failures(stage):
            for chunks in self._timed(self._clips(stage)):
                yield self._developed(self._timed(chunks), stage)

    def _developed(self, chunks: Iterator[torch.Tensor], stage: Stage) -> Iterator[Frame]:
        job, lit = self.job, False
        assert job.frames is not None
        with self._failures(stage):
            for pixels in chunks:
                if not torch.isfinite(pixels).all():
                    raise JobFailed(f"not-a-number in the decoded frames in {job.dtype}.{self._try()}")
                array = (pixels.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
                lit = lit or bool(array.any())
                for frame in array:
                    yield frame
                    self._progress.frame_done(job.frames * len(self._jobs))
        if not lit:
            raise JobFailed(f"the clip is black all over.{self._try()}")

    def _timed(self, work: Iterator[Made]) -> Iterator[Made]:
        """Counts the seconds in which `work` works, not those in which the frames are written."""
        while True:
            start = time.perf_counter()
            made = next(work, None)
            self.seconds += time.perf_counter() - start
            if made is None:
                return
            yield made

    def _clips(self, stage: Stage) -> Iterator[Iterator[torch.Tensor]]:
        """For each job its frames in chunks [F, 3, H, W] in 0..1, fp32 on the CPU."""
        pipe = self._pipe
        streamed = type(pipe).__name__ in DECODE_LAST and decode_video.streams(pipe.vae)
        if not streamed:
            parts = f"{type(pipe).__name__} with {type(pipe.vae).__name__}"
            self._say(f"{parts}: decoded whole, so memory grows with the number of frames.")
            for frames in self._frames(stage):
                yield iter([frames.float().cpu()])
            return
        with _stopped_before_decoding(pipe.vae) as kept:
            self._frames(stage)
        [(latents, arguments)] = kept
        if said := decode_video.remark(pipe.vae, latents):
            self._say(f"{said}.")
        for index in range(len(latents)):
            yield self._decoded(latents[index : index + 1], [_of_one(value, index, latents) for value in arguments])
        pipe.maybe_free_model_hooks()

    def _decoded(self, latents: torch.Tensor, arguments: list[Any]) -> Iterator[torch.Tensor]:
        pipe = self._pipe

        @torch.no_grad()
        def decode(part: torch.Tensor) -> torch.Tensor:
            decoded: torch.Tensor = pipe.vae.decode(part, *arguments, return_dict=False)[0]
            return decoded

        for chunk in decode_video.chunks(pipe.vae, decode, latents):
            yield pipe.video_processor.postprocess_video(chunk, output_type="pt")[0].float().cpu()

    def _frames(self, stage: Stage) -> torch.Tensor:
        """What the pipeline makes of the jobs, [B, F, 3, H, W] in 0..1."""
        job, pipe = self.job, self._pipe
        assert job.frames is not None
        assert job.fps is not None
        named = dict.fromkeys(clip.FRAMES, job.frames)
        rate = int(job.fps) if job.fps.denominator == 1 else float(job.fps)
        first = {"image": self._begin_with(pipe, stage)} if job.image is not None else {}
        with self._in_windows(stage) as noise:
            output = self._call(pipe, stage, **named, frame_rate=rate, **first, **noise)
        if getattr(output, "audio", None) is not None:
            self._say(f"{type(pipe).__name__} makes sound, too, which is left out.")
        return self._made(output, "frames")

    @contextmanager
    def _in_windows(self, stage: Stage) -> Iterator[dict[str, Any]]:
        """The denoisers see windows, where the route goes by them; gives the noise they begin with."""
        job, pipe = self.job, self._pipe
        if job.route != "windows":
            yield {}
            return
        assert job.frames is not None
        assert job.window is not None
        assert job.overlap is not None
        if job.frames <= job.window:
            self._say(f"--route windows: one of {job.window} frames covers all {job.frames}; it runs as without.")
            yield {}
            return
        frames, window = (clip.latent_frames(count, pipe) for count in (job.frames, job.window))
        overlap = job.overlap // clip.temporal_factor(pipe)
        number = len(windows.spans(frames, window, overlap))
        self._say(f"{number} windows of {job.window} frames, {job.overlap} shared: {number} times the calls of one.")
        noise = windows.initial_noise(
            pipe,
            (stage.width, stage.height),
            window=job.window,
            frames=frames,
            stride=window - overlap,
            generator=generator(job.seed),
        )
        with windows.windowed(pipe, window, overlap):
            yield {"latents": noise}


def _of_one(value: Any, index: int, latents: torch.Tensor) -> Any:
    """What `value`, an argument of decoding, is for one of the clips."""
    of_each = isinstance(value, torch.Tensor) and value.ndim and len(value) == len(latents)
    return value[index : index + 1] if of_each else value


@contextmanager
def _stopped_before_decoding(vae: Any) -> Iterator[list[tuple[torch.Tensor, tuple[Any, ...]]]]:
    """What `vae.decode` is asked for in the block, latents and further arguments; it answers with nearly nothing.

    So every pipeline scales its latents itself, and ends as it always does.
    """
    from diffusers.models.autoencoders.vae import DecoderOutput

    kept: list[tuple[torch.Tensor, tuple[Any, ...]]] = []

    def keep(latents: torch.Tensor, *arguments: Any, return_dict: bool = True) -> Any:
        kept.append((latents, arguments))
        output = DecoderOutput(sample=latents.new_zeros(1, 3, 1, 8, 8))
        return output if return_dict else (output.sample,)

    vars(vae)["decode"] = keep
    try:
        yield kept
    finally:
        del vars(vae)["decode"]
