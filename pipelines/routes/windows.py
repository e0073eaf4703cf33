"""Clips longer than a model was trained for, in overlapping windows of time, after FreeNoise (arXiv 2310.15169).

Each call of the denoiser becomes one for every window, all of the trained length, and their predictions are averaged,
those in the middle of a window counting most. The pipeline, its guidance and its scheduler know nothing of it. The
noise of later windows is that of the first in another order, so that all of them show the same things.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import BadInput

# Those whose denoisers take [B, C, F, H, W] and nothing else that depends on the number of frames, and name each call.
PIPELINES = ("HunyuanVideoPipeline", "MochiPipeline", "WanPipeline")


def check(pipe: Any) -> None:
    """
    Raises:
        BadInput: a pipeline whose clips do not come about in windows.
    """
    if type(pipe).__name__ not in PIPELINES:
        raise BadInput(f"--route windows knows {', '.join(PIPELINES)}; this is a {type(pipe).__name__}.")


def spans(frames: int, window: int, overlap: int) -> list[slice]:
    """Windows over latent frames, in order, all of the same length; the last ends with the last frame."""
    starts = [*range(0, max(frames - window, 0), window - overlap), max(frames - window, 0)]
    return [slice(start, min(start + window, frames)) for start in starts]


def weights(length: int) -> torch.Tensor:
    """How much each frame of a window counts: 1, 2, …, 2, 1; [length]."""
    up = torch.arange(1, length + 1)
    return torch.minimum(up, up.flip(0)).float()


def rescheduled(noise: torch.Tensor, frames: int, stride: int, generator: torch.Generator) -> torch.Tensor:
    """The noise of one window, [B, C, F, H, W], drawn out to `frames`.

    Every `stride` further frames are the `stride` a window earlier, shuffled: any window has nearly the same noise.
    """
    window = noise.shape[2]
    while noise.shape[2] < frames:
        start = noise.shape[2] - window
        order = start + torch.randperm(stride, generator=generator)
        noise = torch.cat([noise, noise[:, :, order]], 2)
    return noise[:, :, :frames]


def initial_noise(
    pipe: Any, size: tuple[int, int], *, window: int, frames: int, stride: int, generator: torch.Generator
) -> torch.Tensor:
    """The noise for all latent frames; the first window has what a clip of its length alone would have.

    Args:
        size: width and height in pixels.
        window: frames of the clip (not latent ones) in a window.
        frames: latent frames in all.
        stride: latent frames from a window to the next.
    """
    denoiser = pipe.transformer if pipe.transformer is not None else pipe.transformer_2
    width, height = size
    channels, device = denoiser.config.in_channels, pipe._execution_device
    first = pipe.prepare_latents(1, channels, height, width, window, torch.float32, device, generator, None)
    return rescheduled(first, frames, stride, generator)


@contextmanager
def windowed(pipe: Any, window: int, overlap: int) -> Iterator[None]:
    """The denoisers of `pipe` see at most `window` latent frames at a time, `overlap` of them twice."""
    with ExitStack() as stack:
        for name in ("transformer", "transformer_2"):
            if isinstance(denoiser := getattr(pipe, name, None), nn.Module):
                stack.enter_context(_Windowed(denoiser, window, overlap))
        yield


class _Windowed:
    """Runs a denoiser on all but the last window before its call, on the last in its call, and fuses the outputs.

    For Diffusers and for methods each window is a guidance branch of its own: "cond" becomes "cond.0", "cond.1" and so
    on, so that no state passes from one to another.
    """

    def __init__(self, denoiser: Any, window: int, overlap: int) -> None:
        self._denoiser, self._window, self._overlap = denoiser, window, overlap
        self._cache_context: Callable[..., AbstractContextManager[None]] = denoiser.cache_context
        self._name, self._where = "", dict[str, Any]()
        self._depth = 0
        self._sum: torch.Tensor | None = None
        self._total: torch.Tensor | None = None
        self._last = slice(0)

    def __enter__(self) -> None:
        vars(self._denoiser)["cache_context"] = self._named
        # Around the hooks of others: a method, and whatever halves the batch, is to see each window as a call.
        self._hooks = [
            self._denoiser.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            self._denoiser.register_forward_hook(self._after),
        ]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        del vars(self._denoiser)["cache_context"]

    @contextmanager
    def _named(self, name: str, **where: Any) -> Iterator[None]:
        self._name, self._where, self._depth = name, where, 0
        with self._cache_context(name, **where):
            yield

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._depth += 1
        if self._depth > 1:  # a window, or a part of one
            return None
        self._sum = self._total = None
        frames = kwargs["hidden_states"].shape[2]
        if frames <= self._window:
            return None
        *first, self._last = spans(frames, self._window, self._overlap)
        for number, span in enumerate(first):
            with self._cache_context(f"{self._name}.{number}", **self._where):
                self._add(module(*args, **_part(kwargs, span))[0], span, frames)
        # Left in `_after`; after an exception in the call, the pipeline leaves its own around it, which clears both.
        self._open = self._cache_context(f"{self._name}.{len(first)}", **self._where)
        self._open.__enter__()
        return args, _part(kwargs, self._last)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self._depth -= 1
        if self._depth or self._sum is None or self._total is None:
            return None
        self._open.__exit__(None, None, None)
        frames = self._sum.shape[2]
        self._add(output[0], self._last, frames)
        fused = (self._sum / self._total).to(output[0].dtype)
        self._sum = self._total = None
        return (fused, *output[1:]) if isinstance(output, tuple) else type(output)(sample=fused)

    def _add(self, prediction: torch.Tensor, span: slice, frames: int) -> None:
        if self._sum is None or self._total is None:
            batch, channels, _, *sides = prediction.shape
            self._sum = prediction.new_zeros(batch, channels, frames, *sides, dtype=torch.float32)
            self._total = self._sum.new_zeros(frames, 1, 1)
        weight = weights(prediction.shape[2]).to(prediction.device)[:, None, None]
        self._sum[:, :, span] += weight * prediction
        self._total[span] += weight


def _part(kwargs: dict[str, Any], span: slice) -> dict[str, Any]:
    """The arguments of a call for one window: its frames, and their timesteps where every token has its own."""
    frames = kwargs["hidden_states"].shape[2]
    part = {**kwargs, "hidden_states": kwargs["hidden_states"][:, :, span]}
    timestep = kwargs["timestep"]
    if timestep.ndim == 2:
        tokens = timestep.shape[1] // frames
        part["timestep"] = timestep[:, span.start * tokens : span.stop * tokens]
    return part
