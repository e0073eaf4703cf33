"""The `attnswap` command: reads the arguments, calls `pipelines`, prints what came of it. One module a command.

Exit status: 0 done, 1 the job failed, 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

# Nothing heavy is imported before the arguments are understood: --help and wrong use answer at once.
from . import batch, bench, compare, demo, distill, doctor, generate, inspect, show
from .common import Parser, Version, fail, warnings_in_a_line

__all__ = ["build_parser", "main"]

COMMANDS = (generate, batch, compare, demo, show, inspect, bench, distill, doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console that lacks a character must not end the job
    options = build_parser().parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with warnings_in_a_line():
            return int(options.run(options))
    except KeyboardInterrupt:
        return fail("interrupted; no file was left half-written.", 130)
    except BrokenPipeError:
        return 1
    except Exception as error:
        from ..accel.errors import UnsupportedModel, WeightsError
        from ..pipelines.errors import BadInput, JobFailed

        if isinstance(error, BadInput | UnsupportedModel | WeightsError):
            return fail(str(error), 2)
        if isinstance(error, JobFailed):
            return fail(str(error), 1)
        raise  # a defect of ours or of a library: the traceback is the report


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="attnswap", description="Fast attention for stock Diffusers pipelines.")
    parser.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser
