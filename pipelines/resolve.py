"""A job with nothing left open, checked against what its pipeline can do."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import clip, guidance, image_input, presets, scheduler
from .errors import BadInput
from .job import MAX_SIDE, Job
from .routes import CLIP_ROUTES, Stage, plan
from .routes.plan import StepsRun, every, one_step, rounded_down, rounded_up

if TYPE_CHECKING:
    from ..accel.methods.base import Config

# The pixels a side that only the code of these pipelines says.
NATIVE_SIDES = {"ZImagePipeline": 1024}
# What pipelines cannot do without, though they have a default for it, and nothing here can give.
OTHER_INPUTS = {"mask_image": "mask", "mask_video": "mask", "control_video": "video"}


def check_numbers(job: Job) -> None:
    """What can be said without the model."""
    for name in ("width", "height"):
        value = getattr(job, name)
        if value is not None and not 0 < value <= MAX_SIDE:
            raise BadInput(f"{name} {value} is out of range: 1 to {MAX_SIDE}.")
    if job.steps is not None and not 0 < job.steps <= 1000:
        raise BadInput(f"steps {job.steps} is out of range: 1 to 1000.")
    for name, value in (("guidance", job.guidance), ("true-cfg", job.true_cfg)):
        if value is not None and not 0 <= value <= sys.float_info.max:
            raise BadInput(f"{name} {value} is out of range: 0 or more.")
    if job.strength is not None and not 0 < job.strength <= 1:
        raise BadInput(f"strength {job.strength} is out of range: above 0, at most 1.")
    for name in ("frames", "window", "overlap"):
        value = getattr(job, name)
        if value is not None and not 0 < value <= clip.MAX_FRAMES:
            raise BadInput(f"{name} {value} is out of range: 1 to {clip.MAX_FRAMES}.")
    if job.fps is not None:
        clip.check_fps(job.fps)
    if job.strength is not None:
        if job.image is None:
            raise BadInput(f"--strength {job.strength:g}: there is no --image to change.")
        if not 0 < job.strength <= 1:
            raise BadInput(f"strength {job.strength:g} is out of range: above 0, at most 1.")
    if not 0 <= job.seed < 2**63:
        raise BadInput(f"seed {job.seed} is out of range: 0 to 2^63 - 1.")


def complete(
    job: Job, pipe: Any, preset: presets.Preset, dtype: torch.dtype, configs: Sequence[Config] = ()
) -> tuple[Job, tuple[Stage, ...]]:
    """`job` with every field given, and the stages it runs.

    Args:
        configs: of its methods.

    Raises:
        BadInput: `pipe` cannot do it.
    """
    makes_clips = clip.frames_argument(pipe) is not None
    _check_kind(job, pipe, makes_clips)
    called = image_input.taker(job, pipe)
    accepted, name = inspect.signature(called.__call__).parameters, type(called).__name__
    if job.negative is not None and "negative_prompt" not in accepted:
        raise BadInput(f"{job.model} is a {name}, which takes no negative prompt.")
    side = preset.native_side or (None if makes_clips else native_side(pipe))
    native = (side, side) if side else clip.native_size(pipe)
    token = clip.size_multiple(pipe) if makes_clips else size_multiple(pipe)
    needed = {"this model": token}
    for config in configs:
        if config.grid_multiple > 1:
            needed[f"{config.name} with {config.grid_setting} {config.grid_multiple}"] = token * config.grid_multiple
    if job.image is not None:
        width, height = image_input.size(job, called, native if makes_clips else None, math.lcm(*needed.values()))
    elif native is None and None in (job.width, job.height):
        raise BadInput(f"{job.model} does not say its native size: give --width and --height.")
    else:
        width, height = (given or usual for given, usual in zip((job.width, job.height), native or (0, 0), strict=True))
    if makes_clips:
        job = _complete_clip(job, pipe, preset)
    for who, multiple in needed.items():
        check_side("width", width, multiple, who)
        check_side("height", height, multiple, who)
    if job.frames is not None:
        clip.check_positions(job.window or job.frames, width, height, pipe)
    job = guidance.complete(job, called, preset.guidance)
    steps = job.steps or preset.steps or accepted["num_inference_steps"].default
    length = job.max_sequence_length or preset.max_sequence_length
    stages = plan(
        job.route,
        (width, height),
        native=side or 0,
        multiple=math.lcm(*needed.values()),
        steps=steps,
        strengths=job.strengths,
        preset=preset.routes,
        steps_run=steps_run(pipe),
    )
    strength = _strength(job, called, steps)
    if strength is not None:
        stages = (dataclasses.replace(stages[0], steps=steps_run(pipe)(steps, strength), strength=strength),)
    complete_job = dataclasses.replace(
        job,
        width=width,
        height=height,
        steps=steps,
        dtype=str(dtype).removeprefix("torch."),
        max_sequence_length=length if "max_sequence_length" in accepted else None,
        strength=strength,
        strengths=tuple(stage.strength for stage in stages[1:] if stage.strength is not None) or None,
        scheduler=job.scheduler and scheduler.scheduler_named(pipe, job.scheduler),
    )
    return complete_job, stages


def _check_kind(job: Job, pipe: Any, makes_clips: bool) -> None:
    """
    Raises:
        BadInput: `pipe` makes nothing from a prompt alone, or not what the job is about.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    what, is_a = "clip" if makes_clips else "picture", f"{job.model} is a {type(pipe).__name__}, which"
    named = [parameter for parameter in accepted.values() if parameter.kind is not parameter.VAR_KEYWORD]
    needs = {parameter.name for parameter in named if parameter.default is parameter.empty} - {"prompt", "image"}
    if "prompt" not in accepted or needs or "num_inference_steps" not in accepted:
        more = f" alone: it needs {', '.join(sorted(needs))}, too" if needs and "prompt" in accepted else ""
        raise BadInput(f"{is_a} does not make a {what} from a prompt{more}.")
    # Some make clips of a length that they count in a way of their own.
    if not makes_clips and (not {"height", "image"} & set(accepted) or "video_length" in accepted):
        raise BadInput(f"{is_a} makes neither pictures nor clips.")
    other = next((what for name, what in OTHER_INPUTS.items() if name in accepted), None)
    if other or "VideoToVideo" in type(pipe).__name__:
        raise BadInput(f"{is_a} is made for a {other or 'video'} to begin with, and here it can have none.")
    if not hasattr(pipe, "vae"):
        raise BadInput(f"{is_a} has no autoencoder of the kind that is known here: no vae among its parts.")
    if makes_clips and job.route not in CLIP_ROUTES:
        raise BadInput(f"--route {job.route} is for pictures; {is_a} makes clips: {' or '.join(CLIP_ROUTES)}.")
    if not makes_clips:
        flags = {"frames": job.frames, "fps": job.fps, "window": job.window, "overlap": job.overlap}
        given = [f"--{name} {value}" for name, value in flags.items() if value is not None]
        given += [f"--frames-dir {job.frames_dir}"] if job.frames_dir else []
        given += ["--route windows"] if job.route == "windows" else []
        if given:
            raise BadInput(f"{given[0]}: {is_a} makes pictures, not clips.")


def _strength(job: Job, pipe: Any, steps: int) -> float | None:
    """How much of the schedule `pipe` runs on the job's picture; None where it runs all, or there is none."""
    accepted = inspect.signature(pipe.__call__).parameters
    if job.image is None or "strength" not in accepted:
        if job.strength is not None:
            raise BadInput(f"--strength {job.strength:g}: {type(pipe).__name__} takes none.")
        return None
    strength = float(job.strength or accepted["strength"].default)
    if not steps_run(pipe)(steps, strength):
        raise BadInput(
            f"--strength {strength:g} of {steps} steps is less than one step; {one_step(steps):g} is enough."
        )
    return strength


def _complete_clip(job: Job, pipe: Any, preset: presets.Preset) -> Job:
    """`job` with frames and their rate given, and window and overlap where its route goes by windows."""
    usual = preset.frames or clip.native_frames(pipe)
    frames, fps = job.frames or usual, job.fps or preset.fps or clip.native_fps(pipe)
    if frames is None or fps is None:
        what, flag = ("frames a clip has", "frames") if frames is None else ("frames a second it makes", "fps")
        raise BadInput(f"{job.model} does not say how many {what}: give --{flag}.")
    clip.check_frames(frames, pipe)
    window, overlap = job.window, job.overlap
    if job.route == "windows":
        window = window or usual
        if window is None:
            raise BadInput(f"{job.model} does not say how many frames its clips have: give --window.")
        clip.check_frames(window, pipe, "window")
        factor = clip.temporal_factor(pipe)
        overlap = overlap or max(1, clip.latent_frames(window, pipe) // 2) * factor
        if overlap % factor or overlap >= window:
            raise BadInput(f"overlap {overlap} is not a multiple of {factor} below the window, {window}.")
    elif window is not None or overlap is not None:
        flag = f"--overlap {overlap}" if window is None else f"--window {window}"
        raise BadInput(f"{flag}: there is no --route windows to use it.")
    return dataclasses.replace(job, frames=frames, fps=fps, window=window, overlap=overlap)


def steps_run(pipe: Any) -> StepsRun:
    """How many steps the image-to-image form of `pipe` runs: Diffusers' own count, by the kind of its denoiser."""
    if type(pipe).__name__.startswith("LatentConsistencyModel"):
        return every
    return rounded_down if getattr(pipe, "unet", None) else rounded_up


def size_multiple(pipe: Any) -> int:
    """Pixels of which the width and height of a picture must be multiples."""
    scale = clip.spatial_factor(pipe)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    patch = getattr(denoiser.config, "patch_size", 1)
    # U-Net pipelines ask for multiples of 8 whatever their VAE; some DiT pipelines pack 2x2 latents, and only their
    # image processor knows it.
    processor = getattr(pipe, "image_processor", None)
    packed = int(processor.config.vae_scale_factor) if processor is not None else 1
    patches = patch[1:] if isinstance(patch, list | tuple) else (patch if isinstance(patch, int) else 1,)
    return math.lcm(8 if getattr(pipe, "unet", None) else 1, packed, scale * math.lcm(*patches))


def check_side(name: str, value: int, multiple: int, who: str = "this model") -> None:
    below = value // multiple * multiple
    if value != below:
        nearest = max(multiple, below if value - below <= multiple // 2 else below + multiple)
        raise BadInput(f"{name} {value} is not a multiple of {multiple}, which {who} needs; nearest: {nearest}.")


def native_side(pipe: Any) -> int | None:
    if (name := type(pipe).__name__) in NATIVE_SIDES:
        return NATIVE_SIDES[name]
    unet = getattr(pipe, "unet", None)
    side = getattr(pipe, "default_sample_size", None) or (unet.config.sample_size if unet else None)
    if isinstance(side, list | tuple):
        side = max(side)
    return int(side * pipe.vae_scale_factor) if side else None
