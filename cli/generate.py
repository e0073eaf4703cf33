"""`attnswap generate`: one picture or clip from a prompt."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import job_options
from .common import Listing, quieten

if TYPE_CHECKING:
    from ..pipelines.job import Job
    from ..pipelines.session import Result


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

    job_options.add_model_group(parser)
    job_options.add_method_group(parser)
    picture = job_options.add_picture_group(parser, prompt="?")
    picture.add_argument("--seed", type=int, metavar="N", help="same seed, same picture (default: 0)")
    picture.add_argument("--frames-dir", metavar="DIR", help="a clip's frames as PNGs there; alone, or beside -o")
    route = job_options.add_route_group(parser)
    route.add_argument("--keep-stages", action="store_true", help="keep the pictures of the stages, too")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..pipelines import save
    from ..pipelines.errors import NotWritten
    from ..pipelines.generate import generate
    from ..pipelines.job import is_another
    from ..pipelines.printable import printable, printable_lines
    from ..pipelines.provenance import compare_pixels
    from ..pipelines.recorded import Original

    record = save.read_record(Path(options.source)) if options.source else None
    changes, job = _job(options, record)
    report_path = Path(options.report) if options.report not in (None, "-") else None
    if report_path:
        save.check_writable(report_path, ".json")
    progress = sys.stderr.isatty()
    quieten(progress)

    def say(text: str) -> None:
        print(f"attnswap: {printable(text)}", file=sys.stderr)

    like = Original(Path(options.source), record, changes) if record else None
    result = generate(job, like=like, progress=progress, say=say)
    to = sys.stderr if options.report == "-" else sys.stdout
    print(printable_lines(_summary(result)), file=to)
    if record and result.job.output and not is_another(record, changes):
        print(compare_pixels(result.job.output, Path(options.source)), file=to)
    if options.report == "-":
        print(json.dumps(_report(result), indent=2, ensure_ascii=False))
    elif report_path:
        try:
            save.write_json(_report(result), report_path)
        except OSError as error:
            raise NotWritten(report_path, error) from error
    return 0


def _job(options: argparse.Namespace, record: dict[str, Any] | None) -> tuple[dict[str, Any], Job]:
    """What the flags ask for, and the job that comes of it."""
    from ..pipelines import settings
    from ..pipelines.errors import BadInput
    from ..pipelines.job import Job, again, from_record

    changes = job_options.fields(options)
    if options.method is not None or options.set:
        stored = from_record(record)["methods"] if record else {}
        methods = job_options.method_names(options.method) if options.method is not None else list(stored)
        changes["methods"] = settings.parse(methods, options.set)
    if record is None and options.model is None and job_options.clip_asked(options, options.output):
        changes["model"] = "emoji-video"
    fields = again(record, changes) if record else changes
    if "prompt" not in fields:
        raise BadInput("no PROMPT given, and no --from FILE to take it from.")
    return changes, Job(
        **fields,
        output=Path(options.output) if options.output else None,
        frames_dir=Path(options.frames_dir) if options.frames_dir else None,
        keep_stages=options.keep_stages,
    )


def _summary(result: Result) -> str:
    job = result.job
    peak = f", peak memory {result.peak_bytes / 2**20:.0f} MiB" if result.peak_bytes else ""
    return "\n".join(
        [
            f"{_files(job)}: {job_options.summary_of_size(job)}, {job.steps} steps, seed {job.seed}",
            *(f"{job.route}, {stage}" for stage in result.stages if stage.total > 1),
            f"{result.seconds:.1f} s on {result.device}{peak}",
            str(result.report or _dense(result)),
        ]
    )


def _dense(result: Result) -> str:
    remarks = result.record.get("remarks", [])
    return "\n  ".join(["dense attention", *remarks]) if remarks else "dense attention (no --method)"


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
