"""One job: a prompt and what goes with it → one picture on disk. What can be refused is refused before step 1."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..accel.swap import enable
from . import load, presets, save, settings
from .errors import BadInput, JobFailed

if TYPE_CHECKING:
    from ..accel.report import Report

MAX_SIDE = 16384
# What a picture remembers of its job; everything else belongs to the machine that made it.
RECORDED: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "negative": (str, type(None)),
    "model": (str,),
    "variant": (str, type(None)),
    "methods": (dict,),
    "width": (int,),
    "height": (int,),
    "steps": (int,),
    "guidance": (float, int),
    "seed": (int,),
    "dtype": (str,),
    "vae_tiling": (bool,),
}


@dataclass(frozen=True)
class Job:
    """A picture to make. `None` means: as the model's preset says, else as its pipeline says.

    Attributes:
        methods: Method name → settings, as `settings.parse` gives them.
        width: Pixels, as `height`.
        dtype: A key of `load.DTYPES` or "auto".
        device: A torch device or "auto".
        cpu_offload: None, "model" or "group", as in `diffusers-cli run`.
    """

    prompt: str
    output: Path
    model: str = "emoji-sd"
    variant: str | None = None
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    cpu_offload: str | None = None
    vae_tiling: bool = False


@dataclass(frozen=True)
class Result:
    """A picture made. `seconds` is the pipeline's call alone, `peak_bytes` the most memory held on `device`."""

    job: Job
    image: Image.Image
    seconds: float
    peak_bytes: int | None
    device: torch.device
    report: Report | None
    record: dict[str, Any]


def from_record(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `Job` from what `save.read_record` read, which anybody may have written.

    Raises:
        BadInput: a field is missing or of the wrong type.
    """
    for name, kinds in RECORDED.items():
        value = record.get(name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise BadInput(f"the attnswap metadata does not say how the picture was made: {name} is {value!r}.")
    if not all(isinstance(values, dict) for values in record["methods"].values()):
        raise BadInput("the attnswap metadata does not say how the picture was made: methods without settings.")
    return {name: record[name] for name in RECORDED}


def generate(job: Job, *, progress: bool = False) -> Result:
    """Makes the picture and writes it to `job.output`.

    Raises:
        BadInput, UnsupportedModel: the job cannot be done as written; no step was run.
        JobFailed: something broke on the way; nothing was written.
    """
    save.check_writable(job.output, ".png")
    _check_numbers(job)
    settings.build(job.methods)  # a wrong setting is said before the model is read
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
    job = _complete(job, pipe, preset, dtype)
    pipe.set_progress_bar_config(disable=not progress, delay=2)
    _place(pipe, device, job)
    handle = enable(pipe, configs) if configs else None
    try:
        image, seconds, peak = _render(pipe, job, device)
        report = handle.report() if handle else None
    finally:
        if handle:
            handle.disable()

    methods = {name: config.to_dict() for name, config in zip(merged, configs, strict=True)}
    job = dataclasses.replace(job, methods=methods)
    record = {name: getattr(job, name) for name in RECORDED} | {"device": str(device), "versions": versions()}
    try:
        save.write_png(image, job.output, record)
    except OSError as error:
        raise JobFailed(f"{job.output} could not be written: {error.strerror or error}") from error
    return Result(job, image, seconds, peak, device, report, record)


def versions() -> dict[str, str]:
    """The versions that shape a picture."""
    names = ("attnswap", "torch", "diffusers", "transformers")
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: importlib.metadata.version(name) for name in names},
    }


def _check_numbers(job: Job) -> None:
    for name in ("width", "height"):
        value = getattr(job, name)
        if value is not None and not 0 < value <= MAX_SIDE:
            raise BadInput(f"{name} {value} is out of range: 1 to {MAX_SIDE}.")
    if job.steps is not None and not 0 < job.steps <= 1000:
        raise BadInput(f"steps {job.steps} is out of range: 1 to 1000.")
    if job.guidance is not None and not (math.isfinite(job.guidance) and job.guidance >= 0):
        raise BadInput(f"guidance {job.guidance} is out of range: 0 or more.")
    if not 0 <= job.seed < 2**63:
        raise BadInput(f"seed {job.seed} is out of range: 0 to 2^63 - 1.")


def _complete(job: Job, pipe: Any, preset: presets.Preset, dtype: torch.dtype) -> Job:
    """`job` with nothing left open, checked against what `pipe` can do."""
    accepted = inspect.signature(pipe.__call__).parameters
    name = type(pipe).__name__
    if "prompt" not in accepted or "num_frames" in accepted:
        raise BadInput(f"{job.model} is a {name}, which does not make a picture from a prompt.")
    if job.negative is not None and "negative_prompt" not in accepted:
        raise BadInput(f"{job.model} is a {name}, which takes no negative prompt.")
    native = preset.native_side or _native_side(pipe) or 0
    if not native and None in (job.width, job.height):
        raise BadInput(f"{job.model} does not say its native size: give --width and --height.")
    multiple = size_multiple(pipe)
    width, height = job.width or native, job.height or native
    check_side("width", width, multiple)
    check_side("height", height, multiple)

    def default(parameter: str, preset_value: Any) -> Any:
        return preset_value if preset_value is not None else accepted[parameter].default

    return dataclasses.replace(
        job,
        width=width,
        height=height,
        steps=job.steps or default("num_inference_steps", preset.steps),
        guidance=job.guidance if job.guidance is not None else default("guidance_scale", preset.guidance),
        dtype=str(dtype).removeprefix("torch."),
    )


def size_multiple(pipe: Any) -> int:
    """Pixels of which the width and height of a picture must be multiples."""
    scale = int(pipe.vae_scale_factor)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    patch = getattr(denoiser.config, "patch_size", 1)
    # U-Net pipelines ask for multiples of 8 whatever their VAE; some DiT pipelines pack 2x2 latents, and only their
    # image processor knows it.
    packed = int(pipe.image_processor.config.vae_scale_factor)
    return math.lcm(8 if getattr(pipe, "unet", None) else 1, packed, scale * (patch if isinstance(patch, int) else 1))


def check_side(name: str, value: int, multiple: int) -> None:
    below = value // multiple * multiple
    if value != below:
        nearest = max(multiple, below if value - below <= multiple // 2 else below + multiple)
        raise BadInput(f"{name} {value} is not a multiple of {multiple}, which this model needs; nearest: {nearest}.")


def _native_side(pipe: Any) -> int | None:
    unet = getattr(pipe, "unet", None)
    side = getattr(pipe, "default_sample_size", None) or (unet.config.sample_size if unet else None)
    if isinstance(side, list | tuple):
        side = max(side)
    return int(side * pipe.vae_scale_factor) if side else None


def _place(pipe: Any, device: torch.device, job: Job) -> None:
    if job.vae_tiling:
        if not hasattr(pipe.vae, "enable_tiling"):
            raise BadInput(f"--vae-tiling: {type(pipe.vae).__name__} has no tiling.")
        pipe.vae.enable_tiling()
    if job.cpu_offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif job.cpu_offload == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda")
    else:
        pipe.to(device)


def _render(pipe: Any, job: Job, device: torch.device) -> tuple[Image.Image, float, int | None]:
    steps_run = 0

    def after_step(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal steps_run
        steps_run = step + 1
        if not torch.isfinite(tensors["latents"]).all():
            raise JobFailed(
                f"not-a-number in the latents after step {steps_run} of {job.steps} in {job.dtype}.{_try(job)}"
            )
        return {}

    wanted = {
        "prompt": job.prompt,
        "negative_prompt": job.negative,
        "width": job.width,
        "height": job.height,
        "num_inference_steps": job.steps,
        "guidance_scale": job.guidance,
        "generator": torch.Generator("cpu").manual_seed(job.seed),
        "callback_on_step_end": after_step,
    }
    accepted = inspect.signature(pipe.__call__).parameters
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    try:
        output = pipe(**{name: value for name, value in wanted.items() if name in accepted}, output_type="pt")
    except (ValueError, TypeError) as error:
        if steps_run == 0:
            raise BadInput(f"{type(pipe).__name__} refuses: {error}") from error
        raise
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise JobFailed(
                f"out of memory at {job.width}x{job.height} on {device} after {steps_run} steps. "
                "Try a smaller size, --vae-tiling or --cpu-offload model."
            ) from error
        raise
    seconds = time.perf_counter() - start
    if any(getattr(output, "nsfw_content_detected", None) or ()):
        raise JobFailed("the model's safety checker has blacked the picture out. Try another --seed or prompt.")
    return _to_image(output.images[0], job), seconds, _peak_bytes(device)


def _to_image(pixels: torch.Tensor, job: Job) -> Image.Image:
    pixels = pixels.float().cpu()
    if not torch.isfinite(pixels).all():
        raise JobFailed(f"not-a-number in the decoded picture in {job.dtype}.{_try(job)}")
    # The rounding of Diffusers' own image processor.
    array = (pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    if not array.any():
        raise JobFailed(f"the picture is black all over.{_try(job)}")
    return Image.fromarray(array)


def _try(job: Job) -> str:
    return " Try --dtype float32." if job.dtype != "float32" else ""


def _peak_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
