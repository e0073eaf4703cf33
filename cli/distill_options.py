"""What every `attnswap distill METHOD` takes."""

from __future__ import annotations

import argparse
from typing import Any

from .common import numbers


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="where weights, report and checkpoint go"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")


def add_data(parser: argparse.ArgumentParser, *, model: str) -> Any:
    """The group, for what a method has of its own; `model` is the default."""
    data = parser.add_argument_group("model and data")
    data.add_argument("-m", "--model", default=model, help=f"a folder or a Hub id (default: {model})")
    data.add_argument("--variant", help='weight variant, such as "fp16"')
    data.add_argument(
        "--data",
        help="a folder of pictures with captions (fox.txt beside fox.png, or metadata.jsonl with file_name and text); "
        "or a text file, one caption a line, or the word captions for those a bundled model comes with: then the "
        "model first draws the pictures itself, into FOLDER/data (default: captions)",
    )
    data.add_argument("--per-caption", type=int, metavar="N", help="pictures it draws a caption (default: 1)")
    data.add_argument("--workers", type=int, metavar="N", help="processes that read pictures (default: 0)")
    return data


def add_training(parser: argparse.ArgumentParser) -> Any:
    """The group, for what a method has of its own."""
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, metavar="N", help="length of the run, resumed parts included")
    group.add_argument("--minutes", type=float, metavar="M", help="the same by time; whichever ends first")
    group.add_argument("--batch", type=int, metavar="N", help="pictures a process takes at once (default: 4)")
    group.add_argument("--accumulate", type=int, metavar="N", help="such batches a step (default: 1)")
    group.add_argument("--rate", type=float, metavar="X", help="learning rate (default: 1e-4)")
    group.add_argument(
        "--loss-weights",
        type=numbers,
        metavar="X,X,X",
        help="of the data, the teacher's prediction and the teacher's layers in the loss (default: 1,0.5,0.5)",
    )
    group.add_argument("--caption-dropout", type=float, metavar="P", help="share of captions left out (default: 0)")
    group.add_argument("--ema", type=float, metavar="DECAY", help="save an average of the weights (default: none)")
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same run (default: 0)")
    group.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints (default: 500)")
    group.add_argument("--report-pictures", type=int, metavar="N", help="pairs drawn for the report (default: 6)")
    group.add_argument(
        "--report-captions",
        type=int,
        metavar="N",
        help="captions a model with reference pictures is measured by, before and after (default: 24)",
    )
    return group


def add_machine(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--mixed-precision", choices=("no", "fp16", "bf16"), help="the weights in training stay fp32 (default: no)"
    )
    machine.add_argument("--gradient-checkpointing", action="store_true", default=None, help="slower: less memory")
    machine.add_argument("--cpu", action="store_true", default=None, help="train on the CPU")
