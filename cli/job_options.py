"""The flags of everything that makes pictures and clips, and the fields of a job they stand for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pipelines.routes.plan import DESCRIBED
from .common import METHODS, MODELS, numbers, split_names

if TYPE_CHECKING:
    from ..pipelines.job import Job

DTYPES = ("auto", "float16", "fp16", "bfloat16", "bf16", "float32", "fp32")
# Flags that are called as the fields of a job.
NAMES = (
    "prompt", "model", "variant", "dtype", "device", "cpu_offload", "vae_tiling", "low_memory", "scheduler", "compile",
    "width", "height", "steps", "guidance", "true_cfg", "negative", "seed", "route", "strengths",
    "frames", "window", "overlap", "strength",
)  # fmt: skip


def add_model_group(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("-m", "--model", help=f"{MODELS} (default: emoji-sd; emoji-video for a clip)")
    group.add_argument("--variant", help='weight variant, such as "fp16"')
    group.add_argument("--dtype", choices=DTYPES, metavar="DTYPE", help="auto, fp32, fp16 or bf16 (default: auto)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps … (default: the accelerator, else the CPU)")
    group.add_argument(
        "--lora",
        action="append",
        metavar="LORA",
        help='a file or Hub id, or {"lora_id": …, "lora_scale": …}; again for more',
    )
    group.add_argument("--scheduler", metavar="NAME", help="in place of the model's own, such as DPMSolverMultistep")
    group.add_argument(
        "--cpu-offload", choices=("model", "group"), metavar="BY", help="model or group: on the CPU until needed"
    )
    group.add_argument("--vae-tiling", action="store_true", default=None, help="decode in tiles: less memory")
    group.add_argument(
        "--low-memory",
        action="store_true",
        default=None,
        help="slower: guidance halves, feed-forward and autoencoder in parts",
    )
    group.add_argument(
        "--compile", action="store_true", default=None, help="compile the denoiser: slow first steps, then faster"
    )


def add_method_group(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    group.add_argument("--method", metavar="NAME[,NAME]", help=f"auto, or of {METHODS} (default: none)")
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the method; again for more"
    )


def add_picture_group(parser: argparse.ArgumentParser, prompt: str | None = None) -> Any:
    """The group, for what a command adds to it; `prompt` is how many (`nargs`), None for none."""
    group = parser.add_argument_group("picture or clip")
    if prompt is not None:
        group.add_argument("prompt", nargs=prompt, metavar="PROMPT", help="what to show")
    group.add_argument("--width", type=int, metavar="PX")
    group.add_argument("--height", type=int, metavar="PX")
    group.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    group.add_argument("--guidance", type=float, metavar="X", help="guidance scale")
    group.add_argument("--true-cfg", type=float, metavar="X", help="guidance by --negative, beside FLUX's own")
    group.add_argument("--negative", metavar="PROMPT", help="what not to show")
    group.add_argument("--frames", type=int, metavar="N", help="of a clip")
    group.add_argument("--fps", metavar="RATE", help="frames a second, such as 16, 23.976 or 24000/1001")
    group.add_argument("--image", metavar="FILE", help="a picture to begin with")
    group.add_argument("--strength", type=float, metavar="X", help="how much --image may change, 0 to 1")
    return group


def add_route_group(parser: argparse.ArgumentParser) -> Any:
    """The group, for what a command adds to it."""
    routes = "\n".join(f"{name:16} {what}" for name, what in DESCRIBED.items())
    group = parser.add_argument_group("above the native size or length, by one of these routes", routes)
    group.add_argument("--route", choices=DESCRIBED, metavar="ROUTE", help="one of the above (default: direct)")
    group.add_argument("--strengths", type=numbers, metavar="X[,X]", help="one a stage above the base, 0 to 1")
    group.add_argument("--window", type=int, metavar="N", help="frames in a window (default: native)")
    group.add_argument("--overlap", type=int, metavar="N", help="frames two windows share (default: about half)")
    return group


def method_names(text: str) -> list[str]:
    """Those of --method, where "none" and "dense" are what there is without it."""
    names = split_names(text)
    return [] if names in (["none"], ["dense"]) else names


def fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a `Job` that the flags give; methods are left to the command.

    Raises:
        BadInput: a rate or an adapter that is none.
    """
    from ..pipelines import clip, lora

    found = {name: value for name in NAMES if (value := getattr(options, name, None)) is not None}
    if options.fps is not None:
        found["fps"] = clip.parse_fps(options.fps)
    if options.image is not None:
        found["image"] = Path(options.image)
    if options.lora is not None:
        found["loras"] = tuple(lora.parse_lora(text) for text in options.lora)
    return found


def clip_asked(options: argparse.Namespace, output: str | None = None) -> bool:
    """Whether something is asked for that only clips have."""
    from ..pipelines.video_writer import KINDS

    of_clips = (getattr(options, name, None) for name in ("frames", "fps", "frames_dir", "window", "overlap"))
    kind = Path(output or "").suffix.lower()
    return any(value is not None for value in of_clips) or options.route == "windows" or kind in KINDS


def summary_of_size(job: Job) -> str:
    """ "128x128" or "96x96, 17 frames at 8 a second (2.1 s)" of a complete job."""
    clip = ""
    if job.frames and job.fps:
        count = f"{job.frames} frame{'s' if job.frames > 1 else ''}"
        clip = f", {count} at {job.fps} a second ({float(job.frames / job.fps):.1f} s)"
    return f"{job.width}x{job.height}{clip}"
