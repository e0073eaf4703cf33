"""`attnswap distill clear`."""

from __future__ import annotations

import argparse
from typing import Any

from .distill_options import add_data, add_machine, add_output, add_training
from .distill_run import train


def add(methods: Any) -> None:
    parser = methods.add_parser(
        "clear",
        usage="attnswap distill clear -o FOLDER (--steps N | --minutes M) [--radius R] [--data DATA] [options]",
        help="circular local attention for FLUX.1",
        description="Train circular local attention to do what the attention of a FLUX.1 transformer does. Writes the "
        "weights (use them as --set weights=FOLDER, with the same radius and down_factor), a report with loss curves "
        "and pictures, and a checkpoint.",
        epilog="Several processes: accelerate launch -m attnswap.cli distill clear …",
    )
    add_output(parser)
    data = add_data(parser, model="emoji-flux")
    data.add_argument(
        "--size", type=int, metavar="PX", help="pictures are as large as a square of this side (default: the model's)"
    )
    for side, other in (("width", "height"), ("height", "width")):
        data.add_argument(
            f"--{side}",
            type=sides,
            metavar="PX[,PX]",
            help=f"{side}s of the pictures, one for each {other} (default: their own shapes)",
        )
    data.add_argument(
        "--guidance", type=float, metavar="X", help="guidance scale, for a model that takes it as input (default: 3.5)"
    )
    training = add_training(parser)
    training.add_argument(
        "--radius",
        type=float,
        metavar="R",
        help="how far a token sees, in tokens: 16 pixels in FLUX.1, 8 in emoji-flux (default: 16)",
    )
    training.add_argument(
        "--down-factor", type=int, metavar="S", help="also see the rest, in cells of S x S tokens (default: not at all)"
    )
    training.add_argument(
        "--every", type=int, metavar="N", help="compare every Nth layer with the teacher's (default: 4)"
    )
    training.add_argument("--clip", type=float, metavar="X", help="largest norm of the gradient (default: 1)")
    add_machine(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..training.distill_settings import ClearSettings

    return train(ClearSettings, options)


def sides(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are not whole numbers separated by commas") from None
