"""`attnswap compare`: dense attention and methods on the same prompts and seeds."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import job_options
from .common import METHODS, Listing, fail, quieten, split_names
from .stopping import Stop

if TYPE_CHECKING:
    from ..pipelines.compare.variants import Variant


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        usage="attnswap compare PROMPT [PROMPT ...] -o DIR [--method NAME [--set KEY=VALUE] ...] [options]",
        help="dense attention and methods side by side, with figures",
        description="Make the same pictures or clips with dense attention and with each --method, and compare them:\n"
        "time, memory, PSNR and SSIM as a table, a contact sheet, and a page with sliders to look at.",
        epilog='e.g. attnswap compare "a fox" "an owl" -o out --width 256 --height 256\n'
        '     attnswap compare "a fox moving left" -o out -m emoji-video \\\n'
        "         --method adaspa --set sparsity=0.8 --method adaspa --set sparsity=0.9",
        formatter_class=Listing,
    )
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="a new or empty folder for everything")
    job_options.add_model_group(parser)

    method = parser.add_argument_group("what is compared with dense attention")
    method.add_argument(
        "--method",
        action=Choice,
        dest="choices",
        default=(),
        metavar="NAME[,NAME]",
        help=f"auto, or of {METHODS}; again for more (default: each that applies to the model)",
    )
    method.add_argument(
        "--set", action=Choice, dest="choices", metavar="KEY=VALUE", help="a setting of the --method before it"
    )
    picture = job_options.add_picture_group(parser, prompt="+")
    picture.add_argument("--seeds", type=_seeds, default=(0,), metavar="N[,N]", help="of each prompt (default: 0)")
    job_options.add_route_group(parser)
    parser.set_defaults(run=run)


class Choice(argparse.Action):
    """Keeps --method and --set in the order they were given in."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, flag: str | None = None) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), (flag, value)))


def run(options: argparse.Namespace) -> int:
    from ..pipelines.compare import text
    from ..pipelines.compare.run import compare
    from ..pipelines.job import Job

    folder = Path(options.output)
    fields: dict[str, Any] = {"model": "emoji-video"} if job_options.clip_asked(options) else {}
    fields |= job_options.fields(options) | {"prompt": options.prompt[0]}
    progress = sys.stderr.isatty()
    quieten(progress)
    stop = Stop()
    found = compare(
        Job(**fields),
        _variants(options.choices),
        prompts=options.prompt,
        seeds=options.seeds,
        folder=folder,
        command=shlex.join(["attnswap", *options.arguments]),
        progress=progress,
        say=lambda text: print(f"attnswap: {text}", file=sys.stderr),
        stopping=stop,
    )
    print(text.report(found))
    print(f"\n{folder / 'compare.html'}: the pictures with sliders; beside it sheet.png and compare.json")
    if found.interrupted:
        return fail(f"interrupted; what was made until then is in {folder}.", 128 + (stop.signal or signal.SIGINT))
    summaries = [found.summary(variant) for variant in found.variants[1:]]
    return 0 if any(summary.made for summary in summaries) else 1


def _variants(choices: Sequence[tuple[str, str]]) -> tuple[Variant, ...]:
    from ..pipelines.compare import variants
    from ..pipelines.errors import BadInput

    found: list[tuple[list[str], list[str]]] = []
    for flag, value in choices:
        if flag == "--method":
            found.append((split_names(value), []))
        elif found:
            found[-1][1].append(value)
        else:
            raise BadInput(f"--set {value}: there is no --method before it to set it for.")
    return variants.parse(found)


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are not whole numbers separated by commas") from None
