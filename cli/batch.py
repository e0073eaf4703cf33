"""`attnswap batch`: a picture or clip for each row of a manifest."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import job_options
from .common import Listing, quieten
from .stopping import Stop

if TYPE_CHECKING:
    from ..pipelines.batch.run import Outcome
    from ..pipelines.batch.share import Share
    from ..pipelines.job import Job

FAILURES_SHOWN = 10


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "batch",
        usage="attnswap batch MANIFEST -o DIR [options]",
        help="make a picture or clip for each row of a manifest",
        description="Make a picture or clip for each row of a manifest: a prompt a line (.txt), JSON lines (.jsonl)\n"
        "or CSV with a header. Fields: prompt, negative, seed, width, height, frames, fps, steps,\n"
        "guidance, method, settings, image, strength, id. The flags below are for rows that do not say.\n"
        "All rows are checked before the first is made; one that fails is recorded, the batch goes on.",
        epilog="e.g. attnswap batch prompts.txt -o out --width 256 --height 256 --method hidiffusion\n"
        "     attnswap batch prompts.txt -o out --resume\n"
        "     accelerate launch -m attnswap.cli batch prompts.txt -o out",
        formatter_class=Listing,
    )
    parser.add_argument("manifest", metavar="MANIFEST", help=".txt, .jsonl or .csv")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="for ID.png or ID.mp4, and results.jsonl")
    parser.add_argument("--resume", action="store_true", help="skip what is finished and whole, make the rest")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="rows of one shape in a call at most")
    parser.add_argument("--max-failures", type=int, metavar="N", help="end after so many (default: never)")
    parser.add_argument("--shard", metavar="I/N", help="every N-th row from row I on, counted from 0")
    parser.add_argument("--claim", action="store_true", help="share the folder with others who say so, row by row")
    parser.add_argument("--dry-run", action="store_true", help="check every row, make nothing")
    job_options.add_model_group(parser)
    job_options.add_method_group(parser)
    picture = job_options.add_picture_group(parser)
    picture.add_argument("--seed", type=int, metavar="N", help="same seed, same picture (default: 0)")
    job_options.add_route_group(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..pipelines.batch import share
    from ..pipelines.batch.run import Batch
    from ..pipelines.batch.run import run as run_batch
    from ..pipelines.printable import printable_lines

    mine = share.find(options.shard, options.claim, os.environ)
    batch = Batch(
        manifest=Path(options.manifest),
        defaults=_defaults(options, mine),
        folder=Path(options.output),
        share=mine,
        resume=options.resume,
        batch_size=options.batch_size,
        max_failures=options.max_failures,
        dry_run=options.dry_run,
    )
    # Several processes of one launcher write to one terminal.
    bars = sys.stderr.isatty() and mine.local_rank is None
    quieten(progress=False)
    name = f"{mine.worker}: " if mine.worker else ""
    stop = Stop()

    def print_line(text: str) -> None:
        print(printable_lines(f"{name}{text}"), file=sys.stderr, flush=True)

    outcome = run_batch(batch, bars=bars, print_line=print_line, stopping=stop)
    print(printable_lines(_summary(outcome, batch.folder, name, options.dry_run)))
    if outcome.interrupted:
        return 128 + stop.signal
    return 1 if outcome.failures or outcome.others_failed or outcome.ended else 0


def _defaults(options: argparse.Namespace, share: Share) -> Job:
    from ..pipelines import settings
    from ..pipelines.job import Job

    fields = job_options.fields(options)
    if options.method is not None or options.set:
        fields["methods"] = settings.parse(job_options.method_names(options.method or ""), options.set)
    if "model" not in fields and job_options.clip_asked(options):
        fields["model"] = "emoji-video"
    if "device" not in fields and share.local_rank is not None:
        fields["device"] = _device(share.local_rank)
    return Job(prompt="", **fields)


def _device(local_rank: int) -> str:
    """Each process of a launcher has a device of its own, where there are any."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else f"{accelerator.type}:{local_rank}"


def _summary(outcome: Outcome, folder: Path, name: str, dry_run: bool) -> str:
    before = f", {outcome.before} finished before" if outcome.before else ""
    if dry_run:
        return f"{name}{outcome.rows} rows are right, {outcome.left} to be made{before}."
    counts = {
        "failed": len(outcome.failures),
        "done by others": outcome.others,
        "failed with others": outcome.others_failed,
        "left": outcome.left,
    }
    parts = [f"{outcome.done} done", *(f"{count} {what}" for what, count in counts.items() if count)]
    lines = [f"{name}{', '.join(parts)}{before}: {folder / 'results.jsonl'}"]
    failures = list(outcome.failures.items())
    lines += [f"  {row} failed: {why}" for row, why in failures[:FAILURES_SHOWN]]
    lines += [f"  and {len(failures) - FAILURES_SHOWN} more"] if len(failures) > FAILURES_SHOWN else []
    if outcome.ended:
        lines.append(f"Ended early: {outcome.ended}. The same command with --resume goes on.")
    elif failures or outcome.others_failed:
        lines.append("The same command with --resume tries them again.")
    return "\n".join(lines)
