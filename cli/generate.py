"""`attnswap generate`: one picture or clip from a prompt."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import METHODS, MODELS, Listing, numbers, quieten, split_names

if TYPE_CHECKING:
    from ..pipelines.generate import Result
    from ..pipelines.job import Job

ROUTES = {
    "direct": "one run at the size asked for",
    "ladder": "a base near the native size, then image-to-image in stages",
    "superres": "a base, enlarged once, its layout kept (SD 1.5, 2.1, XL)",
    "superres-ladder": "the same in stages (SD 1.5, 2.1, XL)",
    "windows": "clips longer than native, in overlapping windows of time",
}
DTYPES = ("auto", "float16", "fp16", "bfloat16", "bf16", "float32", "fp32")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        usage="attnswap generate PROMPT [options]",
        help="make one picture or clip from a prompt",
        description="Make one picture or clip from a prompt. The rest is as in the model's preset.",
        epilog='e.g. attnswap generate "a fox" --width 256 --height 256 --method hidiffusion\n'
        '     attnswap generate "a fox moving left" --method adaspa -o fox.mp4',
        formatter_class=Listing,
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="PNG, MP4 or GIF to write (default: attnswap-TIME-SEED.…)"
    )
    parser.add_argument("--from", dest="source", metavar="FILE", help="make a picture or clip again from its own file")
    parser.add_argument("--report", metavar="FILE", help="also write a JSON report there ('-': standard output)")

    model = parser.add_argument_group("model")
    model.add_argument("-m", "--model", help=f"{MODELS} (default: emoji-sd; emoji-video for a clip)")
    model.add_argument("--variant", help='weight variant, such as "fp16"')
    model.add_argument("--dtype", choices=DTYPES, metavar="DTYPE", help="auto, fp32, fp16 or bf16 (default: auto)")
    model.add_argument("--device", help="cpu, cuda, cuda:1, mps … (default: the accelerator, else the CPU)")
    model.add_argument(
        "--cpu-offload", choices=("model", "group"), metavar="BY", help="model or group: on the CPU until needed"
    )
    model.add_argument("--vae-tiling", action="store_true", default=None, help="decode in tiles: less memory")
    model.add_argument(
        "--low-memory",
        action="store_true",
        default=None,
        help="slower: guidance halves, feed-forward and autoencoder in parts",
    )

    method = parser.add_argument_group("method")
    method.add_argument("--method", metavar="NAME[,NAME]", help=f"{METHODS} (default: none)")
    method.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the method; again for more"
    )

    picture = parser.add_argument_group("picture or clip")
    picture.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to show")
    picture.add_argument("--width", type=int, metavar="PX")
    picture.add_argument("--height", type=int, metavar="PX")
    picture.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    picture.add_argument("--guidance", type=float, metavar="X", help="guidance scale")
    picture.add_argument("--true-cfg", type=float, metavar="X", help="guidance by --negative, beside FLUX's own")
    picture.add_argument("--negative", metavar="PROMPT", help="what not to show")
    picture.add_argument("--seed", type=int, metavar="N", help="same seed, same picture (default: 0)")
    picture.add_argument("--frames", type=int, metavar="N", help="of a clip")
    picture.add_argument("--fps", metavar="RATE", help="frames a second, such as 16, 23.976 or 24000/1001")
    picture.add_argument("--frames-dir", metavar="DIR", help="a clip's frames as PNGs there; alone, or beside -o")

    routes = "\n".join(f"{name:16} {what}" for name, what in ROUTES.items())
    route = parser.add_argument_group("above the native size or length, by one of these routes", routes)
    route.add_argument("--route", choices=ROUTES, metavar="ROUTE", help="one of the above (default: direct)")
    route.add_argument("--strengths", type=numbers, metavar="X[,X]", help="one a stage above the base, 0 to 1")
    route.add_argument("--window", type=int, metavar="N", help="frames in a window (default: native)")
    route.add_argument("--overlap", type=int, metavar="N", help="frames two windows share (default: about half)")
    route.add_argument("--keep-stages", action="store_true", help="keep the pictures of the stages, too")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..pipelines import save
    from ..pipelines.errors import JobFailed
    from ..pipelines.generate import generate

    job = _job(options)
    report_path = Path(options.report) if options.report not in (None, "-") else None
    if report_path:
        save.check_writable(report_path, ".json")
    progress = sys.stderr.isatty()
    quieten(progress)
    result = generate(job, progress=progress, say=lambda text: print(f"attnswap: {text}", file=sys.stderr))
    print(_summary(result), file=sys.stderr if options.report == "-" else sys.stdout)
    if options.report == "-":
        print(json.dumps(_report(result), indent=2, ensure_ascii=False))
    elif report_path:
        try:
            save.write_json(_report(result), report_path)
        except OSError as error:
            raise JobFailed(f"{report_path} could not be written: {error.strerror or error}") from error
    return 0


def _job(options: argparse.Namespace) -> Job:
    from ..pipelines import clip, save, settings
    from ..pipelines.errors import BadInput
    from ..pipelines.job import Job, again, from_record

    record = save.read_record(Path(options.source)) if options.source else None
    names = (
        "prompt", "model", "variant", "dtype", "device", "cpu_offload", "vae_tiling", "low_memory",
        "width", "height", "steps", "guidance", "true_cfg", "negative", "seed", "route", "strengths",
        "frames", "window", "overlap",
    )  # fmt: skip
    changes = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.fps is not None:
        changes["fps"] = clip.parse_fps(options.fps)
    if options.method is not None or options.set:
        stored = from_record(record)["methods"] if record else {}
        methods = split_names(options.method) if options.method is not None else list(stored)
        changes["methods"] = settings.parse(methods, options.set)
    if record is None and options.model is None and _asks_for_a_clip(options):
        changes["model"] = "emoji-video"
    fields = again(record, changes) if record else changes
    if "prompt" not in fields:
        raise BadInput("no PROMPT given, and no --from FILE to take it from.")
    return Job(
        **fields,
        output=Path(options.output) if options.output else None,
        frames_dir=Path(options.frames_dir) if options.frames_dir else None,
        keep_stages=options.keep_stages,
    )


def _asks_for_a_clip(options: argparse.Namespace) -> bool:
    """Whether something is asked for that only clips have."""
    from ..pipelines.video_writer import KINDS

    only_of_clips = (options.frames, options.fps, options.frames_dir, options.window, options.overlap)
    kind = Path(options.output or "").suffix.lower()
    return any(value is not None for value in only_of_clips) or options.route == "windows" or kind in KINDS


def _summary(result: Result) -> str:
    job = result.job
    peak = f", peak memory {result.peak_bytes / 2**20:.0f} MiB" if result.peak_bytes else ""
    clip = ""
    if job.frames and job.fps:
        count = f"{job.frames} frame{'s' if job.frames > 1 else ''}"
        clip = f"{count} at {job.fps} a second ({float(job.frames / job.fps):.1f} s), "
    return "\n".join(
        [
            f"{_files(job)}: {job.width}x{job.height}, {clip}{job.steps} steps, seed {job.seed}",
            *(f"{job.route}, {stage}" for stage in result.stages if stage.total > 1),
            f"{result.seconds:.1f} s on {result.device}{peak}",
            str(result.report) if result.report else "dense attention (no --method)",
        ]
    )


def _files(job: Job) -> str:
    return " and ".join(str(path) for path in (job.output, job.frames_dir) if path)


def _report(result: Result) -> dict[str, Any]:
    return {
        "file": str(result.job.output or result.job.frames_dir),
        "seconds": result.seconds,
        "peak_bytes": result.peak_bytes,
        "job": result.record,
        "report": result.report.to_dict() if result.report else None,
        "notices": list(result.notices),
    }
