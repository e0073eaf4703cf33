"""What a pipeline says of the clips it makes: how many frames, how fast, how large."""

from __future__ import annotations

import inspect
import math
import re
from fractions import Fraction
from typing import Any

from .errors import BadInput

MAX_FRAMES, MAX_FPS = 100_000, 240
# So that times fit the 32 bits that MP4 has for them.
MAX_FPS_DENOMINATOR = 100_000
# No exponents: "1e-999999999" would take all memory.
FPS_TEXT = re.compile(r"\s*[-+]?\d{0,18}([./]\d{0,18})?\s*")
# Frames a second that the models were trained at, which only their papers and cards say.
FPS = {
    "AnimateDiffPipeline": 8,
    "CogVideoXImageToVideoPipeline": 8,
    "CogVideoXPipeline": 8,
    "HunyuanVideo15ImageToVideoPipeline": 24,
    "HunyuanVideo15Pipeline": 24,
    "HunyuanVideoImageToVideoPipeline": 24,
    "HunyuanVideoPipeline": 24,
    "LTXImageToVideoPipeline": 25,
    "LTXPipeline": 25,
    "MochiPipeline": 30,
    "SanaVideoPipeline": 16,
    "WanImageToVideoPipeline": 16,
    "WanPipeline": 16,
}
# What pipelines call the argument, and the frames that one latent frame stands for.
FRAMES = ("num_frames", "frames")
TEMPORAL_FACTORS = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
SPATIAL_FACTORS = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor")


def frames_argument(pipe: Any) -> str | None:
    """What the call of a pipeline, or of its class, names the number of frames; None for one that makes pictures."""
    accepted = inspect.signature(pipe.__call__).parameters
    return next((name for name in FRAMES if name in accepted), None)


def parse_fps(text: str) -> Fraction:
    """Frames a second, exactly: "16", "24000/1001", and for the decimals that mean it "23.976" and "29.97".

    Raises:
        BadInput: no number, or out of range.
    """
    try:
        if not FPS_TEXT.fullmatch(text):
            raise ValueError
        fps = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise BadInput(f"fps {text!r} is no number such as 16, 23.976 or 24000/1001.") from None
    if "/" not in text and fps.denominator > 1:
        ntsc = Fraction(1000 * round(fps * Fraction(1001, 1000)), 1001)
        if abs(fps - ntsc) < Fraction(5, 1000):
            fps = ntsc
    check_fps(fps)
    return fps


def check_fps(fps: Fraction) -> None:
    if not 0 < fps <= MAX_FPS:
        raise BadInput(f"fps {fps} is out of range: above 0, at most {MAX_FPS}.")
    if fps.denominator > MAX_FPS_DENOMINATOR:
        raise BadInput(f"fps {fps} is a fraction too fine: its denominator is above {MAX_FPS_DENOMINATOR}.")


def native_fps(pipe: Any) -> Fraction | None:
    """Frames a second that clips of the model are to be shown at; None where nobody says."""
    name = type(pipe).__name__
    # The small Wan 2.2 differs from the others.
    fps = 24 if name.startswith("Wan") and getattr(pipe.config, "expand_timesteps", False) else FPS.get(name)
    if fps is None and "frame_rate" in (accepted := inspect.signature(pipe.__call__).parameters):
        fps = accepted["frame_rate"].default
    return Fraction(fps) if isinstance(fps, int | float) else None


def native_frames(pipe: Any) -> int | None:
    """Frames of a clip where none are asked for, as the pipeline has it."""
    argument = frames_argument(pipe)
    assert argument
    default = inspect.signature(pipe.__call__).parameters[argument].default
    if isinstance(default, int):
        return default
    frames = getattr(_denoiser(pipe).config, "sample_frames", None)
    return int(frames) if frames else None


def native_size(pipe: Any) -> tuple[int, int] | None:
    """Width and height in pixels where none are asked for, as the pipeline has it."""
    accepted, config = inspect.signature(pipe.__call__).parameters, _denoiser(pipe).config
    sides: list[Any] = []
    for name in ("width", "height"):
        side = (name in accepted and accepted[name].default) or getattr(pipe, f"default_{name}", None)
        sample = getattr(config, f"sample_{name}", None) or getattr(config, "sample_size", None)
        if not side and isinstance(sample, int):
            side = sample * spatial_factor(pipe)
        sides.append(side)
    return (int(sides[0]), int(sides[1])) if all(sides) else None


def check_frames(frames: int, pipe: Any, name: str = "frames") -> None:
    """
    Raises:
        BadInput: not a number of frames that whole latent frames make, with the nearest that is.
    """
    # An autoencoder that is causal in time makes the first latent frame of one frame. Others know better themselves.
    factor = temporal_factor(pipe) if type(pipe).__name__ in FPS else 1
    if (frames - 1) % factor:
        nearest = max(0, round((frames - 1) / factor)) * factor + 1
        raise BadInput(f"{name} {frames} is not {factor}n + 1, which this model needs; nearest: {nearest}.")


def check_positions(frames: int, width: int, height: int, pipe: Any) -> None:
    """
    Raises:
        BadInput: more frames or pixels than the denoiser has positions for.
    """
    config = _denoiser(pipe).config
    if (positions := getattr(config, "rope_max_seq_len", None)) is None:
        return
    times, rows, columns = config.patch_size
    longest = (positions * times - 1) * temporal_factor(pipe) + 1
    if frames > longest:
        raise BadInput(f"frames {frames} is more than {longest}, where the model's positions end; try --route windows.")
    for name, side, patch in (("height", height, rows), ("width", width, columns)):
        if side > (largest := positions * patch * spatial_factor(pipe)):
            raise BadInput(f"{name} {side} is more than {largest}, where the model's positions end.")


def latent_frames(frames: int, pipe: Any) -> int:
    return (frames - 1) // temporal_factor(pipe) + 1


def temporal_factor(pipe: Any) -> int:
    """Frames that a latent frame stands for, the first of a clip excepted; 1 where each has its own."""
    return next((int(getattr(pipe, name)) for name in TEMPORAL_FACTORS if hasattr(pipe, name)), 1)


def spatial_factor(pipe: Any) -> int:
    names = (*SPATIAL_FACTORS, "vae_scale_factor")
    return next(int(getattr(pipe, name)) for name in names if hasattr(pipe, name))


def size_multiple(pipe: Any) -> int:
    """Pixels of which the width and height of a clip must be multiples."""
    patch = getattr(_denoiser(pipe).config, "patch_size", 1)
    patches = patch[1:] if isinstance(patch, list | tuple) else (patch if isinstance(patch, int) else 1,)
    return spatial_factor(pipe) * math.lcm(*patches)


def _denoiser(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or getattr(pipe, "transformer", None) or pipe.transformer_2
