"""`attnswap distill linfusion`."""

from __future__ import annotations

import argparse
from typing import Any

from .distill_options import add_data, add_machine, add_output, add_training
from .distill_run import train


def add(methods: Any) -> None:
    parser = methods.add_parser(
        "linfusion",
        usage="attnswap distill linfusion -o FOLDER (--steps N | --minutes M) [--data DATA] [options]",
        help="linear attention for a U-Net (SD 1.5, SD 2.1, SDXL)",
        description="Train linear attention to do what the self-attention of a U-Net does. Writes the weights "
        "(use them as --set weights=FOLDER), a report with loss curves and pictures, and a checkpoint.",
        epilog="Several processes: accelerate launch -m attnswap.cli distill linfusion …",
    )
    add_output(parser)
    add_data(parser, model="emoji-sd").add_argument(
        "--size", type=int, metavar="PX", help="short side and crop (default: the model's own)"
    )
    training = add_training(parser)
    training.add_argument("--mid", metavar="WIDTH", help="of the MLPs: C, C/N or a number (default: C; SDXL C/16)")
    add_machine(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..training.distill_settings import LinFusionSettings

    return train(LinFusionSettings, options)
