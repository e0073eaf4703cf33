"""`attnswap bench`: the kernels, or a model, timed on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .common import METHODS, MODELS, quieten, split_names


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="time the kernels, or a model, on this machine",
        description="Time the kernels, or a whole model with every method, against dense attention.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--op", action="append", metavar="NAME", help="an op to time; again for more (default: all)")
    what.add_argument("--model", metavar="MODEL", help=f"time this model instead: {MODELS}")
    parser.add_argument("--method", metavar="NAME[,NAME]", help=f"with --model: {METHODS} (default: all)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="time every case in this dtype")
    parser.add_argument("--quick", action="store_true", help="few cases, few rounds: not for quoting")
    parser.add_argument("--json", metavar="FILE", help="also write the result there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..benchmarks import models, runner
    from ..pipelines import save
    from ..pipelines.errors import BadInput

    if options.json:
        save.check_writable(Path(options.json), ".json")
    if options.method is not None and not options.model:
        raise BadInput("--method goes with --model: an op is timed with every backend.")
    how = {"device": options.device, "dtype": options.dtype, "quick": options.quick}
    try:
        if options.model:
            quieten(sys.stderr.isatty())
            names = split_names(options.method) if options.method is not None else None
            result = models.run(options.model, methods=names, **how, progress=runner.print_progress)
        else:
            result = runner.run(options.op, **how, progress=runner.print_progress)
    except ValueError as error:
        raise BadInput(str(error)) from error
    print(result.table())
    if options.json:
        result.write(options.json)
    return 0
